// Runs emulated Metal kernels: one fiber per lane, one threadgroup after the other, and a checker of memory accesses.
//
// A lane runs until it needs others: at a simdgroup operation (all 32 lanes must come to it) or a threadgroup barrier.
// Lanes that leave others waiting for ever are an error, which a GPU would not report. ANYDELTA_EMULATOR_ORDER=backward
// starts the lanes from the last. Subnormal floats are zero, as on Apple's GPUs.
//
// Code that is compiled with -fsanitize=thread calls __tsan_read4 and so on for every access to memory that is not its
// own stack. Here these calls are answered by the checker below, not by ThreadSanitizer: it knows the buffers of the
// launch and the threadgroup's variables, says what lies in none of them, and what two lanes touch, one of them
// writing, without a barrier between; and it counts.
#include "runtime.h"

#include <algorithm>
#include <csetjmp>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#define ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define ASAN 1
#endif
#endif
#ifdef ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emu {

Lane* me;

namespace {

constexpr unsigned SIMD = 32;
constexpr unsigned long STACK = 256 * 1024;

enum State { READY, AT_SIMD, AT_BARRIER, DONE };

struct Fiber {
    Lane lane;  // first: `me` points here
    State state;
    ucontext_t context;
    jmp_buf jump;
    bool started;
    char* stack;
    unsigned seen;  // simdgroup operations so far: which of the two sets of slots is next
    unsigned times;  // barriers so far, for the checker: of its threadgroup, and of its simdgroup
};

struct Simdgroup {
    unsigned arrived;
    Op op;
    unsigned epoch;  // simdgroup barriers and threadgroup barriers so far
    unsigned char slots[2][SIMD][64];
};

std::vector<Fiber*> fibers;  // kept between launches
std::vector<Simdgroup> simdgroups;
unsigned lanes, at_barrier, done, epoch;
Kernel kernel;
void* const* arguments;
char error[512];
bool failed;

#ifdef ASAN
ucontext_t main_context;
void* fake;
const void* main_stack;
size_t main_size;
#else
jmp_buf main_jump;
ucontext_t main_context;
#endif

unsigned long counts[16];  // see emu_counts

Fiber* self() { return reinterpret_cast<Fiber*>(me); }

void to_main() {
#ifdef ASAN
    __sanitizer_start_switch_fiber(&fake, main_stack, main_size);
    swapcontext(&self()->context, &main_context);
#else
    if (!_setjmp(self()->jump)) _longjmp(main_jump, 1);
#endif
}

void fail(const char* format, ...) {
    if (!failed) {
        va_list list;
        va_start(list, format);
        vsnprintf(error, sizeof error, format, list);
        va_end(list);
    }
    failed = true;
}

// Of a lane: it goes no further, before it does what it must not.
template <typename... T>
void stop(const char* format, T... values) {
    fail(format, values...);
    to_main();
}

void fiber_main() {
    for (;;) {
#ifdef ASAN
        __sanitizer_finish_switch_fiber(fake, &main_stack, &main_size);
#endif
        kernel(arguments);
        self()->state = DONE;
        ++done;
        if (at_barrier) stop("a lane ended while %u others wait at a threadgroup barrier", at_barrier);
        to_main();
    }
}

void resume(Fiber* f) {
    me = &f->lane;
#ifdef ASAN
    __sanitizer_start_switch_fiber(&fake, f->stack, STACK);
    swapcontext(&main_context, &f->context);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    if (_setjmp(main_jump)) return;
    if (f->started) _longjmp(f->jump, 1);
    f->started = true;
    setcontext(&f->context);
#endif
}

// Leaves the lane until it is READY again.
void wait(State state) {
    self()->state = state;
    to_main();
#ifdef ASAN
    __sanitizer_finish_switch_fiber(fake, &main_stack, &main_size);
#endif
}

Fiber* make_fiber() {
    Fiber* f = new Fiber();
    f->stack = static_cast<char*>(mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    return f;
}

void restart(Fiber* f) {
    getcontext(&f->context);
    f->context.uc_stack.ss_sp = f->stack;
    f->context.uc_stack.ss_size = STACK;
    f->context.uc_link = nullptr;
    makecontext(&f->context, fiber_main, 0);
    f->started = false;
}

// ---- the checker

// Who touched two bytes of memory last.
struct Touch {
    unsigned group = 0, epoch = 0, simdgroup = 0, simd_epoch = 0, lane = 0;
};
struct Cell {
    Touch write, read, other_read;  // other_read: by another lane than `read`, of another simdgroup if there was one
};

struct Range {
    std::uintptr_t from, to;
    bool threadgroup, writable, counted;
    std::vector<Cell> cells;  // of a writable one; nobody races in memory that is only read
};
std::vector<Range> ranges;  // writable ones first: a buffer that is also bound for writing counts as that one
unsigned group_number;  // from 1, over all launches
bool checking;

// While it lives, subnormal operands and results are zero. Lanes inherit it: makecontext keeps the mode.
struct NoSubnormals {
#if defined(__SSE__)
    unsigned before = _mm_getcsr();
    NoSubnormals() { _mm_setcsr(before | 0x8040); }
    ~NoSubnormals() { _mm_setcsr(before); }
#elif defined(__aarch64__)
    unsigned long before;
    NoSubnormals() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        asm volatile("msr fpcr, %0" : : "r"(before | 1ul << 24));
    }
    ~NoSubnormals() { asm volatile("msr fpcr, %0" : : "r"(before)); }
#endif
};

void add_range(std::uintptr_t from, std::uintptr_t size, bool threadgroup, bool writable, bool counted) {
    Range r{from, from + size, threadgroup, writable, counted, {}};
    if (checking && writable) r.cells.resize((from + size + 1) / 2 - from / 2);
    ranges.insert(writable ? ranges.begin() : ranges.end(), std::move(r));
}

// Threadgroup memory is new for each threadgroup; accesses of two threadgroups to a buffer are in no order.
bool ordered(const Touch& before, const Touch& now, bool threadgroup) {
    if (!before.group) return true;
    if (before.group != now.group) return threadgroup;
    return before.lane == now.lane || before.epoch < now.epoch ||
           (before.simdgroup == now.simdgroup && before.simd_epoch < now.simd_epoch);
}

void touch(const void* at, unsigned size, bool write) {
    const auto address = reinterpret_cast<std::uintptr_t>(at);
    if (address - reinterpret_cast<std::uintptr_t>(self()->stack) < STACK) return;
    const auto inside = [=](const Range& r) { return r.from <= address && address + size <= r.to; };
    const auto found = std::find_if(ranges.begin(), ranges.end(), inside);
    if (found == ranges.end()) {
        const auto slots = reinterpret_cast<std::uintptr_t>(simdgroups.data());
        if (address - slots < simdgroups.size() * sizeof(Simdgroup)) return;
        if (at == &me || address - reinterpret_cast<std::uintptr_t>(me) < sizeof *me) return;
        stop("lane %u of threadgroup (%u, %u, %u) %s %u bytes in no buffer", self()->lane.lane, me->group[0],
             me->group[1], me->group[2], write ? "writes" : "reads", size);
    }
    Range& range = *found;
    if (range.counted) {
        ++counts[(range.threadgroup ? 4 : 0) + (write ? 2 : 0)];
        counts[(range.threadgroup ? 4 : 0) + (write ? 2 : 0) + 1] += size;
    }
    if (write && !range.writable) stop("lane %u writes %u bytes of a buffer that is only read", me->lane, size);
    if (range.cells.empty()) return;
    const Simdgroup& simd = simdgroups[me->simdgroup];
    const Touch now{group_number, epoch, me->simdgroup, simd.epoch, me->simdgroup * SIMD + me->lane};
    for (std::uintptr_t word = address / 2; word <= (address + size - 1) / 2; ++word) {
        Cell& cell = range.cells[word - range.from / 2];
        const Touch* before = nullptr;
        const char* what = "";
        if (!ordered(cell.write, now, range.threadgroup)) {
            before = &cell.write;
            what = write ? "write what another wrote" : "read what another wrote";
        } else if (write && !ordered(cell.read, now, range.threadgroup)) {
            before = &cell.read;
            what = "write what another read";
        } else if (write && !ordered(cell.other_read, now, range.threadgroup)) {
            before = &cell.other_read;
            what = "write what another read";
        }
        if (before)
            stop("race in %s memory: lanes %u and %u %s, without a barrier between%s",
                 range.threadgroup ? "threadgroup" : "device", now.lane, before->lane, what,
                 before->group != now.group ? " (in two threadgroups)" : "");
        if (write) {
            cell.write = now;
        } else {
            // Of reads by two simdgroups since a barrier, one of each is kept: a later write by either is then found.
            const Touch &last = cell.read, &other = cell.other_read;
            const bool another = last.group != now.group || last.lane != now.lane;
            const bool apart = other.group == now.group && other.epoch == epoch && other.simdgroup != now.simdgroup;
            if (another && (last.simdgroup != now.simdgroup || !apart)) cell.other_read = last;
            cell.read = now;
        }
    }
}

struct Poisoned {
    void* at;
    unsigned group;
};
std::vector<Poisoned> poisoned;

}  // namespace

