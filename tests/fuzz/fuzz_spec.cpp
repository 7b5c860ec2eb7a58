// The call check of C++ on any description of a call, sizes and strides of 64 bits included: it accepts it, or throws one
// sentence as std::invalid_argument. What it accepts, and what is small, runs on arrays of exactly the described extent.
#include <stdexcept>

#include "fuzz.h"
#include "spec.h"

namespace anydelta::tests {
namespace {

constexpr int ARRAYS = 13;
constexpr const char* NAMES[ARRAYS] = {"q",
                                       "k",
                                       "v",
                                       "g",
                                       "beta",
                                       "state",
                                       "A_log",
                                       "dt_bias",
                                       "mask",
                                       "cu_seqlens",
                                       "state_indices",
                                       "snapshots",
                                       "snapshot_indices"};
constexpr anydelta::Array anydelta::Call::* MEMBERS[ARRAYS] = {&anydelta::Call::q,
                                                               &anydelta::Call::k,
                                                               &anydelta::Call::v,
                                                               &anydelta::Call::g,
                                                               &anydelta::Call::beta,
                                                               &anydelta::Call::state,
                                                               &anydelta::Call::A_log,
                                                               &anydelta::Call::dt_bias,
                                                               &anydelta::Call::mask,
                                                               &anydelta::Call::cu_seqlens,
                                                               &anydelta::Call::state_indices,
                                                               &anydelta::Call::snapshots,
                                                               &anydelta::Call::snapshot_indices};
enum { Q, K, V, G, BETA, STATE, A_LOG, DT_BIAS, MASK, CU, INDICES, SNAPSHOTS, ROWS };

int64_t bytes_of(Type t) {
    return t == Type::f32 || t == Type::i32 ? 4 : t == Type::f64 || t == Type::i64 ? 8 : t == Type::boolean ? 1 : 2;
}

struct Described {
    std::vector<int64_t> sizes, strides;
    Type type = Type::other;
    bool given = false;
    std::unique_ptr<Memory> memory;
    std::vector<char> before;

    void set(std::vector<int64_t> shape, Type t) {
        sizes = std::move(shape), type = t, given = true;
        strides.assign(sizes.size(), 1);
        for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
    }
    // The first and last element that the strides reach, in elements; false: too far for a test.
    bool extent(int64_t& low, int64_t& high) const {
        __int128 lo = 0, hi = 0;
        for (size_t i = 0; i < sizes.size(); ++i) {
            if (sizes[i] == 0) return low = 0, high = -1, true;
            const __int128 reach = (static_cast<__int128>(sizes[i]) - 1) * strides[i];
            (reach < 0 ? lo : hi) += reach;
        }
        low = static_cast<int64_t>(lo), high = static_cast<int64_t>(hi);
        return lo > -100000 && hi < 100000;
    }
};

// A number of 64 bits as nobody would write it.
int64_t any_size(Bytes& in) {
    const int64_t sizes[] = {0,
                             1,
                             2,
                             3,
                             16,
                             -1,
                             -2,
                             1 << 20,
                             int64_t{1} << 31,
                             int64_t{1} << 40,
                             int64_t{1} << 47,
                             int64_t{1} << 48,
                             int64_t{1} << 59,
                             int64_t{1} << 62,
                             INT64_MAX,
                             INT64_MIN};
    const int64_t b = in.below(17);
    return b == 16 ? static_cast<int64_t>(in.take(8)) : sizes[b];
}
double any_double(Bytes& in) {
    const double values[] = {0,      1,       -1,    1e-6,     -5,       3.4028234663852886e38,
                             3.5e38, -3.5e38, 1e308, 4.9e-324, HUGE_VAL, NAN};
    const int64_t b = in.below(13);
    if (b < 12) return values[b];
    const uint64_t bits = in.take(8);
    double x;
    std::memcpy(&x, &bits, 8);
    return x;
}

struct Description {
    Described arrays[ARRAYS];
    Options options;
    bool state_out = false;

