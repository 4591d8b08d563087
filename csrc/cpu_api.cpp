// The C interface that lion8bit/backends/cpu.py calls: instruction sets, threads and their floating-point environment.
#include <atomic>
#include <cstddef>

#if defined(_OPENMP)
#include <omp.h>
#else
#include <system_error>
#include <thread>
#include <vector>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#endif
#if defined(LION8BIT_X86)
#include <cpuid.h>
#endif
#if !defined(__x86_64__) && !defined(__aarch64__)
#include <cfenv>
#endif

#include "cpu_kernel.h"
#include "export.h"

namespace {

using lion8bit::Hyper;
using lion8bit::TensorRow;

// Later kernels are preferred. lion8bit/backends/cpu.py names them in the same order.
lion8bit::UpdateBlocks* const kKernels[] = {
    lion8bit::update_blocks_baseline,
#if defined(LION8BIT_X86)
    lion8bit::update_blocks_avx2,
    lion8bit::update_blocks_avx512,
#endif
};

// True in a child of fork(). The threads stay with the parent, and GNU OpenMP would wait for them forever.
bool forked = false;
#if !defined(_WIN32)
[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });
#endif

// The floating-point control register of this thread: rounding, subnormal numbers, exceptions that trap.
#if defined(__x86_64__)  // MXCSR
constexpr uint64_t kDefaultControl = 0x1f80;
uint64_t control() {
    uint32_t word;
    __asm__ volatile("stmxcsr %0" : "=m"(word) : : "memory");
    return word;
}
void set_control(uint64_t value) {
    const auto word = static_cast<uint32_t>(value);
    __asm__ volatile("ldmxcsr %0" : : "m"(word) : "memory");
}
#elif defined(__aarch64__)  // FPCR
constexpr uint64_t kDefaultControl = 0;
uint64_t control() {
    uint64_t word;
    __asm__ volatile("mrs %0, fpcr" : "=r"(word) : : "memory");
    return word;
}
void set_control(uint64_t value) { __asm__ volatile("msr fpcr, %0" : : "r"(value) : "memory"); }
#else                       // rounding mode only
constexpr uint64_t kDefaultControl = FE_TONEAREST;
uint64_t control() { return static_cast<uint64_t>(std::fegetround()); }
void set_control(uint64_t value) { std::fesetround(static_cast<int>(value)); }
#endif

// While an object of this class exists, its thread rounds to nearest, keeps subnormal numbers and traps no exception.
// Its destructor restores the previous environment. Results must not depend on what the caller has set, nor on what a
// thread of the pool inherited.
//
// The compiler cannot move the kernel's arithmetic across the writes to the register. The arithmetic begins with loads
// and ends with stores, and neither may cross assembly that clobbers memory ("memory").
class DefaultEnvironment {
  public:
    DefaultEnvironment() { set_control(kDefaultControl); }
    ~DefaultEnvironment() { set_control(callers_); }
    DefaultEnvironment(const DefaultEnvironment&) = delete;
    DefaultEnvironment& operator=(const DefaultEnvironment&) = delete;

  private:
    const uint64_t callers_ = control();
};

// Calls work(member, members) for each of at most `team` members in parallel, one of them on the calling thread.
// Returns when all calls have returned.
#if defined(_OPENMP)  // uses torch's thread pool, see native_library.py
template <class Work> void in_parallel(int team, const Work& work) {
#pragma omp parallel num_threads(team) if (team > 1)
    work(omp_get_thread_num(), omp_get_num_threads());
}
#else
template <class Work> void in_parallel(int team, const Work& work) {
    std::vector<std::thread> others;
    int member = 1;
    try {
        for (; member < team; ++member) others.emplace_back(work, member, team);
    } catch (const std::system_error&) {  // the system has no more threads; the calling thread does the rest
    }
    work(0, team);
    for (; member < team; ++member) work(member, team);
    for (std::thread& other : others) other.join();
}
#endif

int64_t count_blocks(const TensorRow& tensor, const Hyper& hyper) {
    return tensor.rows * lion8bit::blocks_per_row(tensor.cols, hyper.block_size);
}

