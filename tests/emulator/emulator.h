// Owns an emulator of CUDA's threads on the CPU: enough of the language for csrc/cuda_kernel.cu, run one fiber per
// thread.
//
// A CUDA block runs to its end before the next begins. A thread runs until a warp-wide operation, where it waits until
// every lane that the mask names has come to the same operation with the same mask; where that can never be, the launch
// ends with an error instead of hanging. The order in which the waiting threads go on is the caller's to choose: no
// result may depend on it. Each thread has a separate stack, so the sanitizers see the kernel's own memory accesses.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __shared__ static  // one CUDA block runs at a time
#define __grid_constant__
#define __launch_bounds__(...)

struct uint2 {
    alignas(8) uint32_t x;
    uint32_t y;
};
struct uint4 {
    alignas(16) uint32_t x;
    uint32_t y, z, w;
};
struct dim3 {
    uint32_t x = 1, y = 1, z = 1;
};

namespace emulator {

enum Error : int32_t {
    kOk = 0,
    kDiverged = 1,    // lanes of one mask wait at different operations, or one of them has ended
    kNotInMask = 2,   // a lane called an operation whose mask leaves it out
    kBadBarrier = 3,  // __syncthreads that some thread of the block never reaches
    kUnknown = 4,     // no such kernel in this library
};

enum class Operation { kNone, kShuffleXor, kShuffle, kAny, kBallot, kSyncWarp, kSyncThreads };

struct Thread {
    ucontext_t start;
    jmp_buf resume;
    std::vector<char> stack;
    bool started, finished;
    Operation waits_at;  // kNone: may run
    uint32_t mask;
    int32_t argument;  // of a shuffle: the lane, or the distance
    uint32_t value;    // given, then received
};

constexpr int32_t kWarp = 32;
constexpr size_t kStackBytes = 64 * 1024;

}  // namespace emulator

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

class Block {
  public:
    // Runs `body` on every thread of the blocks [first, last) of a one-dimensional grid of `last`. `order` 0 takes the
    // threads in ascending order, 1 in descending order, and any other shuffles them each time, seeded by it
    // round.
    template <class Body> Error launch(int64_t first, int64_t last, int32_t threads, int32_t order, const Body& body) {
        using Function = void (*)(const void*);
        run_ = static_cast<Function>([](const void* b) { (*static_cast<const Body*>(b))(); });
        body_ = &body;
        threads_.resize(threads);
        error_ = kOk;
        std::vector<int32_t> turns(threads);
        std::iota(turns.begin(), turns.end(), 0);
        if (order == 1) std::reverse(turns.begin(), turns.end());
        std::mt19937 random(order);
        blockDim.x = threads;
        gridDim.x = static_cast<uint32_t>(last);
        for (int64_t block = first; block < last; ++block) {
            blockIdx.x = static_cast<uint32_t>(block);
            for (Thread& thread : threads_) reset(thread);
            for (bool all_done = false; !all_done;) {
                if (order > 1) std::shuffle(turns.begin(), turns.end(), random);
                bool progress = false;
                for (const int32_t turn : turns) progress |= advance(turn);
                if (error_ != kOk) return error_;
                all_done = std::all_of(threads_.begin(), threads_.end(), [](const Thread& t) { return t.finished; });
                if (!all_done && !progress && !release()) return stuck();
            }
        }
        return kOk;
    }

    // Called by the thread that runs: waits for the other lanes and returns what the operation gives this one.
    uint32_t meet(Operation operation, uint32_t mask, uint32_t value, int32_t argument) {
        Thread& self = threads_[current_];
        if (!(mask >> current_ % kWarp & 1)) error_ = kNotInMask;
        self.waits_at = operation;
        self.mask = mask;
        self.value = value;
        self.argument = argument;
        leave(self);
        return self.value;
    }

  private:
    static Block*& active() {
        static Block* block = nullptr;
        return block;
    }

    static void reset(Thread& thread) {
        if (thread.stack.empty()) thread.stack.resize(kStackBytes);
        if (!thread.finished) thread.started = false;  // new, or left where an error ended its launch
        thread.finished = false;
        thread.waits_at = Operation::kNone;
    }

    static void entry() {
        Block& block = *active();
        Thread& self = block.threads_[block.current_];
        for (;;) {  // once for each CUDA block
            block.run_(block.body_);
            self.finished = true;
            block.leave(self);
        }
    }

#if defined(__SANITIZE_ADDRESS__)  // which knows of swapcontext, but not of jumps between stacks
    void leave(Thread& self) { swapcontext(&self.start, &home_context_); }
    void enter(Thread& thread) { swapcontext(&home_context_, &thread.start); }
#else
    void leave(Thread& self) {  // jumps: swapcontext asks the kernel for the signal mask each time
        if (_setjmp(self.resume) == 0) _longjmp(home_, 1);
    }
    void enter(Thread& thread) {
        if (_setjmp(home_) != 0) return;
        if (thread.started) _longjmp(thread.resume, 1);
        thread.started = true;
        setcontext(&thread.start);
    }
#endif

