#include "spec.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>

namespace anydelta {
namespace {

using Dims = std::vector<int64_t>;

// Sizes whose numbers are stored elsewhere: checking a valid call allocates nothing.
struct Sizes {
    const int64_t* first;
    size_t count;

    Sizes(std::initializer_list<int64_t> x) : Sizes(x.begin(), x.size()) {}  // for one expression
    Sizes(const int64_t* x, size_t n) : first(x), count(n) {}
    Sizes(const Dims& x) : first(x.data()), count(x.size()) {}
    Sizes(const Array& x) : first(x.sizes), count(static_cast<size_t>(std::max(x.dims, 0))) {}
    const int64_t* begin() const { return first; }
    const int64_t* end() const { return first + count; }
    bool operator==(const Sizes& x) const { return std::equal(begin(), end(), x.begin(), x.end()); }
};

std::string text(Sizes dims, char open = '[', char close = ']') {
    std::string s(1, open);
    for (size_t i = 0; i < dims.count; ++i) s += (i ? ", " : "") + std::to_string(dims.first[i]);
    if (open == '(' && dims.count == 1) s += ',';
    return s + close;
}

// As Python prints a float: the fewest digits that read back as the same number.
std::string text(double x) {
    if (std::isnan(x)) return "nan";
    if (std::isinf(x)) return x > 0 ? "inf" : "-inf";
    char s[40];
    for (int digits = 1; digits <= 17; ++digits) {
        std::snprintf(s, sizeof s, "%.*e", digits - 1, x);
        if (std::strtod(s, nullptr) == x) break;
    }
    const int exponent = std::atoi(std::string(s).substr(std::string(s).find('e') + 1).c_str());
    if (x != 0 && (exponent < -4 || exponent >= 16)) return s;
    for (int places = 1; places <= 25; ++places) {
        std::snprintf(s, sizeof s, "%.*f", places, x);
        if (std::strtod(s, nullptr) == x) break;
    }
    return s;
}

const char* name_of(Type t, const char* other = nullptr) {
    switch (t) {
        case Type::f32: return "float32";
        case Type::bf16: return "bfloat16";
        case Type::f16: return "float16";
        case Type::f64: return "float64";
        case Type::i32: return "int32";
        case Type::i64: return "int64";
        case Type::boolean: return "bool";
        case Type::other: break;
    }
    return other ? other : "another type";
}

const char* name_of(const Array& x) { return name_of(x.type, x.type_name); }

class Checker {
  public:
    explicit Checker(const char* op) : op_(op) {}

    [[noreturn]] void fail(const std::string& what) const {
        throw std::invalid_argument(std::string(op_) + ": " + what);
    }

