// The log's kernels of every instruction set, on any rounds of verifying, taking back and folding: outputs as if each token
// had run on the state, states right after a fold, nothing written but the new entries, the same bits by two threads.
#include "fuzz.h"
#include "log.h"

namespace anydelta::tests {
namespace {

using State = std::vector<Bounded>;  // [K, V]

// N sequences with their rows of a pool of states and of a log, round after round on one build of the kernels.
class Session {
  public:
    Session(const Kernels& k, const Case& first, bool float_keys, bool fresh)
        : kernels_(k), c_(first), capacity_(first.T) {
        const std::unique_ptr<Call> call = make_call(c_);
        N_ = call->N;
        states_ = std::move(call->state_in);
        Random r{c_.seed};
        const int64_t R = N_ + 1;
        keys_ = Array({R, c_.H, capacity_, c_.K}, float_keys ? DType::f32 : c_.dtype, false, 1, r);
        factors_ = Array({R, c_.H, capacity_}, DType::f32, false, 1, r);
        deltas_ = Array({R, c_.HV, capacity_, c_.V}, DType::f32, false, 1, r);
        decays_ = Array({R, c_.HV, capacity_, c_.kda ? c_.K : 1}, DType::f32, false, 1, r);
        for (int64_t e = 0; e < R * capacity_; ++e) parents_.push_back(e % capacity_ - 1);
        for (int64_t n = 0; n < N_; ++n) {
            base_.push_back(N_ + c_.pool - 1 - n);
            rows_.push_back((n + 1) % R);
            used_.push_back(0);
            for (int64_t h = 0; h < c_.HV; ++h)
                for (int64_t i = 0; i < states_.dims[2]; ++i)
                    for (int64_t j = 0; j < states_.dims[3]; ++j)
                        states_.set(fresh ? 0 : r.normal(), base_.back(), h, i, j);
            for (int64_t h = 0; h < c_.HV; ++h) start_.push_back(state_at(base_.back(), h));
        }
        after_.resize(start_.size());
    }

    void verify_tokens(Bytes& in) {
        Case c = c_;
        c.seed = in.take(2), c.T = 1 + in.below(capacity_);
        const std::unique_ptr<Call> call = make_call(c);
        Call& x = *call;
        spoil(x, in, in.below(8));
        x.history = 2 * capacity_;
        const bool tree = in.flag(), fold_early = in.flag(), skip = in.flag();
        std::vector<int64_t> folds, before, length;
        for (int64_t n = 0; n < N_; ++n) {
            int64_t& row = x.rows[static_cast<size_t>(n)];
            row = skip && in.flag() ? -1 : base(n);
            length.push_back(row < 0 ? 0 : x.end(n) - x.start(n));
            folds.push_back(length.back() > 0 && used(n) > 0 && (fold_early || used(n) + length.back() > capacity_));
            before.push_back(folds.back() ? 0 : used(n));
            for (int64_t t = 0; t < length.back(); ++t) {
                const int64_t e = before.back() + t;
                parent(n, e) = tree && in.flag() ? in.below(e + 1) - 1 : e - 1;
            }
        }
        x.indices = exact_copy(x.rows);
        x.state_in = std::move(states_);
        Log g = log(x.p);
        g.rule.in = g.rule.out = states_of(x.state_in);
        g.rule.state_indices = reinterpret_cast<const int64_t*>(x.indices->data());
        const auto folds_memory = exact_copy(folds);
        g.folds = reinterpret_cast<const int64_t*>(folds_memory->data());
        const auto bytes = run_twice(x, [&](int threads) { verify(g, kernels_, threads, false); });
        states_ = std::move(x.state_in);

        std::vector<char> states = states_.none_allowed(), o = x.o.none_allowed();
        std::vector<std::vector<char>> entries;
        for (Array* a : entry_arrays()) entries.push_back(a->none_allowed());
        for (int64_t n = 0; n < N_; ++n) {
            if (folds[static_cast<size_t>(n)]) {
                allow_state(states, base(n));
                compare_state("a state folded on the way", x, n, used(n));
            }
            for (int64_t t = 0; t < length[static_cast<size_t>(n)]; ++t)
                allow_entry(entries, n, before[static_cast<size_t>(n)] + t);
        }
        for (int64_t b = 0; b < c.B; ++b)
            for (int64_t t = 0; t < c.T; ++t)
                for (int64_t h = 0; h < c.HV; ++h)
                    for (int64_t j = 0; j < c.V; ++j) x.o.allow(o, x.o.at(b, t, h, j));
        check(x.o.stray(o) == 0, "o: bytes between its elements were changed");
        check(states_.stray(states) == 0, "states: bytes changed that must not");
        for (size_t i = 0; i < entries.size(); ++i)
            check(entry_arrays()[i]->stray(entries[i]) == 0, "the log: bytes changed that must not");
        for (Array* a : x.inputs())
            if (*a) check(a->stray({}) == 0, "an input was changed");

        const Channels<Bounded> channels{dense<Bounded>(x.q), dense<Bounded>(x.k), dense<Bounded>(x.v)};
        BoundedError error{x, "o", c.dtype};
        State want(static_cast<size_t>(c.V));
        for (int64_t n = 0; n < N_; ++n)
            for (int64_t t = x.start(n); t < x.end(n); ++t)
                for (int64_t h = 0; h < c.HV; ++h) {
                    const int64_t b = c.packed ? 0 : n, e = before[static_cast<size_t>(n)] + t - x.start(n);
                    std::fill(want.begin(), want.end(), Bounded());
                    if (x.rows[static_cast<size_t>(n)] >= 0) {
                        State S = behind(n, h, parent(n, e));
                        if (x.live(b, t))
                            Step<Bounded>(x, channels, b, t, h)
                                .run(c, static_cast<double>(x.p.scale), S.data(), want.data());
                        after(n, h).resize(static_cast<size_t>(e));
                        after(n, h).push_back(std::move(S));
                    }
                    for (int64_t j = 0; j < c.V; ++j) error.add(x.o.get(b, t, h, j), want[static_cast<size_t>(j)]);
                }
        for (int64_t n = 0; n < N_; ++n) {
            if (length[static_cast<size_t>(n)] == 0) continue;
            used(n) = before[static_cast<size_t>(n)] + length[static_cast<size_t>(n)];
            int64_t chain = 0;
            while (chain < used(n) && parent(n, chain) == chain - 1) ++chain;
            take_back(n, in.flag() ? in.below(chain + 1) : chain);
        }
    }