const unsigned char (*meet(Op op, const void* mine, unsigned size))[64] {
    ++counts[8 + op];
    Simdgroup& simd = simdgroups[me->simdgroup];
    auto& slots = simd.slots[self()->seen++ & 1];
    if (size) memcpy(slots[me->lane], mine, size);
    if (simd.arrived && simd.op != op) stop("lanes of a simdgroup are at different operations");
    simd.op = op;
    if (++simd.arrived == SIMD) {
        simd.arrived = 0;
        if (op == SIMD_BARRIER) ++simd.epoch;
        for (unsigned i = 0; i < SIMD; ++i) fibers[me->simdgroup * SIMD + i]->state = READY;
    } else {
        wait(AT_SIMD);
    }
    return slots;
}

void barrier() {
    ++counts[15];
    if (done) stop("a lane waits at a threadgroup barrier that %u others never reach", done);
    if (++at_barrier == lanes) {
        at_barrier = 0;
        ++epoch;
        for (auto& simd : simdgroups) ++simd.epoch;
        for (unsigned i = 0; i < lanes; ++i) fibers[i]->state = READY;
    } else {
        wait(AT_BARRIER);
    }
}

void threadgroup_memory(void* at, unsigned long size) {
    for (auto& p : poisoned)
        if (p.at == at) {
            if (p.group == group_number) return;
            p.group = group_number;
            memset(at, 0xff, size);  // NaN in every float type
            return;
        }
    poisoned.push_back({at, group_number});
    const auto from = reinterpret_cast<std::uintptr_t>(at);
    add_range(from, size, true, true, true);
    memset(at, 0xff, size);
}

}  // namespace emu