    void type(const char* name, const Array& x, std::initializer_list<Type> allowed) const {
        std::string names;
        for (Type t : allowed) {
            if (x.type == t) return;
            names += (names.empty() ? "" : " or ") + std::string(name_of(t));
        }
        fail(std::string(name) + " must have dtype " + names + "; got " + name_of(x));
    }
    void shape(const char* name, const Array& x, Sizes want, const char* legend) const {
        if (x.given() && want == x) return;
        fail(std::string(name) + " must be " + legend + " = " + text(want) + "; got " + text(x));
    }
    // Check an option by its row in the table of arguments.
    void option(const char*, bool, std::initializer_list<int>) const {}
    void option(const char* name, const std::string& value, std::initializer_list<const char*> allowed) const {
        std::string names;
        for (const char* a : allowed) {
            if (value == a) return;
            names += (names.empty() ? "'" : ", '") + std::string(a) + "'";
        }
        fail(std::string(name) + " must be one of " + names + "; got '" + value + "'");
    }
    struct Range {
        double minimum, maximum;
        const char* why;
    };
    void option(const char* name, double value, const Range& allowed) const {
        if (value >= allowed.minimum && value <= std::min(allowed.maximum, 3.4028234663852886e38)) return;
        char limit[24];
        const auto bound = [&](double x) { return std::snprintf(limit, sizeof limit, "%g", x), limit; };
        const std::string must = std::string(name) + " must be ";
        if (!(std::abs(value) <= 3.4028234663852886e38)) fail(must + "finite in float32; got " + text(value));
        if (value < allowed.minimum) fail(must + ">= " + bound(allowed.minimum) + "; got " + text(value));
        if (value > allowed.maximum) fail(must + "<= " + bound(allowed.maximum) + allowed.why + "; got " + text(value));
    }
    void option(const char* name, const std::optional<double>& value, const Range& allowed) const {
        if (value) option(name, *value, allowed);
    }
    // Tensors have no such size, but a host that describes an array by hand may.
    void not_negative(const char* name, const Array& x) const {
        for (int i = 0; x.given() && i < x.dims; ++i)
            if (x.sizes[i] < 0) fail(std::string(name) + " must have sizes >= 0; got " + text(x));
    }
    // As spec.py's `sizes`: an array that exists or that a call implies; a size of 0 counts as 1.
    void sizes(const char* name, Sizes dims) const {
        int64_t left = MAX_NUMBERS;
        for (int64_t n : dims) left /= std::max<int64_t>(n, 1);
        if (left < 1)
            fail(std::string(name) + " must have at most 2^48 numbers (a size of 0 counts as 1); got " + text(dims));
    }
    // Each element has its own memory: an axis must step over all that the finer axes span. No memory
    // spans FAR elements.
    void writable(const char* name, const Array& x) const {
        constexpr int64_t FAR = int64_t{1} << 62;
        std::array<std::pair<int64_t, int64_t>, 5> axes;  // (stride, size); snapshots have most
        auto end = axes.begin();
        for (int i = 0; i < x.dims; ++i) {
            if (x.sizes[i] == 0) return;
            if (x.sizes[i] > 1) *end++ = {std::abs(std::max(x.strides[i], -FAR)), x.sizes[i]};
        }
        std::sort(axes.begin(), end);
        int64_t reach = 0;
        for (auto axis = axes.begin(); axis != end; ++axis) {
            const auto [stride, n] = *axis;
            if (stride <= reach)
                fail(std::string(name) +
                     " is written and must not be a view whose elements share memory; got strides " +
                     text(Sizes(x.strides, static_cast<size_t>(x.dims))) + " for " + text(x) + ". Copy it first");
            reach = stride > (FAR - reach) / (n - 1) ? FAR : reach + stride * (n - 1);
        }
    }