    void fold_entries(Bytes& in) {
        const std::unique_ptr<Call> call = make_call(c_);  // for its geometry
        Call& x = *call;
        x.history = 2 * capacity_;
        std::vector<int64_t> counts, to;
        std::vector<int64_t> taken = base_;
        for (int64_t n = 0; n < N_; ++n) {
            // what is left goes on from the state as it is stored: with its rounding it would need an oracle of its own
            counts.push_back(c_.state == DType::bf16 || in.flag() ? used(n) : in.below(used(n) + 1));
            const int64_t other = in.flag() ? in.below(states_.dims[0]) : base(n);
            to.push_back(std::count(taken.begin(), taken.end(), other) ? base(n) : other);
            taken.push_back(to.back());
        }
        x.state_in = std::move(states_);
        Log g = log(x.p);
        g.rule.B = N_, g.rule.T = 0, g.rule.mask = nullptr, g.rule.cu_seqlens = nullptr;
        g.rule.in = g.rule.out = states_of(x.state_in);
        g.rule.state_indices = base_.data();
        g.used = counts.data(), g.out_rows = to.data();
        run_twice(x, [&](int threads) { fold(g, kernels_, threads, false); });
        states_ = std::move(x.state_in);

        std::vector<char> states = states_.none_allowed();
        for (int64_t n = 0; n < N_; ++n) {
            const int64_t count = counts[static_cast<size_t>(n)];
            allow_state(states, to[static_cast<size_t>(n)]);
            base(n) = to[static_cast<size_t>(n)];
            compare_state("a folded state", x, n, count);
            const int64_t left = used(n) - count;
            for (int64_t h = 0; h < c_.HV; ++h) after(n, h).erase(after(n, h).begin(), after(n, h).begin() + count);
            for (int64_t e = 0; e < left; ++e) move_entry(n, count + e, e);
            take_back(n, left);
        }
        check(states_.stray(states) == 0, "states: bytes changed that must not");
        for (Array* a : entry_arrays()) a->keep();
    }

  private:
    const Kernels& kernels_;
    const Case c_;
    const int64_t capacity_;
    int64_t N_ = 0;
    Array states_, keys_, factors_, deltas_, decays_;
    std::vector<int64_t> parents_;  // [R, C]
    std::vector<int64_t> base_, rows_, used_;  // [N]
    std::vector<State> start_;  // [N HV]: the base state
    std::vector<std::vector<State>> after_;  // [N HV], by entry: the state behind it

    int64_t& base(int64_t n) { return base_[static_cast<size_t>(n)]; }
    int64_t& used(int64_t n) { return used_[static_cast<size_t>(n)]; }
    int64_t& parent(int64_t n, int64_t e) {
        return parents_[static_cast<size_t>(rows_[static_cast<size_t>(n)] * capacity_ + e)];
    }
    std::vector<State>& after(int64_t n, int64_t h) { return after_[static_cast<size_t>(n * c_.HV + h)]; }
    State& behind(int64_t n, int64_t h, int64_t e) {
        return e < 0 ? start_[static_cast<size_t>(n * c_.HV + h)] : after(n, h)[static_cast<size_t>(e)];
    }
    std::vector<Array*> entry_arrays() { return {&keys_, &factors_, &deltas_, &decays_}; }