using namespace emu;

extern "C" {

// What a launch may touch: n times (address, bytes, 0 constant, 1 a buffer that is read, 2 one that may be written).
void emu_buffers(const std::uintptr_t* list, unsigned n) {
    ranges.clear();
    poisoned.clear();
    for (unsigned i = 0; i < n; ++i)
        add_range(list[3 * i], list[3 * i + 1], false, list[3 * i + 2] == 2, list[3 * i + 2] > 0);
}

void emu_check(int on) { checking = on; }

// Since the last call: device reads, their bytes, device writes, their bytes; the same of threadgroup memory; then
// arrivals at each kind of simdgroup operation, and at barriers, by lane.
void emu_counts(unsigned long* out) {
    memcpy(out, counts, sizeof counts);
    memset(counts, 0, sizeof counts);
}

// Runs a kernel over groups[3] threadgroups of size[3] threads. Returns an error, or null.
const char* emu_run(void (*entry)(void* const*), void* const* args, const unsigned* groups, const unsigned* size) {
    const NoSubnormals mode;
    static const char* order = getenv("ANYDELTA_EMULATOR_ORDER");
    const bool backward = order && !strcmp(order, "backward");
    kernel = entry;
    arguments = args;
    failed = false;
    lanes = size[0] * size[1] * size[2];
    if (lanes % SIMD) return "a threadgroup must be a multiple of 32 threads";
    while (fibers.size() < lanes) fibers.push_back(make_fiber());
    simdgroups.assign(lanes / SIMD, Simdgroup());
    for (unsigned i = 0; i < lanes; ++i) restart(fibers[i]);
    const unsigned long total = 1ul * groups[0] * groups[1] * groups[2];
    for (unsigned long number = 0; number < total && !failed; ++number) {
        ++group_number;
        at_barrier = done = epoch = 0;
        for (auto& simd : simdgroups) simd.arrived = simd.epoch = 0;
        const unsigned at[3] = {unsigned(number % groups[0]), unsigned(number / groups[0] % groups[1]),
                                unsigned(number / groups[0] / groups[1])};
        for (unsigned i = 0; i < lanes; ++i) {
            Fiber* f = fibers[i];
            f->state = READY;
            f->seen = 0;
            const unsigned in[3] = {i % size[0], i / size[0] % size[1], i / size[0] / size[1]};
            f->lane.lane = i % SIMD;
            f->lane.simdgroup = i / SIMD;
            for (int d = 0; d < 3; ++d) {
                f->lane.group[d] = at[d];
                f->lane.in_group[d] = in[d];
                f->lane.in_grid[d] = at[d] * size[d] + in[d];
            }
        }
        // Lanes in turn. A turn of all lanes in which nobody is ready is a deadlock.
        while (done < lanes && !failed) {
            bool moved = false;
            for (unsigned s = 0; s < lanes / SIMD && !failed; ++s)
                for (bool again = true; again && !failed;) {
                    again = false;
                    for (unsigned l = 0; l < SIMD && !failed; ++l) {
                        const unsigned i = s * SIMD + l;
                        Fiber* f = fibers[backward ? lanes - 1 - i : i];
                        if (f->state != READY) continue;
                        again = moved = true;
                        resume(f);
                    }
                }
            if (!moved)
                fail("lanes wait for each other: %u ended, %u at a barrier, the others at simdgroup operations", done,
                     at_barrier);
        }
    }
    return failed ? error : nullptr;
}

#define TSAN(size)                                                       \
    void __tsan_read##size(void* p) { touch(p, size, false); }           \
    void __tsan_write##size(void* p) { touch(p, size, true); }           \
    void __tsan_unaligned_read##size(void* p) { touch(p, size, false); } \
    void __tsan_unaligned_write##size(void* p) { touch(p, size, true); } \
    void __tsan_volatile_read##size(void* p) { touch(p, size, false); }  \
    void __tsan_volatile_write##size(void* p) { touch(p, size, true); }
TSAN(1)
TSAN(2)
TSAN(4)
TSAN(8)
TSAN(16)
void __tsan_read_range(void* p, unsigned long n) { touch(p, unsigned(n), false); }
void __tsan_write_range(void* p, unsigned long n) { touch(p, unsigned(n), true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void* __tsan_memcpy(void* to, const void* from, unsigned long n) {
    touch(from, unsigned(n), false);
    touch(to, unsigned(n), true);
    return memcpy(to, from, n);
}
void* __tsan_memset(void* to, int value, unsigned long n) {
    touch(to, unsigned(n), true);
    return memset(to, value, n);
}
void* __tsan_memmove(void* to, const void* from, unsigned long n) {
    touch(from, unsigned(n), false);
    touch(to, unsigned(n), true);
    return memmove(to, from, n);
}
}