    // A valid small call, and then up to 7 changes.
    explicit Description(Bytes& in) {
        const int64_t B = in.below(3), T = in.below(5), H = 1 + in.below(2), HV = H * (1 + in.below(2));
        const int64_t k = in.pick<int64_t>({1, 3, 8, 16}), v = in.pick<int64_t>({1, 2, 8, 17});
        const uint64_t flags = in.take(2);
        const auto flag = [&](int i) { return (flags >> i & 1) != 0; };
        const Type type = in.pick({Type::f32, Type::bf16, Type::f16, Type::f64});
        const Type gates = in.pick({Type::f32, Type::bf16, Type::f16, Type::f64});
        const Type state = type == Type::f64 ? type : in.pick({Type::f32, Type::bf16});
        const Type indices = in.pick({Type::i32, Type::i64});
        const bool kda = flag(0), vk = flag(1), packed = flag(2), raw = flag(3);
        const int64_t rows = vk ? v : k, columns = vk ? k : v, batch = packed ? 1 : B, N = packed ? in.below(4) : B;
        options.inplace = flag(4), options.op = options.inplace ? "gated_delta_rule_" : "gated_delta_rule";
        options.decay = raw ? "raw" : flag(5) ? "log" : "linear";
        options.heads = flag(6) ? "interleaved" : "tiled", options.state_layout = vk ? "vk" : "kv";
        options.beta_is_logit = flag(7), options.qk_l2norm = flag(8);
        if (flag(9)) options.scale = 0.5;
        if (raw && flag(10)) options.lower_bound = -5;
        state_out = flag(11);
        arrays[Q].set({batch, T, H, k}, type), arrays[K].set({batch, T, H, k}, type);
        arrays[V].set({batch, T, HV, v}, type);
        if (kda)
            arrays[G].set({batch, T, HV, k}, gates);
        else
            arrays[G].set({batch, T, HV}, gates);
        arrays[BETA].set({batch, T, HV}, gates);
        const bool pool = flag(12);
        if (options.inplace || pool || flag(13))
            arrays[STATE].set({N + (pool ? in.below(4) : 0), HV, rows, columns}, state);
        if (raw) arrays[A_LOG].set({HV}, gates);
        if (raw && flag(14)) arrays[DT_BIAS].set({HV * (kda ? k : 1)}, gates);
        if (flag(15)) arrays[MASK].set({batch, T}, Type::boolean);
        if (packed) arrays[CU].set({N + 1}, indices);
        if (pool) arrays[INDICES].set({N}, indices);
        const int64_t Ks = in.below(4);
        if (Ks && !(pool && options.inplace && in.flag()))
            arrays[SNAPSHOTS].set({Ks, N, HV, rows, columns}, state);
        else if (Ks)
            arrays[ROWS].set({Ks, N}, indices);
        for (int64_t changes = in.below(8); changes > 0; --changes) change(in);
    }

    void change(Bytes& in) {
        Described& x = arrays[in.below(ARRAYS)];
        const auto axis = [&] { return static_cast<size_t>(in.below(static_cast<int64_t>(x.sizes.size()))); };
        switch (in.below(10)) {
            case 0: x.given = !x.given; return;
            case 1: x.type = static_cast<Type>(in.below(8)); return;
            case 2:
                if (!x.sizes.empty()) x.sizes[axis()] = any_size(in);
                return;
            case 3:
                if (!x.sizes.empty()) x.strides[axis()] = any_size(in);
                return;
            case 4: x.sizes.push_back(any_size(in)), x.strides.push_back(any_size(in)); return;
            case 5:
                if (!x.sizes.empty()) x.sizes.pop_back(), x.strides.pop_back();
                return;
            case 6:  // one size in all arrays that have it
                if (!x.sizes.empty()) {
                    const int64_t from = x.sizes[axis()], to = any_size(in);
                    for (Described& y : arrays)
                        for (int64_t& n : y.sizes)
                            if (n == from) n = to;
                }
                return;
            case 7: (in.flag() ? options.scale : options.lower_bound) = any_double(in); return;
            case 8: options.qk_l2norm_eps = any_double(in); return;
            default: break;
        }
        std::string* const texts[] = {&options.decay, &options.heads, &options.state_layout};
        *texts[in.below(3)] = in.pick({"", "log", "linear", "raw", "interleaved", "tiled", "kv", "vk", "'\n\xff"});
        options.inplace = in.flag();
        options.scale = in.flag() ? Options::maybe(options.scale.value_or(0.5)) : std::nullopt;
        options.lower_bound = in.flag() ? Options::maybe(options.lower_bound.value_or(-5)) : std::nullopt;
    }

    anydelta::Call call() const {
        anydelta::Call c;
        for (int i = 0; i < ARRAYS; ++i) {
            const Described& x = arrays[i];
            if (!x.given) continue;
            anydelta::Array& a = c.*MEMBERS[i];
            a.sizes = x.sizes.data(), a.strides = x.strides.data(), a.dims = static_cast<int>(x.sizes.size());
            a.type = x.type;
            if (x.type == Type::other) a.type_name = "complex64";
        }
        return c;
    }

