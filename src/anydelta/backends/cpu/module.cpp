// anydelta._core: the Python interface of the CPU kernels. spec.py has checked every call before. Arrays are read
// through arrays.h, or given as addresses if that is not possible: importing a managed array costs more than a decode
// step of a small head.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <stdexcept>

#include "arguments.h"
#include "arrays.h"
#include "host.h"
#include "mixer.h"
#include "plans.h"
#include "threads.h"

namespace nb = nanobind;
using namespace anydelta;

void bind_ggml(nb::module_& m);  // src/anydelta/ggml/bind.cpp

namespace {

// How many threads a plan runs on, and whose they are: torch's for tensors, otherwise as many as a
// Python function returns.
struct Threads {
    bool torch = false;
    nb::object number;
};

struct Plan {
    Problem p{};
    bool cu_is_int32 = false, indices_are_int32 = false, rows_are_int32 = false;
    Threads threads;
};

template <class T>
T field(const nb::dict& d, const char* name) {
    return nb::cast<T>(d[name]);
}

Tokens tokens(const nb::dict& d, const char* name) {
    const auto t = field<nb::tuple>(d, name);  // (dtype, b, t, h, heads)
    Tokens x;
    x.dtype = static_cast<DType>(nb::cast<int>(t[0]));
    x.b = nb::cast<int64_t>(t[1]);
    x.t = nb::cast<int64_t>(t[2]);
    x.h = nb::cast<int64_t>(t[3]);
    x.heads = nb::cast<int64_t>(t[4]);
    return x;
}

States states(const nb::dict& d, const char* name) {
    const auto t = field<nb::tuple>(d, name);  // (slot, n, h, row)
    States x;
    x.slot = nb::cast<int64_t>(t[0]);
    x.n = nb::cast<int64_t>(t[1]);
    x.h = nb::cast<int64_t>(t[2]);
    x.row = nb::cast<int64_t>(t[3]);
    return x;
}

Plan make_plan(const nb::dict& d, const nb::object& threads) {
    Plan plan;
    plan.threads = {threads.is_none(), threads};
    Problem& p = plan.p;
    p.B = field<int64_t>(d, "B");
    p.T = field<int64_t>(d, "T");
    p.H = field<int64_t>(d, "H");
    p.HV = field<int64_t>(d, "HV");
    p.K = field<int64_t>(d, "K");
    p.V = field<int64_t>(d, "V");
    p.N = field<int64_t>(d, "N");
    p.kda = field<bool>(d, "kda");
    p.tiled = field<bool>(d, "tiled");
    p.vk = field<bool>(d, "vk");
#define ANYDELTA_TAKE(type, name) p.name = field<type>(d, #name);
    ANYDELTA_PLAIN_OPTIONS(ANYDELTA_TAKE)
#undef ANYDELTA_TAKE
    p.has_lower_bound = field<bool>(d, "has_lower_bound");
    p.lower_bound = field<float>(d, "lower_bound");
    p.decay = static_cast<Decay>(field<int>(d, "decay"));
    p.scale = field<float>(d, "scale");
#define ANYDELTA_TAKE(name, ...) p.name = tokens(d, #name);
    ANYDELTA_TOKENS(ANYDELTA_TAKE)
#undef ANYDELTA_TAKE
    p.o = tokens(d, "o");
    p.A_log_dtype = static_cast<DType>(field<int>(d, "A_log_dtype"));
    p.dt_bias_dtype = static_cast<DType>(field<int>(d, "dt_bias_dtype"));
    p.mask_b = field<int64_t>(d, "mask_b");
    p.mask_t = field<int64_t>(d, "mask_t");
    p.state_dtype = static_cast<DType>(field<int>(d, "state_dtype"));
    p.in = states(d, "state_in");
    p.out = states(d, "state_out");
    p.snapshots = states(d, "snapshots");
    p.out_dense = field<bool>(d, "out_dense");
    p.Ks = field<int64_t>(d, "Ks");
    plan.cu_is_int32 = field<bool>(d, "cu_is_int32");
    plan.indices_are_int32 = field<bool>(d, "indices_are_int32");
    plan.rows_are_int32 = field<bool>(d, "rows_are_int32");
    return plan;
}

struct MixerPlan {
    Plan rule;
    Mixer m{};
};

GroupedTokens grouped_tokens(const nb::dict& d, const char* name) {
    const auto t = field<nb::tuple>(d, name);  // (dtype, b, t, group, heads per group)
    GroupedTokens x;
    x.dtype = static_cast<DType>(nb::cast<int>(t[0]));
    x.b = nb::cast<int64_t>(t[1]);
    x.t = nb::cast<int64_t>(t[2]);
    x.g = nb::cast<int64_t>(t[3]);
    x.per = nb::cast<int64_t>(t[4]);
    return x;
}

Windows windows(const nb::dict& d, const char* name) {
    const auto t = field<nb::tuple>(d, name);  // (dtype, slot, n, channel, column)
    Windows x;
    x.dtype = static_cast<DType>(nb::cast<int>(t[0]));
    x.slot = nb::cast<int64_t>(t[1]);
    x.n = nb::cast<int64_t>(t[2]);
    x.c = nb::cast<int64_t>(t[3]);
    x.s = nb::cast<int64_t>(t[4]);
    return x;
}

MixerPlan make_mixer_plan(const nb::dict& rule, const nb::dict& d, const nb::object& threads) {
    MixerPlan plan;
    plan.rule = make_plan(rule, threads);
    plan.rule.p.beta_scale = field<float>(d, "beta_scale");
    Mixer& m = plan.m;
    m.q = grouped_tokens(d, "q");
    m.k = grouped_tokens(d, "k");
    m.v = grouped_tokens(d, "v");
    m.z = grouped_tokens(d, "z");
    m.o = grouped_tokens(d, "o");
    m.W = field<int64_t>(d, "W");
    m.S = field<int64_t>(d, "S");
    m.weight_dtype = static_cast<DType>(field<int>(d, "weight_dtype"));
    m.weight_c = field<int64_t>(d, "weight_c");
    m.weight_w = field<int64_t>(d, "weight_w");
    m.bias_dtype = static_cast<DType>(field<int>(d, "bias_dtype"));
    m.silu = field<bool>(d, "silu");
    m.conv = windows(d, "conv_state");
    m.conv_snapshots = windows(d, "conv_snapshots");
    m.norm_dtype = static_cast<DType>(field<int>(d, "norm_dtype"));
    m.norm = field<bool>(d, "norm");
    m.gate = static_cast<NormGate>(field<int>(d, "gate"));
    m.norm_eps = field<float>(d, "norm_eps");
    return plan;
}

// int64 copies of index arrays: they are small, and the kernels then know one type.
std::vector<int64_t> widen(uintptr_t address, int64_t count, bool is_int32) {
    std::vector<int64_t> out(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i)
        out[static_cast<size_t>(i)] =
            is_int32 ? reinterpret_cast<const int32_t*>(address)[i] : reinterpret_cast<const int64_t*>(address)[i];
    return out;
}

void* at(uintptr_t address) { return reinterpret_cast<void*>(address); }

// A problem's index arrays, widened; they must outlive the run.
struct Indices {
    std::vector<int64_t> cu, rows, snapshots;
    void widen_into(Problem& p, const Plan& plan, uintptr_t cu_seqlens, uintptr_t state_indices,
                    uintptr_t snapshot_indices) {
        if (cu_seqlens) {
            cu = widen(cu_seqlens, p.N + 1, plan.cu_is_int32);
            p.cu_seqlens = cu.data();
        }
        if (state_indices) {
            rows = widen(state_indices, p.N, plan.indices_are_int32);
            p.state_indices = rows.data();
        }
        if (!snapshot_indices) return;
        const bool final_only = p.snapshots.data != nullptr;
        snapshots = widen(snapshot_indices, final_only ? p.N : p.Ks * p.N, plan.rows_are_int32);
        if (final_only) {
            p.out_rows = snapshots.data();
        } else {  // only these rows of the pool are written
            p.snapshot_indices = snapshots.data();
            p.snapshots.data = p.in.data;
            p.out.data = nullptr;
        }
    }
};

void run_plan(const Plan& plan, int threads, bool share_openmp, const uintptr_t* a) {
    using namespace rule_array;
    Problem p = plan.p;
#define ANYDELTA_TAKE(name, place, ...) p.name.data = at(a[place]);
    ANYDELTA_TOKENS(ANYDELTA_TAKE)
#undef ANYDELTA_TAKE
    p.o.data = at(a[O]);
    p.in.data = at(a[STATE_IN]);
    p.out.data = at(a[STATE_OUT]);
    p.snapshots.data = at(a[SNAPSHOTS]);
    p.A_log = at(a[A_LOG]);
    p.dt_bias = at(a[DT_BIAS]);
    p.mask = static_cast<const uint8_t*>(at(a[MASK]));
    Indices indices;
    indices.widen_into(p, plan, a[CU_SEQLENS], a[STATE_INDICES], a[SNAPSHOT_INDICES]);
    nb::gil_scoped_release unlocked;
    run_chosen(p, threads, share_openmp);
}

// For anydelta_torch in the same process.
void run_for_torch(const Problem& p, int threads) { run_chosen(p, threads, true); }

// The parts of packed [B, T, 2 H K + HV V], side by side.
void unpack(const Problem& p, const GroupedTokens& q, GroupedTokens& k, GroupedTokens& v) {
    char* qkv = static_cast<char*>(const_cast<void*>(q.data));
    const int64_t size = q.dtype == DType::f32 ? 4 : 2;
    k.data = qkv + p.H * p.K * size;
    v.data = qkv + 2 * p.H * p.K * size;
}

// The mixer of a plan on these arrays. `indices` must outlive it.
Mixer mixer_on(const MixerPlan& plan, const uintptr_t* a, Indices& indices) {
    using namespace mixer_array;
    Mixer m = plan.m;
    m.rule = plan.rule.p;
    Problem& p = m.rule;
    m.q.data = at(a[QKV]);
    m.k.data = at(a[K]);
    m.v.data = at(a[V]);
    if (!a[K]) unpack(p, m.q, m.k, m.v);
    p.g.data = at(a[G]);
    p.beta.data = at(a[BETA]);
    m.o.data = at(a[O]);
    m.conv.data = at(a[CONV_STATE]);
    p.in.data = p.out.data = at(a[STATE]);
    m.conv_snapshots.data = at(a[CONV_SNAPSHOTS]);
    p.snapshots.data = at(a[SNAPSHOTS]);
    m.weight = at(a[CONV_WEIGHT]);
    m.bias = at(a[CONV_BIAS]);
    p.A_log = at(a[A_LOG]);
    p.dt_bias = at(a[DT_BIAS]);
    m.z.data = at(a[Z]);
    m.norm_weight = at(a[NORM_WEIGHT]);
    p.mask = static_cast<const uint8_t*>(at(a[MASK]));
    indices.widen_into(p, plan.rule, a[CU_SEQLENS], a[STATE_INDICES], a[SNAPSHOT_INDICES]);
    return m;
}

void run_mixer_plan(const MixerPlan& plan, int threads, bool share_openmp, const uintptr_t* a) {
    Indices indices;
    const Mixer m = mixer_on(plan, a, indices);
    nb::gil_scoped_release unlocked;
    run_chosen(m, threads, share_openmp);
}

ArrayReader reader;
Plans plans;

// The address of an array, an address itself, or None.
uintptr_t address_of(nb::handle x) {
    uintptr_t found;
    if (PyLong_Check(x.ptr())) return nb::cast<uintptr_t>(x);
    if (!reader.address(x.ptr(), found)) throw nb::python_error();
    return found;
}

// A key for the arrays of a call and the environment that dispatch depends on. False if a key cannot say enough: the
// call is watched, a tensor is not plain memory, or gradients are wanted.
void begin(Key& key) {
    key.clear();
    const char* forced = std::getenv("ANYDELTA_BACKEND");
    key.text(forced, forced ? std::strlen(forced) : 0);
}
bool describe(nb::handle arrays, Key& key) {
    begin(key);
    ArrayReader::Seen seen;
    const Py_ssize_t n = PyTuple_GET_SIZE(arrays.ptr());
    for (Py_ssize_t i = 0; i < n; ++i)
        if (!reader.describe(PyTuple_GET_ITEM(arrays.ptr(), i), key, seen)) return false;
    return reader.settle(seen, key);
}

// The plan for these arrays and other arguments, or the key for `keep_plan`, or None: it must not be cached. `text`
// describes what is not among `arrays`.
nb::object find_plan(const nb::tuple& arrays, const nb::tuple& rest, const nb::object& text) {
    static thread_local Key key;
    if (!describe(arrays, key)) return nb::none();
    if (!text.is_none()) {
        const char* more = PyUnicode_AsUTF8(text.ptr());
        if (!more) throw nb::python_error();
        key.text(more, std::strlen(more));
    }
    if (PyObject* plan = plans.find(key, rest.ptr())) return nb::borrow(plan);
    return nb::cast(Key(key));
}

// Learn torch_ops.py's description of torch, and keep all its objects alive. False: tensors cannot be read.
bool learn_torch(const nb::dict& torch, const nb::list& known) {
    const auto object = [&](const char* name) { return nb::handle(torch[name]).ptr(); };
    ArrayReader::Torch account{{},
                               nb::cast<uint64_t>(torch["plain"]),
                               nb::cast<uint64_t>(torch["tracked"]),
                               {},
                               object("forward_ad"),
                               object("is_grad_enabled"),
                               object("is_inference_mode_enabled"),
                               object("increment_version"),
                               object("get_num_threads"),
                               nb::cast<std::vector<uint16_t>>(torch["transform_keys"])};
    for (nb::handle type : nb::cast<nb::tuple>(torch["types"])) account.types.push_back(type.ptr());
    for (nb::handle question : nb::cast<nb::tuple>(torch["questions"])) account.questions.push_back(question.ptr());
    std::vector<TensorWords::Known> tensors;
    for (nb::handle x : known) {
        const auto t = nb::cast<nb::tuple>(x);
        const auto number = [&](size_t i) { return nb::cast<uint64_t>(t[i]); };
        tensors.push_back({reinterpret_cast<uintptr_t>(nb::handle(t[0]).ptr()), number(1), number(2), number(3),
                           number(4), number(5), nb::cast<bool>(t[6]), number(7), number(8)});
    }
    return reader.learn(account, tensors);
}

int number_of(const Threads& threads) {
    const int n = threads.torch ? reader.threads() : nb::cast<int>(threads.number());
    if (n < 0) throw nb::python_error();
    return n;
}

// The arrays that a plan writes besides its results: autograd raises their version counts.
void count_writes(const Plan& plan, PyObject* const* arrays) {
    using namespace rule_array;
    if (!plan.p.out_dense && !reader.count_write(arrays[STATE_IN])) throw nb::python_error();
    if (!reader.count_write(arrays[SNAPSHOTS])) throw nb::python_error();
}
void count_writes(const MixerPlan&, PyObject* const* arrays) {
    using namespace mixer_array;
    for (const size_t i : {CONV_STATE, STATE, CONV_SNAPSHOTS, SNAPSHOTS})
        if (!reader.count_write(arrays[i])) throw nb::python_error();
}
const Threads& threads_of(const Plan& plan) { return plan.threads; }
const Threads& threads_of(const MixerPlan& plan) { return plan.rule.threads; }

// A plan with the arrays of its call and its results (or None), both in the order of the table.
template <size_t count, auto run, class P>
void run_on_arrays(const P& plan, const nb::tuple& arrays, const nb::tuple& results) {
    PyObject* x[count];
    uintptr_t a[count];
    if (arrays.size() + results.size() != count) throw std::invalid_argument("anydelta._core: wrong number of arrays");
    for (size_t i = 0; i < count; ++i)
        x[i] =
            i < arrays.size() ? PyTuple_GET_ITEM(arrays.ptr(), i) : PyTuple_GET_ITEM(results.ptr(), i - arrays.size());
    for (size_t i = 0; i < count; ++i)
        if (!reader.address(x[i], a[i])) throw nb::python_error();
    const Threads& threads = threads_of(plan);
    const int n = number_of(threads);
    if (threads.torch) count_writes(plan, x);
    run(plan, n, threads.torch, a);
}
// The same with addresses, 0 for None, and a number of threads.
template <size_t count, auto run, class P>
void run_on_addresses(const P& plan, int threads, bool share_openmp, const nb::args& addresses) {
    uintptr_t a[count] = {};
    if (addresses.size() != count) throw std::invalid_argument("anydelta._core: wrong number of addresses");
    for (size_t i = 0; i < count; ++i) a[i] = nb::cast<uintptr_t>(addresses[i]);
    run(plan, threads, share_openmp, a);
}
constexpr auto run_rule = run_on_arrays<rule_array::COUNT, run_plan, Plan>;
constexpr auto run_rule_at = run_on_addresses<rule_array::COUNT, run_plan, Plan>;
constexpr auto run_mixer = run_on_arrays<mixer_array::COUNT, run_mixer_plan, MixerPlan>;
constexpr auto run_mixer_at = run_on_addresses<mixer_array::COUNT, run_mixer_plan, MixerPlan>;

// A mixer call on torch tensors that is repeated, as in a decode loop. It is checked and run in one call: between
// two of them the weights of a layer push everything else out of the caches, so every further Python object costs
// an access to memory.
class MixerStep {
  public:
    MixerStep(const MixerPlan& plan, const nb::args& arrays) : plan_(plan) {
        uintptr_t a[mixer_array::COUNT];
        if (!read(arrays, key_, a))
            throw std::invalid_argument("MixerStep: requires plain torch tensors and a call that is not watched");
    }
    // False: the arrays or the environment differ from those it was made with; nothing was read or written.
    bool run(const nb::args& arrays) const {
        static thread_local Key now;
        uintptr_t a[mixer_array::COUNT];
        if (!read(arrays, now, a) || !(now == key_)) return false;
        count_writes(plan_, &PyTuple_GET_ITEM(arrays.ptr(), 0));
        run_mixer_plan(plan_, number_of(plan_.rule.threads), true, a);
        return true;
    }

