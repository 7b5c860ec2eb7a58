// The kernels of every instruction set, on any valid call and any finite numbers: right within the rounding of float32,
// nothing written but what a call may write, the same bits by two threads and by other tasks.
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace anydelta;
    using namespace anydelta::tests;
    Bytes in(data, size);
    const int64_t most = in.pick({2000, 20000, 200000});
    const Case c = case_of(in, most);
    const std::unique_ptr<Call> call = make_call(c);
    Call& x = *call;
    spoil(x, in);
    const auto want = expect<Bounded>(x);
    const Allowed allowed = what_may_be_written(x, want);
    for (const Kernels* kernels : builds()) {
        std::snprintf(context, sizeof context, "%s: %s", kernels->name, c.text().c_str());
        x.restore();
        run(x.p, *kernels, 1, false);
        check_strays(x, allowed);
        compare(x, want);
        const Results one = results_of(x);
        x.restore();
        run(x.p, *kernels, 2, false);
        check(results_of(x) == one, "2 threads and 1 differ");
        x.restore();
        run_tasks(x.p, *kernels, 1 + c.seed % 3, 1 + c.seed % 2);
        check(results_of(x) == one, "smaller tasks differ");
    }
    return verdict();
}