  private:
    const char* op_;
};

constexpr std::initializer_list<Type> FLOATS = {Type::f32, Type::bf16, Type::f16, Type::f64};
constexpr std::initializer_list<Type> INDICES = {Type::i32, Type::i64};

bool is(const Array& x, std::initializer_list<int64_t> sizes) {
    return x.dims == static_cast<int>(sizes.size()) && std::equal(sizes.begin(), sizes.end(), x.sizes);
}

std::string quoted(const std::string& s) { return "'" + s + "'"; }

// A_log [HV] and dt_bias [HV], or [HV, K] / [HV*K] for KDA, belong to raw gates and only there.
void check_raw(const Checker& c, const Call& call, const Options& opt, bool kda, int64_t HV, int64_t K) {
    if (opt.decay != "raw") {
        for (auto [name, x] : {std::pair{"A_log", &call.A_log}, std::pair{"dt_bias", &call.dt_bias}})
            if (x->given()) c.fail(std::string(name) + " goes with decay=\"raw\" only; got decay=" + quoted(opt.decay));
        return;
    }
    if (call.A_log.given()) {
        c.type("A_log", call.A_log, FLOATS);
        c.shape("A_log", call.A_log, {HV}, "[HV]");
    } else if (!opt.lower_bound) {
        c.fail("decay=\"raw\" requires A_log [HV], or a lower_bound; got None");
    }
    if (!call.dt_bias.given()) return;
    c.type("dt_bias", call.dt_bias, FLOATS);
    if (kda ? !is(call.dt_bias, {HV, K}) && !is(call.dt_bias, {HV * K}) : !is(call.dt_bias, {HV}))
        c.fail(std::string("dt_bias must be ") + (kda ? "[HV, K] or [HV * K]" : "[HV]") + "; got " +
               text(call.dt_bias) + " with HV = " + std::to_string(HV) + ", K = " + std::to_string(K));
}

// cu_seqlens [N+1] of integers with B = 1. Returns N.
int64_t check_sequences(const Checker& c, const Call& call, int64_t B) {
    const Array& cu = call.cu_seqlens;
    if (!cu.given()) return B;
    c.type("cu_seqlens", cu, INDICES);
    if (cu.dims != 1 || cu.sizes[0] < 1) c.fail("cu_seqlens must be [N+1]; got " + text(cu));
    if (B != 1) c.fail("cu_seqlens packs all sequences into one row and requires B = 1; got B = " + std::to_string(B));
    return cu.sizes[0] - 1;
}

// state [N or P, HV, K, V], state_indices [N], snapshots [Ks, N, HV, K, V]; sets P and state_type.
void check_state(const Checker& c, const Call& call, const Options& opt, Spec& s) {
    const char* layout = s.vk ? "V, K" : "K, V";
    const std::string name = opt.inplace ? "state" : "initial_state";
    const std::array<int64_t, 4> all = {s.N, s.HV, s.vk ? s.V : s.K, s.vk ? s.K : s.V};
    const Sizes tail(all.data() + 1, 3);
    const bool f64 = call.q.type == Type::f64;
    const auto type = [&](const char* who, const Array& x) {
        f64 ? c.type(who, x, {Type::f64}) : c.type(who, x, {Type::f32, Type::bf16, Type::f16});
    };
    const auto rows = [&](const Array& x, int skip) { return std::equal(tail.begin(), tail.end(), x.sizes + skip); };
    s.P = s.N;
    s.state_type = f64 ? Type::f64 : Type::f32;
    if (call.state_indices.given()) {
        if (!call.state.given()) c.fail("state_indices point into a state pool and require " + name + "; got None");
        c.type("state_indices", call.state_indices, INDICES);
        c.shape("state_indices", call.state_indices, {s.N}, "[N]");
    }
    if (opt.inplace && !call.state.given()) c.fail("state must be an array that the op advances in place; got None");
    if (call.state.given()) {
        const Array& x = call.state;
        if (x.dims != 4 || !rows(x, 1))
            c.fail(name + " must be [N, HV, " + layout + "] with [HV, " + layout + "] = " + text(tail) + "; got " +
                   text(x));
        if (!call.state_indices.given() && x.sizes[0] != s.N)
            c.fail(name + " must have N = " + std::to_string(s.N) + " rows, one per sequence; got " +
                   std::to_string(x.sizes[0]) + ". For a pool give state_indices");
        s.P = x.sizes[0];
        c.sizes(name.c_str(), x);
        type(name.c_str(), x);
        s.state_type = x.type;
        if (opt.inplace) c.writable(name.c_str(), x);
    }
    if (call.snapshots.given()) {
        const Array& x = call.snapshots;
        if (x.dims != 5 || x.sizes[1] != s.N || !rows(x, 2) || x.sizes[0] < 1) {
            c.fail(std::string("snapshots must be [Ks, N, HV, ") + layout + "] with Ks >= 1 and [N, HV, " + layout +
                   "] = " + text(Sizes(all.data(), all.size())) + "; got " + text(x));
        }
        c.sizes("snapshots", x);
        type("snapshots", x);
        if (call.state.given() && x.type != s.state_type)
            c.fail("snapshots must have " + name + "'s dtype " + name_of(s.state_type) + "; got " + name_of(x.type));
        s.state_type = x.type;
        c.writable("snapshots", x);
    }
}

// Index arrays of one or two dimensions as int64: they are small, and the kernels then know one type.
std::vector<int64_t> widen(const Array& x) {
    const int64_t columns = x.dims == 2 ? x.sizes[1] : 1, count = x.sizes[0] * columns;
    std::vector<int64_t> out(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) {
        const int64_t at = i / columns * x.strides[0] + (x.dims == 2 ? i % columns * x.strides[1] : 0);
        out[static_cast<size_t>(i)] =
            x.type == Type::i32 ? static_cast<const int32_t*>(x.data)[at] : static_cast<const int64_t*>(x.data)[at];
    }
    return out;
}

DType dtype(Type t) { return t == Type::f32 ? DType::f32 : t == Type::bf16 ? DType::bf16 : DType::f16; }

Tokens tokens(const Array& x) {
    if (!x.given()) return {};
    return Tokens{x.data, dtype(x.type), x.strides[0], x.strides[1], x.strides[2], x.sizes[2]};
}

// snapshot_indices [Ks, N] into the rows of the in-place op's pool.
void check_snapshot_indices(const Checker& c, const Call& call, const Options& opt, int64_t N) {
    const Array& x = call.snapshot_indices;
    if (!opt.inplace) c.fail("snapshot_indices name rows of a pool that is written and go with gated_delta_rule_ only");
    if (!call.state_indices.given()) c.fail("snapshot_indices name rows of a pool and require state_indices; got None");
    c.type("snapshot_indices", x, INDICES);
    if (x.dims != 2 || x.sizes[0] < 1 || x.sizes[1] != N)
        c.fail("snapshot_indices must be [Ks, N] with Ks >= 1 and N = " + std::to_string(N) + "; got " + text(x));
    if (call.snapshots.given() && x.sizes[0] != 1)
        c.fail("snapshot_indices must be [1, N], rows for the final states, where snapshots take the others; got " +
               text(x));
}

// No row may be written twice, nor written for one sequence and read by another. Rows that are read may repeat.
void check_snapshot_rows(const Checker& c, const Call& call, const Spec& s) {
    constexpr int64_t NOBODY = -1, SEVERAL = -2;
    const auto read = widen(call.state_indices), into = widen(call.snapshot_indices);
    const auto cu = call.cu_seqlens.given() ? widen(call.cu_seqlens) : Dims{};
    std::vector<int64_t> reader(static_cast<size_t>(s.P), NOBODY);
    for (int64_t n = 0; n < s.N; ++n)
        if (const int64_t row = read[static_cast<size_t>(n)]; row >= 0) {
            int64_t& who = reader[static_cast<size_t>(row)];
            who = who == NOBODY ? n : SEVERAL;
        }
    std::vector<bool> written(static_cast<size_t>(s.P));
    for (size_t i = 0; i < into.size(); ++i) {
        const auto n = static_cast<int64_t>(i) % s.N, slot = static_cast<int64_t>(i) / s.N, row = into[i];
        const auto at = static_cast<size_t>(n);
        if (row == -1 || read[at] == -1 || slot >= (cu.empty() ? s.T : cu[at + 1] - cu[at])) continue;  // not written
        if (row < 0 || row >= s.P)
            c.fail("snapshot_indices must be -1 (write nothing) or in [0, P) with P = " + std::to_string(s.P) +
                   "; got " + std::to_string(row));
        const auto r = static_cast<size_t>(row);
        if (written[r]) c.fail("snapshot_indices must be unique; got " + std::to_string(row) + " more than once");
        if (reader[r] != NOBODY && reader[r] != n)
            c.fail("snapshot_indices must not name a row that another sequence reads; got " + std::to_string(row));
        written[r] = true;
    }
}

}  // namespace

Spec check(const Call& call, const Options& opt) {
    const Checker c(opt.op);
#define ANYDELTA_CHECK(kind, name, value, ...) c.option(#name, opt.name, {__VA_ARGS__});
    ANYDELTA_OPTIONS(ANYDELTA_CHECK)
#undef ANYDELTA_CHECK
    if (opt.lower_bound && opt.decay != "raw")
        c.fail("lower_bound goes with decay=\"raw\" only; got decay=" + quoted(opt.decay));

#define ANYDELTA_SIZES(member, place, functional, in_place) \
    c.not_negative(opt.inplace ? in_place : functional, call.member);
    ANYDELTA_ARRAYS(ANYDELTA_SIZES)
#undef ANYDELTA_SIZES
    for (auto [name, x] : {std::pair{"q", &call.q}, std::pair{"k", &call.k}, std::pair{"v", &call.v},
                           std::pair{"g", &call.g}, std::pair{"beta", &call.beta}})
        if (!x->given() && !(x == &call.beta && call.erase.given()))
            c.fail(std::string(name) + " must be a torch.Tensor or a numpy.ndarray; got NoneType");
    if (call.erase.given() && (call.beta.given() || opt.beta_is_logit))
        c.fail(
            std::string("beta must be None with erase, and beta_is_logit False: d = v - S^T erase has no other write "
                        "strength; got ") +
            (call.beta.given() ? "beta" : "beta_is_logit=True") + ". Multiply v and erase by it");

    // q, k [B, T, H, K]; v [B, T, HV, V]
    c.type("q", call.q, FLOATS);
    for (auto [name, x] : {std::pair{"q", &call.q}, std::pair{"k", &call.k}, std::pair{"v", &call.v}}) {
        if (x->dims != 4)
            c.fail(std::string(name) + " must be " + (x == &call.v ? "[B, T, HV, V]" : "[B, T, H, K]") + "; got " +
                   text(*x));
        c.type(name, *x, FLOATS);
        if (x->type != call.q.type)
            c.fail(std::string("q, k and v must share a dtype; got ") + name_of(call.q.type) + " for q and " +
                   name_of(x->type) + " for " + name);
    }
    Spec s{};
    s.B = call.q.sizes[0], s.T = call.q.sizes[1], s.H = call.q.sizes[2], s.K = call.q.sizes[3];
    s.HV = call.v.sizes[2], s.V = call.v.sizes[3];
    s.vk = opt.state_layout == "vk";
    const auto n = [](int64_t x) { return std::to_string(x); };
    if (std::min({s.H, s.K, s.HV, s.V}) < 1)
        c.fail("q and v must have at least one head and one channel; got H=" + n(s.H) + " K=" + n(s.K) +
               " HV=" + n(s.HV) + " V=" + n(s.V));
    if (!is(call.k, {s.B, s.T, s.H, s.K})) c.shape("k", call.k, {s.B, s.T, s.H, s.K}, "[B, T, H, K] as q");
    if (!is(call.v, {s.B, s.T, s.HV, s.V}))
        c.shape("v", call.v, {s.B, s.T, s.HV, s.V}, "[B, T, HV, V] with q's B and T");
    if (s.HV % s.H)
        c.fail("v must have a multiple of q's heads (HV a multiple of H); got HV=" + n(s.HV) + ", H=" + n(s.H));

    // g [B, T, HV] (GDA) or [B, T, HV, K] (KDA); beta [B, T, HV] or erase [B, T, H or HV, K]
    s.kda = is(call.g, {s.B, s.T, s.HV, s.K});
    if (!s.kda && !is(call.g, {s.B, s.T, s.HV}))
        c.fail("g must be [B, T, HV] or [B, T, HV, K]; got " + text(call.g, '(', ')') + " with B = " + n(s.B) +
               ", T = " + n(s.T) + ", HV = " + n(s.HV) + ", K = " + n(s.K));
    if (!call.erase.given())
        c.shape("beta", call.beta, {s.B, s.T, s.HV}, "[B, T, HV]");
    else if (!is(call.erase, {s.B, s.T, s.H, s.K}) && !is(call.erase, {s.B, s.T, s.HV, s.K}))
        c.fail("erase must be [B, T, H, K] or [B, T, HV, K]; got " + text(call.erase, '(', ')') +
               " with B = " + n(s.B) + ", T = " + n(s.T) + ", H = " + n(s.H) + ", HV = " + n(s.HV) + ", K = " + n(s.K));
    c.type("g", call.g, FLOATS);
    if (call.erase.given())
        c.type("erase", call.erase, {call.q.type});
    else
        c.type("beta", call.beta, FLOATS);

    c.sizes("q", {s.B, s.T, s.H, s.K});
    c.sizes("v", {s.B, s.T, s.HV, s.V});
    c.sizes("g", call.g);
    if (call.erase.given()) c.sizes("erase", call.erase);
    check_raw(c, call, opt, s.kda, s.HV, s.K);
    s.N = check_sequences(c, call, s.B);
    c.sizes("the state [N, HV, K, V]", {s.N, s.HV, s.K, s.V});
    check_state(c, call, opt, s);
    if (call.snapshot_indices.given()) check_snapshot_indices(c, call, opt, s.N);
    if (call.mask.given()) {
        c.type("mask", call.mask, {Type::boolean});
        c.shape("mask", call.mask, {s.B, s.T}, "[B, T]");
    }
    return s;
}

void check_values(const Call& call, const Options& opt, const Spec& s) {
    const Checker c(opt.op);
    if (call.cu_seqlens.given()) {
        const auto cu = widen(call.cu_seqlens);
        if (cu.front() != 0 || cu.back() != s.T)
            c.fail("cu_seqlens must start at 0 and end at T = " + std::to_string(s.T) + "; got " +
                   std::to_string(cu.front()) + " and " + std::to_string(cu.back()));
        if (!std::is_sorted(cu.begin(), cu.end()))
            c.fail("cu_seqlens must not decrease; got " + (cu.size() <= 16 ? text(cu) : "..."));
    }
    if (call.state_indices.given()) {
        auto rows = widen(call.state_indices);
        rows.erase(std::remove(rows.begin(), rows.end(), -1), rows.end());
        if (rows.empty()) return;  // nothing is read or written
        const int64_t low = *std::min_element(rows.begin(), rows.end()),
                      high = *std::max_element(rows.begin(), rows.end());
        if (low < 0 || high >= s.P)
            c.fail("state_indices must be -1 (skip) or in [0, P) with P = " + std::to_string(s.P) + "; got " +
                   std::to_string(low < 0 ? low : high));
        if (call.snapshot_indices.given()) return check_snapshot_rows(c, call, s);
        if (!opt.inplace) return;  // nothing is written to the pool
        auto sorted = rows;
        std::sort(sorted.begin(), sorted.end());
        if (std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end()) return;
        for (int64_t r : rows)
            if (std::count(rows.begin(), rows.end(), r) > 1)
                c.fail("state_indices must be unique apart from -1; got " + std::to_string(r) + " more than once");
    }
}

void prepare(const Call& call, const Options& opt, const Spec& s, Prepared& out) {
    Problem& p = out.problem;
    p.B = s.B, p.T = s.T, p.H = s.H, p.HV = s.HV, p.K = s.K, p.V = s.V, p.N = s.N;
    p.kda = s.kda, p.vk = s.vk, p.tiled = opt.heads == "tiled";
#define ANYDELTA_TAKE(type, name) p.name = static_cast<type>(opt.name);
    ANYDELTA_PLAIN_OPTIONS(ANYDELTA_TAKE)
#undef ANYDELTA_TAKE
    p.has_lower_bound = opt.lower_bound.has_value(), p.lower_bound = static_cast<float>(opt.lower_bound.value_or(0));
    p.decay = opt.decay == "log" ? Decay::log : opt.decay == "linear" ? Decay::linear : Decay::raw;
    p.scale = static_cast<float>(opt.scale.value_or(std::pow(static_cast<double>(s.K), -0.5)));
#define ANYDELTA_TAKE(name, ...) p.name = tokens(call.name);
    ANYDELTA_TOKENS(ANYDELTA_TAKE)
#undef ANYDELTA_TAKE
    p.o = Tokens{call.o, p.v.dtype, s.T * s.HV * s.V, s.HV * s.V, s.V, s.HV};
    if (call.A_log.given()) p.A_log = call.A_log.data, p.A_log_dtype = dtype(call.A_log.type);
    if (call.dt_bias.given()) p.dt_bias = call.dt_bias.data, p.dt_bias_dtype = dtype(call.dt_bias.type);
    if (call.mask.given()) {
        p.mask = static_cast<const uint8_t*>(call.mask.data);
        p.mask_b = call.mask.strides[0], p.mask_t = call.mask.strides[1];
    }
    const int64_t rows = s.vk ? s.V : s.K, columns = s.vk ? s.K : s.V;
    const States dense{nullptr, s.HV * rows * columns, rows * columns, columns, 0};
    p.state_dtype = dtype(s.state_type);
    p.in = p.out = p.snapshots = dense;
    if (call.state.given()) {
        const int64_t* st = call.state.strides;
        p.in = States{call.state.data, st[0], st[1], st[2], 0};
    }
    if (opt.inplace)
        p.out = p.in;
    else
        p.out.data = call.state_out, p.out_dense = true;
    if (call.snapshots.given()) {
        const int64_t* st = call.snapshots.strides;
        p.snapshots = States{call.snapshots.data, st[1], st[2], st[3], st[0]};
        p.Ks = call.snapshots.sizes[0];
    }
    if (call.cu_seqlens.given()) {
        out.cu_seqlens = widen(call.cu_seqlens);
        p.cu_seqlens = out.cu_seqlens.data();
    }
    if (call.state_indices.given()) {
        out.state_indices = widen(call.state_indices);
        p.state_indices = out.state_indices.data();
    }
    if (call.snapshot_indices.given()) {
        out.snapshot_indices = widen(call.snapshot_indices);
        if (call.snapshots.given()) {
            p.out_rows = out.snapshot_indices.data();
            return;
        }
        // only these rows of the pool are written
        p.snapshot_indices = out.snapshot_indices.data();
        p.snapshots = p.in;
        p.Ks = call.snapshot_indices.sizes[0];
        p.out.data = nullptr;
    }
}

}  // namespace anydelta