    Log log(const Problem& rule) {
        Log g;
        g.rule = rule;
        g.capacity = capacity_;
        g.key_dtype = keys_.dtype, g.keys = keys_.data();
        g.factors = reinterpret_cast<float*>(factors_.data()), g.deltas = reinterpret_cast<float*>(deltas_.data());
        g.decays = reinterpret_cast<float*>(decays_.data());
        g.parents = parents_.data(), g.rows = rows_.data(), g.used = used_.data();
        return g;
    }

    // By one thread and by two, which must agree; the second run's results stay.
    template <class F>
    std::vector<std::vector<char>> run_twice(Call& x, F&& run) {
        const auto bytes = [&] {
            std::vector<std::vector<char>> all{x.o.bytes(), x.state_in.bytes()};
            for (Array* a : entry_arrays()) all.push_back(a->bytes());
            return all;
        };
        x.keep();
        for (Array* a : entry_arrays()) a->keep();
        run(1);
        const auto one = bytes();
        x.restore();
        for (Array* a : entry_arrays()) a->restore();
        run(2);
        check(bytes() == one, "2 threads and 1 differ");
        return one;
    }

    State state_at(int64_t row, int64_t h) const {
        State S;
        for (int64_t i = 0; i < c_.K; ++i)
            for (int64_t j = 0; j < c_.V; ++j)
                S.push_back(c_.vk ? states_.get(row, h, j, i) : states_.get(row, h, i, j));
        return S;
    }
    // The state after `count` entries is where it belongs; from now on it is the base.
    void compare_state(const char* what, const Call& x, int64_t n, int64_t count) {
        BoundedError error{x, what, c_.state};
        for (int64_t h = 0; h < c_.HV; ++h) {
            const State got = state_at(base(n), h), &want = behind(n, h, count - 1);
            for (size_t i = 0; i < got.size(); ++i) error.add(got[i].x, want[i]);
            start_[static_cast<size_t>(n * c_.HV + h)] = got;
        }
    }
    void allow_state(std::vector<char>& allowed, int64_t row) const {
        for (int64_t h = 0; h < c_.HV; ++h)
            for (int64_t i = 0; i < states_.dims[2]; ++i)
                for (int64_t j = 0; j < states_.dims[3]; ++j) states_.allow(allowed, states_.at(row, h, i, j));
    }
    // f(array, its number, first byte, bytes) for each piece of an entry
    template <class F>
    void each_piece(int64_t n, int64_t e, F&& f) {
        size_t i = 0;
        for (Array* a : entry_arrays()) {
            for (int64_t h = 0; h < a->dims[1]; ++h)
                f(*a, i, a->at(rows_[static_cast<size_t>(n)], h, e), a->strides[2] * size_of(a->dtype));
            ++i;
        }
    }
    void allow_entry(std::vector<std::vector<char>>& allowed, int64_t n, int64_t e) {
        each_piece(n, e, [&](Array& a, size_t i, char* at, int64_t bytes) {
            for (int64_t b = 0; b < bytes; b += size_of(a.dtype)) a.allow(allowed[i], at + b);
        });
    }
    void move_entry(int64_t n, int64_t from, int64_t to) {
        each_piece(n, to, [&](Array&, size_t, char* at, int64_t bytes) {
            std::memmove(at, at + (from - to) * bytes, static_cast<size_t>(bytes));
        });
    }
    // Entries from `left` on are forgotten: nobody may look at them.
    void take_back(int64_t n, int64_t left) {
        for (int64_t e = left; e < capacity_; ++e) {
            parent(n, e) = e - 1;
            each_piece(n, e, [](Array&, size_t, char* at, int64_t bytes) {
                std::memset(at, POISON, static_cast<size_t>(bytes));
            });
        }
        used(n) = left;
    }
};

}  // namespace
}  // namespace anydelta::tests

int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace anydelta;
    using namespace anydelta::tests;
    Bytes in(data, size);
    const int64_t most = in.pick({2000, 20000, 200000});
    Case c = case_of(in, most);
    c.in_place = true, c.no_state_in = c.no_state_out = false, c.Ks = 0, c.scattered = false;
    c.T = std::max<int64_t>(c.T, 1), c.B = std::max<int64_t>(c.B, 1);
    const bool float_keys = in.flag(), fresh = in.flag();
    for (const Kernels* kernels : builds()) {
        std::snprintf(context, sizeof context, "%s: log of %" PRId64 " %s", kernels->name, c.T, c.text().c_str());
        Bytes script = in;
        Session session(*kernels, c, float_keys, fresh);
        for (int round = 0; round < 6 && !script.empty(); ++round)
            script.below(3) ? session.verify_tokens(script) : session.fold_entries(script);
    }
    return verdict();
}