  private:
    MixerPlan plan_;
    Key key_;

    static bool read(const nb::args& arrays, Key& key, uintptr_t* a) {
        if (arrays.size() != mixer_array::COUNT) throw std::invalid_argument("MixerStep: wrong number of arrays");
        if (!reader.learned() || !reader.quiet()) return false;
        begin(key);
        ArrayReader::Seen seen;
        for (size_t i = 0; i < mixer_array::COUNT; ++i)
            if (!reader.describe_tensor(PyTuple_GET_ITEM(arrays.ptr(), i), key, a[i], seen)) return false;
        return reader.settle(seen, key);
    }
};

// Whether `count` contiguous index numbers are -1 or rows of [0, P), each once if `unique`. False too if the array
// cannot be read here.
bool rows_fit(nb::handle rows, bool is_int32, int64_t count, int64_t P, bool unique) {
    uintptr_t address;
    if (reader.is_tensor(rows.ptr()) && !reader.plain(rows.ptr())) return false;
    if (!reader.address(rows.ptr(), address)) {
        PyErr_Clear();
        return false;
    }
    std::vector<int64_t> found = widen(address, count, is_int32);
    for (const int64_t row : found)
        if (row < -1 || row >= P) return false;
    if (!unique) return true;
    std::sort(found.begin(), found.end());
    for (size_t i = 1; i < found.size(); ++i)
        if (found[i] >= 0 && found[i] == found[i - 1]) return false;
    return true;
}

// The log form (log.h): verify the tokens of a call, or fold entries into the states. `plan` describes the rule and
// the states; `out` has the strides of `state`. Index arrays are int64.
void run_log(const Plan& plan, bool fold_entries, int64_t capacity, int key_dtype, const nb::args& arrays) {
    enum {
        Q,
        KEY,
        VALUE,
        G,
        BETA,
        O,
        STATE,
        OUT,
        A_LOG,
        DT_BIAS,
        MASK,
        CU,
        BASE,
        KEYS,
        FACTORS,
        DELTAS,
        DECAYS,
        PARENTS,
        ROWS,
        USED,
        FOLDS,
        OUT_ROWS,
        COUNT
    };
    uintptr_t a[COUNT] = {};
    if (arrays.size() != COUNT) throw std::invalid_argument("run_log: wrong number of arrays");
    for (size_t i = 0; i < COUNT; ++i) a[i] = address_of(arrays[i]);
    Log g;
    g.rule = plan.p;
    g.capacity = capacity;
    Problem& p = g.rule;
    p.q.data = at(a[Q]);
    p.k.data = at(a[KEY]);
    p.v.data = at(a[VALUE]);
    p.g.data = at(a[G]);
    p.beta.data = at(a[BETA]);
    p.o.data = at(a[O]);
    p.in.data = at(a[STATE]);
    p.out = p.in;
    p.out.data = at(a[OUT]);
    p.A_log = at(a[A_LOG]);
    p.dt_bias = at(a[DT_BIAS]);
    p.mask = static_cast<const uint8_t*>(at(a[MASK]));
    p.cu_seqlens = static_cast<const int64_t*>(at(a[CU]));
    p.state_indices = static_cast<const int64_t*>(at(a[BASE]));
    g.key_dtype = static_cast<DType>(key_dtype);
    g.keys = at(a[KEYS]);
    g.factors = static_cast<float*>(at(a[FACTORS]));
    g.deltas = static_cast<float*>(at(a[DELTAS]));
    g.decays = static_cast<float*>(at(a[DECAYS]));
    g.parents = static_cast<const int64_t*>(at(a[PARENTS]));
    g.rows = static_cast<const int64_t*>(at(a[ROWS]));
    g.used = static_cast<const int64_t*>(at(a[USED]));
    g.folds = static_cast<const int64_t*>(at(a[FOLDS]));
    g.out_rows = static_cast<const int64_t*>(at(a[OUT_ROWS]));
    const int threads = number_of(plan.threads);
    nb::gil_scoped_release unlocked;
    if (fold_entries)
        fold(g, chosen(), threads, plan.threads.torch);
    else
        verify(g, chosen(), threads, plan.threads.torch);
}

// Gradients of the plan's call (backward.h). `grads`: first those that are written, of q, k, v, g, beta and erase, of
// the initial state, A_log and dt_bias (dense, float32); then those of o and of the final state. `fields`: the
// geometry by name of the gradients of tokens, o and final state. Returns the bytes that it allocated.
size_t run_backward(const Plan& plan, const nb::dict& fields, const nb::tuple& arrays, const nb::tuple& grads) {
    using namespace rule_array;
    uintptr_t a[COUNT];
    if (arrays.size() != COUNT) throw std::invalid_argument("run_backward: wrong number of arrays");
    for (size_t i = 0; i < COUNT; ++i) a[i] = address_of(arrays[i]);
    Backward g;
    g.rule = plan.p;
    Problem& p = g.rule;
#define ANYDELTA_TAKE(name, place, ...) p.name.data = at(a[place]);
    ANYDELTA_TOKENS(ANYDELTA_TAKE)
#undef ANYDELTA_TAKE
    p.in.data = at(a[STATE_IN]);
    p.A_log = at(a[A_LOG]);
    p.dt_bias = at(a[DT_BIAS]);
    p.mask = static_cast<const uint8_t*>(at(a[MASK]));
    Indices indices;
    indices.widen_into(p, plan, a[CU_SEQLENS], a[STATE_INDICES], 0);
    g.d_o = tokens(fields, "o");
    g.d_final = states(fields, "state");
    Tokens* const written[] = {&g.d_q, &g.d_k, &g.d_v, &g.d_g, &g.d_beta, &g.d_erase};
    const char* const names[] = {"q", "k", "v", "g", "beta", "erase"};
    for (size_t i = 0; i < 6; ++i) {
        *written[i] = tokens(fields, names[i]);
        written[i]->data = at(address_of(grads[i]));
    }
    g.d_initial = static_cast<float*>(at(address_of(grads[6])));
    g.d_A_log = static_cast<float*>(at(address_of(grads[7])));
    g.d_dt_bias = static_cast<float*>(at(address_of(grads[8])));
    g.d_o.data = at(address_of(grads[9]));
    g.d_final.data = at(address_of(grads[10]));
    const int threads = number_of(plan.threads);
    nb::gil_scoped_release unlocked;
    return differentiate(g, chosen(), threads, plan.threads.torch);
}

// The same for the mixer. `arrays` in the order of the table. `grads` by name: those of the inputs, which are
// written, and of the outputs, "d_o", "d_conv_state" and "d_state"; 0 or None if absent. `fields`: the geometry of
// the gradients of tokens and of the outputs.
size_t run_mixer_backward(const MixerPlan& plan, const nb::dict& fields, const nb::tuple& arrays,
                          const nb::dict& grads) {
    uintptr_t a[mixer_array::COUNT] = {};
    if (arrays.size() != mixer_array::COUNT) throw std::invalid_argument("run_mixer_backward: wrong number of arrays");
    for (size_t i = 0; i < mixer_array::COUNT; ++i) a[i] = address_of(arrays[i]);
    Indices indices;
    AroundBackward around;
    around.m = mixer_on(plan, a, indices);
    const auto of = [&](const char* name) { return at(address_of(grads[name])); };
    const auto rows = [&](const char* name, const char* at) {
        GroupedTokens x = grouped_tokens(fields, at);
        x.data = of(name);
        return x;
    };
    const auto numbers = [&](const char* name) { return static_cast<float*>(of(name)); };
    around.d_o = rows("d_o", "o");
    around.d_q = rows("qkv", "q");
    around.d_k = rows("k", "k");
    around.d_v = rows("v", "v");
    if (!around.d_k.data) unpack(around.m.rule, around.d_q, around.d_k, around.d_v);
    around.d_z = rows("z", "z");
    around.d_final = windows(fields, "conv_state");
    around.d_final.data = of("d_conv_state");
    around.d_conv = numbers("conv_state");
    around.d_weight = numbers("conv_weight");
    around.d_bias = numbers("conv_bias");
    around.d_norm = numbers("norm_weight");
    Backward g;
    g.rule = around.m.rule;
    g.mixer = &around;
    g.d_final = states(fields, "state");
    g.d_final.data = of("d_state");
    for (auto [to, name] : {std::pair{&g.d_g, "g"}, std::pair{&g.d_beta, "beta"}}) {
        *to = tokens(fields, name);
        to->data = of(name);
    }
    g.d_initial = numbers("state");
    g.d_A_log = numbers("A_log");
    g.d_dt_bias = numbers("dt_bias");
    const int threads = number_of(plan.rule.threads);
    nb::gil_scoped_release unlocked;
    return differentiate(g, chosen(), threads, plan.rule.threads.torch);
}

}  // namespace