    // Memory for all arrays, the first element of each set in `call`; false: too large for a test.
    bool allocate(anydelta::Call& call, Bytes& in, int64_t P) {
        for (int i = 0; i < ARRAYS; ++i) {
            Described& x = arrays[i];
            int64_t low, high;
            if (!x.given) continue;
            if (!x.extent(low, high)) return false;
            const int64_t count = high - low + 1, size = bytes_of(x.type);
            x.memory = std::make_unique<Memory>(static_cast<size_t>(count * size));
            char* first = x.memory->data();
            for (int64_t e = 0; e < count; ++e) fill(i, first + e * size, x.type, in, e, P);
            x.before.assign(first, first + count * size);
            (call.*MEMBERS[i]).data = first - low * size;
        }
        return true;
    }

  private:
    static void fill(int which, char* at, Type type, Bytes& in, int64_t e, int64_t P) {
        if (type == Type::i32 || type == Type::i64) {
            const uint64_t b = in.take(1);  // mostly what the check accepts
            int64_t value = b < 200 ? (which == CU ? e : static_cast<int64_t>(b) % (P + 1)) : any_size(in);
            if (b >= 180 && b < 200) value = -1;
            std::memcpy(at, &value, static_cast<size_t>(bytes_of(type)));
        } else if (type == Type::boolean) {
            *at = static_cast<char>(in.flag());
        } else if (type != Type::f64 && type != Type::other) {
            const double x = which == G ? -0.25 : 0.5;
            store(at, type == Type::f32 ? DType::f32 : type == Type::bf16 ? DType::bf16 : DType::f16, x);
        } else {
            std::memset(at, 0, static_cast<size_t>(bytes_of(type)));
        }
    }
};

// What the hosts of the exported operators do with a call that the check has accepted.
void run_all(Description& d, anydelta::Call& call, const Spec& spec) {
    if (call.q.type == Type::f64) return;
    for (const anydelta::Array* x : {&call.q, &call.k, &call.v, &call.g, &call.beta, &call.state, &call.snapshots})
        if (x->given() && !x->plain()) return;  // they are copied first
    for (const anydelta::Array* x : {&call.A_log, &call.dt_bias})
        if (x->given() && !x->contiguous()) return;
    if (static_cast<double>(spec.B * spec.T) * static_cast<double>(spec.HV * spec.V) > 1e6) return;
    const Memory o(static_cast<size_t>(spec.B * spec.T * spec.HV * spec.V * bytes_of(call.q.type)));
    call.o = o.data();
    std::unique_ptr<Memory> state;
    const double size = static_cast<double>(spec.N) * static_cast<double>(spec.HV * spec.K * spec.V);
    if (d.state_out && !d.options.inplace) {
        if (size > 1e5) return;
        state = std::make_unique<Memory>(static_cast<size_t>(size) * static_cast<size_t>(bytes_of(spec.state_type)));
        call.state_out = state->data();
    }
    Prepared prepared;
    prepare(call, d.options, spec, prepared);
    for (const Kernels* kernels : builds()) {
        std::snprintf(context, sizeof context, "%s: an accepted call", kernels->name);
        run(prepared.problem, *kernels, 2, false);
    }
    for (int i = 0; i < ARRAYS; ++i) {
        Described& x = d.arrays[i];
        if (!x.given || i == SNAPSHOTS || (i == STATE && d.options.inplace)) continue;
        check(std::equal(x.before.begin(), x.before.end(), x.memory->data()), "%s was changed", NAMES[i]);
    }
}

}  // namespace
}  // namespace anydelta::tests

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace anydelta;
    using namespace anydelta::tests;
    Bytes in(data, size);
    Description d(in);
    anydelta::Call call = d.call();
    std::snprintf(context, sizeof context, "the check");
    try {
        const Spec spec = anydelta::check(call, d.options);
        if (!d.allocate(call, in, spec.P)) return 0;
        if (call.cu_seqlens.given() || call.state_indices.given()) check_values(call, d.options, spec);
        run_all(d, call, spec);
    } catch (const std::invalid_argument& error) {
        const std::string text = error.what(), op = d.options.op;
        tests::check(text.compare(0, op.size() + 2, op + ": ") == 0 && text.size() > op.size() + 10, "the text is '%s'",
                     text.c_str());
    }
    return verdict();
}