    // Lets a thread run until it waits or ends; false where it could not.
    bool advance(int32_t index) {
        Thread& thread = threads_[index];
        if (thread.finished || thread.waits_at != Operation::kNone) return false;
        if (!thread.started) {
            getcontext(&thread.start);
            thread.start.uc_stack.ss_sp = thread.stack.data();
            thread.start.uc_stack.ss_size = thread.stack.size();
            thread.start.uc_link = nullptr;
            makecontext(&thread.start, &Block::entry, 0);
#if defined(__SANITIZE_ADDRESS__)
            thread.started = true;
#endif
        }
        active() = this;
        current_ = index;
        threadIdx.x = static_cast<uint32_t>(index);
        enter(thread);
        return true;
    }

    // Completes every operation at which all the lanes it names have met; false where there is none.
    bool release() {
        bool any = false;
        const int32_t count = static_cast<int32_t>(threads_.size());
        for (int32_t warp = 0; warp < count; warp += kWarp) {
            const int32_t lanes = std::min(kWarp, count - warp);
            for (int32_t lane = 0; lane < lanes; ++lane) any |= release_group(&threads_[warp], lanes, lane);
        }
        const auto at_barrier = [](const Thread& t) { return t.waits_at == Operation::kSyncThreads; };
        if (std::all_of(threads_.begin(), threads_.end(), at_barrier)) {
            for (Thread& thread : threads_) thread.waits_at = Operation::kNone;
            any = true;
        }
        return any;
    }

    static bool release_group(Thread* warp, int32_t lanes, int32_t leader) {
        const Operation operation = warp[leader].waits_at;
        const uint32_t mask = warp[leader].mask;
        if (operation == Operation::kNone || operation == Operation::kSyncThreads) return false;
        uint32_t given[kWarp] = {}, ballot = 0;
        for (int32_t lane = 0; lane < kWarp; ++lane) {
            if (!(mask >> lane & 1)) continue;
            if (lane >= lanes || warp[lane].finished || warp[lane].waits_at != operation || warp[lane].mask != mask) {
                return false;
            }
            given[lane] = warp[lane].value;
            ballot |= static_cast<uint32_t>(given[lane] != 0) << lane;
        }
        for (int32_t lane = 0; lane < lanes; ++lane) {
            if (!(mask >> lane & 1)) continue;
            Thread& thread = warp[lane];
            switch (operation) {
                case Operation::kShuffleXor: thread.value = given[(lane ^ thread.argument) % kWarp]; break;
                case Operation::kShuffle: thread.value = given[thread.argument % kWarp]; break;
                case Operation::kAny: thread.value = ballot != 0; break;
                case Operation::kBallot: thread.value = ballot; break;
                default: break;
            }
            thread.waits_at = Operation::kNone;
        }
        return true;
    }

    Error stuck() const {
        const auto at_barrier = [](const Thread& t) { return t.finished || t.waits_at == Operation::kSyncThreads; };
        return std::all_of(threads_.begin(), threads_.end(), at_barrier) ? kBadBarrier : kDiverged;
    }

    std::vector<Thread> threads_;
    void (*run_)(const void*) = nullptr;
    const void* body_ = nullptr;
    int32_t current_ = 0;
    Error error_ = kOk;
    jmp_buf home_;
    ucontext_t home_context_;
};

inline Block* running = nullptr;

}  // namespace emulator

// ---- What the kernel calls
// --------------------------------------------------------------------------------------------

using std::fmaxf;
using std::max;

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int32_t __float2int_rz(float x) { return static_cast<int32_t>(x); }

inline int32_t __shfl_xor_sync(uint32_t mask, int32_t value, int32_t distance) {
    using namespace emulator;
    return static_cast<int32_t>(running->meet(Operation::kShuffleXor, mask, static_cast<uint32_t>(value), distance));
}
inline float __shfl_xor_sync(uint32_t mask, float value, int32_t distance) {
    int32_t pattern;
    std::memcpy(&pattern, &value, sizeof(value));
    pattern = __shfl_xor_sync(mask, pattern, distance);
    std::memcpy(&value, &pattern, sizeof(value));
    return value;
}
inline int32_t __shfl_sync(uint32_t mask, int32_t value, int32_t lane) {
    using namespace emulator;
    return static_cast<int32_t>(running->meet(Operation::kShuffle, mask, static_cast<uint32_t>(value), lane));
}
inline int32_t __any_sync(uint32_t mask, int32_t predicate) {
    using namespace emulator;
    return static_cast<int32_t>(running->meet(Operation::kAny, mask, predicate != 0, 0));
}
inline uint32_t __ballot_sync(uint32_t mask, int32_t predicate) {
    return emulator::running->meet(emulator::Operation::kBallot, mask, predicate != 0, 0);
}
inline void __syncwarp(uint32_t mask = 0xffffffffu) {
    emulator::running->meet(emulator::Operation::kSyncWarp, mask, 0, 0);
}
inline void __threadfence() {}
inline void __syncthreads() { emulator::running->meet(emulator::Operation::kSyncThreads, 0xffffffffu, 0, 0); }
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
    const unsigned long long old = *address;
    *address += value;
    return old;
}