// Sizes of the structs and offsets of their fields, in order.
#define LION8BIT_AT(Struct, field) static_cast<int32_t>(offsetof(Struct, field))
constexpr int32_t kStructLayouts[] = {
    sizeof(Hyper),
    LION8BIT_AT(Hyper, lr),
    LION8BIT_AT(Hyper, decay),
    LION8BIT_AT(Hyper, coupled_decay),
    LION8BIT_AT(Hyper, blend),
    LION8BIT_AT(Hyper, one_minus_blend),
    LION8BIT_AT(Hyper, beta),
    LION8BIT_AT(Hyper, one_minus_beta),
    LION8BIT_AT(Hyper, unscale),
    LION8BIT_AT(Hyper, flags),
    LION8BIT_AT(Hyper, block_size),
    LION8BIT_AT(Hyper, weight_rounding),
    sizeof(TensorRow),
    LION8BIT_AT(TensorRow, param),
    LION8BIT_AT(TensorRow, grad),
    LION8BIT_AT(TensorRow, momentum),
    LION8BIT_AT(TensorRow, scales),
    LION8BIT_AT(TensorRow, residual),
    LION8BIT_AT(TensorRow, rows),
    LION8BIT_AT(TensorRow, cols),
    LION8BIT_AT(TensorRow, first),
    LION8BIT_AT(TensorRow, row_stride),
    LION8BIT_AT(TensorRow, seed),
    LION8BIT_AT(TensorRow, step),
    LION8BIT_AT(TensorRow, param_dtype),
    LION8BIT_AT(TensorRow, grad_dtype),
    LION8BIT_AT(TensorRow, momentum_bits),
    LION8BIT_AT(TensorRow, hyper),
};
#undef LION8BIT_AT

}  // namespace

// Writes up to `capacity` numbers of kStructLayouts, which Python compares with its ctypes mirrors. Returns how many
// numbers there are.
LION8BIT_EXPORT int32_t lion8bit_struct_layouts(int32_t* out, int32_t capacity) {
    constexpr int32_t count = sizeof(kStructLayouts) / sizeof(int32_t);
    for (int32_t i = 0; i < count && i < capacity; ++i) out[i] = kStructLayouts[i];
    return count;
}

// The format version that this library was built for.
LION8BIT_EXPORT int32_t lion8bit_format_version() { return lion8bit::kFormatVersion; }

// The number of kernels that this processor can run. Kernels are numbered from 0; each needs more than those before.
LION8BIT_EXPORT int32_t lion8bit_kernels() {
#if defined(LION8BIT_X86)
    // Not __builtin_cpu_supports, because it needs a library that clang does not have on Windows.
    unsigned eax, ebx, ecx, edx, saved, unused;
    constexpr unsigned kHasXgetbv = 1u << 27;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & kHasXgetbv)) return 1;
    __asm__("xgetbv" : "=a"(saved), "=d"(unused) : "c"(0));  // which registers the operating system saves
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return 1;
    constexpr unsigned kAvx2 = 1u << 5, kAvx512 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
    const bool avx2 = (saved & 0x06) == 0x06 && (ebx & kAvx2);
    const bool avx512 = avx2 && (saved & 0xe0) == 0xe0 && (ebx & kAvx512) == kAvx512;
    return 1 + avx2 + avx512;
#else
    return 1;
#endif
}

// Read and write the calling thread's floating-point environment. lion8bit/backends/native_library.py uses them to
// derive constants in the default environment.
LION8BIT_EXPORT uint64_t lion8bit_environment() { return control(); }
LION8BIT_EXPORT void lion8bit_set_environment(uint64_t environment) { set_control(environment); }
LION8BIT_EXPORT void lion8bit_set_default_environment() { set_control(kDefaultControl); }

// Steps `count` parameters in place. Returns the number of elements skipped because of a bad gradient.
// Each thread gets an equal share of all blocks, regardless of parameters, and computes in the default floating-point
// environment. A child of fork() uses one thread.
LION8BIT_EXPORT int64_t lion8bit_update(const TensorRow* tensors,  // [count]
                                        int64_t count,
                                        const Hyper* hypers,  // indexed by TensorRow::hyper
                                        int32_t kernel,       // below lion8bit_kernels()
                                        int32_t threads) {    // at least 1
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += count_blocks(tensors[i], hypers[tensors[i].hyper]);
    constexpr int64_t kBlocksWorthAThread = 64;
    const int64_t useful = total / kBlocksWorthAThread + 1;
    const int team = forked ? 1 : static_cast<int>(useful < threads ? useful : threads);
    std::atomic<int64_t> nonfinite{0};
    in_parallel(team, [&](int64_t member, int64_t members) {
        const DefaultEnvironment environment;
        int64_t begin = total / members * member + (member < total % members ? member : total % members);
        int64_t end = begin + total / members + (member < total % members);
        for (int64_t i = 0; i < count && end > 0; ++i) {
            const Hyper& hyper = hypers[tensors[i].hyper];
            const int64_t blocks = count_blocks(tensors[i], hyper);
            if (begin < blocks && blocks > 0) {
                const int64_t first = begin > 0 ? begin : 0, last = end < blocks ? end : blocks;
                nonfinite += kKernels[kernel](tensors[i], hyper, first, last);
            }
            begin -= blocks;
            end -= blocks;
        }
    });
    return nonfinite;
}