NB_MODULE(_core, m) {
    // A model that lives until the interpreter ends keeps its plans until then. nanobind must not
    // report them as leaks.
    nb::set_leak_warnings(false);
    nb::register_exception_translator([](const std::exception_ptr& error, void*) {
        try {
            std::rethrow_exception(error);
        } catch (const std::bad_alloc&) {
            PyErr_SetString(PyExc_MemoryError, OUT_OF_MEMORY);
        }
    });
    nb::class_<Key>(m, "Key", "The key of a call's arrays and environment.");
    m.def("find_plan", &find_plan, nb::arg("arrays"), nb::arg("rest"), nb::arg("text").none() = nb::none());
    m.def("keep_plan", [](const Key& key, nb::tuple rest, nb::object plan) { plans.keep(key, rest, plan); });
    m.def("forget_plans", [] { plans.forget(); });
    m.def("count_plans", [] { return plans.count(); });
    // threads: a function that returns their number, or None for torch's
    nb::class_<Plan>(m, "Plan")
        .def(
            "__init__",
            [](Plan* self, const nb::dict& d, const nb::object& threads) { new (self) Plan(make_plan(d, threads)); },
            nb::arg("fields"), nb::arg("threads").none())
        .def("run", run_rule)
        .def("run_at", run_rule_at);
    nb::class_<MixerPlan>(m, "MixerPlan")
        .def(
            "__init__",
            [](MixerPlan* self, const nb::dict& rule, const nb::dict& d, const nb::object& threads) {
                new (self) MixerPlan(make_mixer_plan(rule, d, threads));
            },
            nb::arg("rule"), nb::arg("fields"), nb::arg("threads").none())
        .def("run", run_mixer)
        .def("run_at", run_mixer_at);
    nb::class_<MixerStep>(m, "MixerStep")
        .def("__init__",
             [](MixerStep* self, const MixerPlan& plan, const nb::args& arrays) { new (self) MixerStep(plan, arrays); })
        .def("run", &MixerStep::run);
    m.attr("max_taps") = MAX_TAPS;
    m.def("rows_fit", &rows_fit, "Whether index numbers are -1 or rows of a pool, each once if they must be.");
    m.def("run_log", &run_log);
    m.def("run_backward", &run_backward);
    m.def("run_mixer_backward", &run_mixer_backward);
    m.def("learn_torch", &learn_torch);
    m.def("reads_torch", [] { return reader.learned(); }, "Whether torch tensors are read here.");
    m.def("quiet", [] { return reader.quiet(); }, "Whether no tracer, mode, transform or dual level watches.");
    m.def(
        "plain", [](nb::handle x) { return reader.plain(x.ptr()); },
        "Whether a torch tensor is plain memory with a dtype, a shape and strides.");
    m.def(
        "alone",
        [](const nb::tuple& held, size_t i) {
            return i < held.size() && reader.alone(PyTuple_GET_ITEM(held.ptr(), static_cast<Py_ssize_t>(i)));
        },
        "Whether only this tuple holds its tensor `i`, and only that tensor its memory.");
    m.def(
        "isas",
        [] {
            std::vector<std::string> names;
            for (const Kernels* k : runnable()) names.push_back(k->name);
            return names;
        },
        "Builds that this CPU can run, slowest first.");
    m.def("isa", [] { return std::string(chosen().name); }, "The build that runs calls.");
    m.def("set_isa", &choose);
    m.def("lanes", [] { return chosen().lanes; });
    m.def("fill_scratch", &fill_scratch,
          "Fill the scratch memory with this byte before each task; -1 does not. For tests.");
    m.def("calls", &calls, "How often the kernels were called.");
    m.def(
        "runner", [] { return reinterpret_cast<uintptr_t>(&run_for_torch); },
        "The address that anydelta_torch calls in this process.");
    m.def(
        "share_threads_of",
        [](uintptr_t parallel) { share_threads_of(reinterpret_cast<void (*)(int, void (*)(void*), void*)>(parallel)); },
        "Run on the threads behind this address if no OpenMP runtime is found.");
    m.def("last_isa", &last_isa, "The build that ran the latest task, by the name compiled into it.");
    m.def("cpu_features", &cpu_features);
    m.def("thread_provider", [](bool share_openmp) { return std::string(thread_provider(share_openmp)); });
    m.def(
        "fma_peak",
        [](int threads, double seconds) {
            nb::gil_scoped_release unlocked;
            return fma_peak(chosen(), threads, seconds);
        },
        nb::arg("threads"), nb::arg("seconds"), "GFLOP/s of register-only FMAs of the chosen ISA.");
    m.def(
        "copy_bandwidth",
        [](int threads, int mib) {
            nb::gil_scoped_release unlocked;
            return copy_bandwidth(threads, mib);
        },
        nb::arg("threads"), nb::arg("mib"), "GB/s, read + written, of memcpy between buffers of `mib` MiB.");
    bind_ggml(m);
}
