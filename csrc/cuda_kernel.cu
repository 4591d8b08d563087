// The CUDA kernel: one launch steps the blocks of many tensors. The arithmetic is in block_math.h.
//
// lion8bit/backends/nvrtc.py compiles it with NVRTC, one module per combination of the LION8BIT_* macros, and cuda.py
// fills in the Launch. A thread holds 8 or 16 consecutive elements in registers, and neighbouring threads hold a block.
// They exchange the largest new momentum of the block by shuffles. So each byte is read once and written once.
#include "block_math.h"

namespace lion8bit {

// How the kernel accesses memory, see `Tuning` in lion8bit/backends/nvrtc.py. It changes times, never bits.
constexpr int32_t kThreads = LION8BIT_THREADS;     // of a CUDA block
constexpr int32_t kPerLane = LION8BIT_PER_THREAD;  // consecutive elements of a thread: 8 or 16
enum Ahead : int32_t { kNothing = 0, kToCache = 1, kToRegisters = 2 };
constexpr int32_t kAhead = LION8BIT_AHEAD;  // where the next pass is loaded to while this one computes
// LION8BIT_LOAD and LION8BIT_STORE are PTX cache hints for whole vectors, such as ".L1::no_allocate", or "".

constexpr uint32_t kFullWarp = 0xffffffffu;
constexpr int32_t kMany = 1 << 30;  // more than the elements, and blocks, of a CUDA block's share

// The learning rate of one parameter group, in device memory.
struct DeviceRate {
    const float* lr;  // [1]; null if the rate is in Hyper
    double divisor;   // decay = 1 - lr / divisor * weight_decay
    double weight_decay;
};

// The update count of one parameter, for launches where the device decides whether to update.
struct Counter {
    unsigned long long updates;
    unsigned long long arrived;  // CUDA blocks that have read their counter, in a launch whose first tensor this is
};
constexpr uint32_t kUncounted = 1u << 31;  // flag in TensorRow::step: a later launch will count this update

// The arguments of one launch, passed by value. So there is no table on the device and no copy, and a CUDA graph keeps
// them. `grad_scale`, `found_inf`, `counters` and `rates` are read only by kernels compiled with on_device.
template <int32_t tensor_capacity, int32_t hyper_capacity> struct Launch {
    unsigned long long* nonfinite;        // [1], counts elements skipped for a bad gradient
    const float* grad_scale;              // [1], gradients are divided by it; or null
    const float* found_inf;               // [1], nothing is written if it is not 0; or null
    Counter* counters;                    // indexed by TensorRow::step, see counter_of
    int32_t count;                        // tensors in use, at least 1
    int32_t passes;                       // a CUDA block steps passes * kThreads * kPerLane elements
    int32_t first_tile[tensor_capacity];  // index of the first CUDA block of each tensor, ascending from 0
    TensorRow tensors[tensor_capacity];   // not empty, unless on_device
    Hyper hypers[hyper_capacity];         // indexed by TensorRow::hyper
    DeviceRate rates[hyper_capacity];     // indexed by TensorRow::hyper
};

// ---- The consecutive elements of a thread, as in memory -------------------------------------------------------------

template <int32_t bytes> struct PatternOf;
template <> struct PatternOf<1> {
    using type = unsigned char;
};
template <> struct PatternOf<2> {
    using type = uint16_t;
};
template <> struct PatternOf<4> {
    using type = uint32_t;
};
template <int32_t dtype> using ElementOf = typename PatternOf<dtype == kFloat32 ? 4 : 2>::type;

LION8BIT_FN uint4 load(const uint4* from) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(LION8BIT_LOAD) > 1) {
        uint4 a;
        asm volatile("ld.global" LION8BIT_LOAD ".v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(a.x), "=r"(a.y), "=r"(a.z), "=r"(a.w)
                     : "l"(from));
        return a;
    }
#endif
    return *from;
}
LION8BIT_FN uint2 load(const uint2* from) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(LION8BIT_LOAD) > 1) {
        uint2 a;
        asm volatile("ld.global" LION8BIT_LOAD ".v2.u32 {%0, %1}, [%2];" : "=r"(a.x), "=r"(a.y) : "l"(from));
        return a;
    }
#endif
    return *from;
}
LION8BIT_FN void store(uint4* to, uint4 a) {
#if defined(__CUDA_ARCH__)  // otherwise the compiler may split the assignment into four stores
    asm volatile("st.global" LION8BIT_STORE ".v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(a.x), "r"(a.y), "r"(a.z),
                 "r"(a.w)
                 : "memory");
#else
    *to = a;
#endif
}
LION8BIT_FN void store(uint2* to, uint2 a) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(LION8BIT_STORE) > 1) {
        asm volatile("st.global" LION8BIT_STORE ".v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(a.x), "r"(a.y) : "memory");
        return;
    }
#endif
    *to = a;
}

LION8BIT_FN uint32_t load(const uint32_t* from) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(LION8BIT_LOAD) > 1) {
        uint32_t a;
        asm volatile("ld.global" LION8BIT_LOAD ".u32 %0, [%1];" : "=r"(a) : "l"(from));
        return a;
    }
#endif
    return *from;
}
LION8BIT_FN void store(uint32_t* to, uint32_t a) {
#if defined(__CUDA_ARCH__)
    if constexpr (sizeof(LION8BIT_STORE) > 1) {
        asm volatile("st.global" LION8BIT_STORE ".u32 [%0], %1;" ::"l"(to), "r"(a) : "memory");
        return;
    }
#endif
    *to = a;
}

LION8BIT_FN void prefetch([[maybe_unused]] const void* address) {
#if defined(__CUDA_ARCH__)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// `bits` of an element. T is how it is stored; with 4 bits two elements share a T, the first one in its low half.
template <class T, int32_t bits = 8 * sizeof(T)> struct Elements {
    static constexpr int32_t kPerWord = 32 / bits;
    static constexpr int32_t kPerT = 8 * sizeof(T) / bits;
    static constexpr int32_t kWords = kPerLane / kPerWord;
    uint32_t words[kWords];

    LION8BIT_FN uint32_t get(int32_t i) const { return words[i / kPerWord] >> (i % kPerWord * bits); }
    LION8BIT_FN void put(int32_t i, uint32_t pattern) {  // once per element; words start as zero
        words[i / kPerWord] |= pattern << (i % kPerWord * bits);
    }

    // Load and store all elements, at an address aligned to `kAlignment`.
    static constexpr int32_t kAlignment = kWords < 4 ? 4 * kWords : 16;
    LION8BIT_FN void load_whole(const T* from) {
        if constexpr (kWords == 1) {
            words[0] = load(reinterpret_cast<const uint32_t*>(from));
        } else if constexpr (kWords == 2) {
            const uint2 a = load(reinterpret_cast<const uint2*>(from));
            words[0] = a.x, words[1] = a.y;
        } else {
#pragma unroll
            for (int32_t w = 0; w < kWords; w += 4) {
                const uint4 a = load(reinterpret_cast<const uint4*>(from) + w / 4);
                words[w] = a.x, words[w + 1] = a.y, words[w + 2] = a.z, words[w + 3] = a.w;
            }
        }
    }
    LION8BIT_FN void store_whole(T* to) const {
        if constexpr (kWords == 1) {
            store(reinterpret_cast<uint32_t*>(to), words[0]);
        } else if constexpr (kWords == 2) {
            store(reinterpret_cast<uint2*>(to), {words[0], words[1]});
        } else {
#pragma unroll
            for (int32_t w = 0; w < kWords; w += 4) {
                store(reinterpret_cast<uint4*>(to) + w / 4, {words[w], words[w + 1], words[w + 2], words[w + 3]});
            }
        }
    }

    // Load and store the first `count` elements, at most all, at any address. The others are loaded as zero. Of two
    // elements in one T both are stored, because a row does not share a T with the next one.
    LION8BIT_FN void load_part(const T* from, int32_t count) {
        *this = {};
#pragma unroll
        for (int32_t i = 0; i < kPerLane; i += kPerT) {
            if (i < count) put(i, i + kPerT > count ? from[i / kPerT] & 0xfu : from[i / kPerT]);
        }
    }
    LION8BIT_FN void store_part(T* to, int32_t count) const {
#pragma unroll
        for (int32_t i = 0; i < kPerLane; i += kPerT) {
            if (i < count) to[i / kPerT] = static_cast<T>(get(i));
        }
    }
};

// The code in the low bits of a word.
template <int32_t bits> LION8BIT_FN float code_of(uint32_t word) {
    return static_cast<float>(static_cast<int32_t>(word << (32 - bits)) >> (32 - bits));
}
template <> LION8BIT_FN float code_of<8>(uint32_t word) { return static_cast<float>(static_cast<int8_t>(word)); }

template <int32_t dtype> LION8BIT_FN float to_float(uint32_t pattern) {
    if constexpr (dtype == kFloat32) return bit_cast<float>(pattern);
    if constexpr (dtype == kBfloat16) return from_bfloat16<float>(pattern & 0xffffu);
    if constexpr (dtype == kFloat16) {
#if defined(__CUDA_ARCH__)  // the same in one instruction
        float x;
        asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(pattern)));
        return x;
#else
        return from_float16<float>(pattern & 0xffffu);
#endif
    }
}

// Whether `pack` handles NaN without a test.
template <int32_t rounding> LION8BIT_FN constexpr bool packs_nan() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    return rounding == kNearest;
#else
    return false;
#endif
}

// Packs two parameters into one word, with 16 random bits for each. `number`: neither is NaN.
template <int32_t dtype, int32_t rounding, bool number>
LION8BIT_FN uint32_t pack(float low, float high, uint32_t random) {
    if constexpr (packs_nan<rounding>()) {  // the same in one instruction, except for the bits of a NaN
#if defined(__CUDA_ARCH__)
        uint32_t packed;
        if constexpr (dtype == kBfloat16) {
            asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
        } else {
            asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
        }
        return packed;
#endif
    }
    if constexpr (dtype == kBfloat16) {
        return to_bfloat16<rounding, number>(low, random & 0xffffu) | to_bfloat16<rounding, number>(high, random >> 16)
                                                                          << 16;
    } else {
        return to_float16<rounding>(low, random & 0xffffu) | to_float16<rounding>(high, random >> 16) << 16;
    }
}

// False only if all numbers are finite; 2^120 and above counts as infinite. May be true for finite numbers too.
template <int32_t dtype, class Grads> LION8BIT_FN bool suspicious(const Grads& grads) {
    constexpr uint32_t mask = dtype == kFloat32 ? 0x7fffffffu : 0x7fff7fffu;
    constexpr uint32_t to_top_bit = dtype == kFloat32    ? 0x80000000u - kOverflowBits
                                    : dtype == kBfloat16 ? (0x8000u - (kOverflowBits >> 16)) * 0x10001u
                                                         : (0x8000u - 0x7c00u) * 0x10001u;
    uint32_t sums = 0;
#pragma unroll
    for (int32_t w = 0; w < Grads::kWords; ++w) sums |= (grads.words[w] & mask) + to_top_bit;
    return (sums & ~mask) != 0;
}

// The OR of all numbers, in both halves of the word if two numbers share one.
template <class T> LION8BIT_FN uint32_t joined(const Elements<T>& numbers) {
    uint32_t bits = 0;
#pragma unroll
    for (int32_t w = 0; w < Elements<T>::kWords; ++w) bits |= numbers.words[w];
    return bits;
}
// Bits that `joined` has if some number is not zero, and if some is 2 or more in magnitude.
template <class T> constexpr uint32_t kNonzeroBits = sizeof(T) == 4 ? 0x7fffffffu : 0x7fff7fffu;
template <class T> constexpr uint32_t kLargeBits = sizeof(T) == 4 ? 0x40000000u : 0x40004000u;

// Not 0 if some of the 16-bit numbers is zero.
LION8BIT_FN uint32_t zeros(const Elements<uint16_t>& numbers) {
    uint32_t nonzero = 0xffffffffu;
#pragma unroll
    for (const uint32_t word : numbers.words) nonzero &= (word & 0x7fff7fffu) + 0x7fff7fffu;
    return ~nonzero & 0x80008000u;
}

template <bool value_> struct Constant {
    static constexpr bool value = value_;
};

// Keeps a value that is the same for a whole warp in a register of each thread. Otherwise the compiler would copy it
// there for each use. The assembly ORs a zero into the value, which the compiler cannot know.
template <class T> LION8BIT_FN void keep([[maybe_unused]] T& value) {
#if defined(__CUDA_ARCH__)
    uint32_t bits_ = bit_cast<uint32_t>(value);
    asm volatile("{.reg .u32 a; mov.u32 a, %%lanemask_lt; shr.u32 a, a, 31; or.b32 %0, %0, a;}" : "+r"(bits_));
    value = bit_cast<T>(bits_);
#endif
}
LION8BIT_FN bool aligned(const void* pointer, uint64_t bytes) {
    return reinterpret_cast<uint64_t>(pointer) % bytes == 0;
}

LION8BIT_FN int32_t at_most(int64_t count, int32_t most) { return count < most ? static_cast<int32_t>(count) : most; }

// ---- What device memory decides -------------------------------------------------------------------------------------

struct Decision {
    Hyper hyper;
    uint32_t step;
    bool last;  // this CUDA block counts the update, because all others have read their counters
};

template <class Launch> LION8BIT_FN Counter& counter_of(const Launch& launch, const TensorRow& tensor) {
    return launch.counters[tensor.step & ~kUncounted];
}

template <class Launch> LION8BIT_FN Decision decide(const Launch& launch, const TensorRow& tensor) {
    Decision decision = {launch.hypers[tensor.hyper], 0, false};
    Hyper& hyper = decision.hyper;
    const DeviceRate& rate = launch.rates[tensor.hyper];
    if (rate.lr) {  // the formulas of make_hyper in Python; values below 0, which the host refuses, count as 0
        hyper.lr = *rate.lr < 0.0f ? 0.0f : *rate.lr;
        const double decay = 1.0 - static_cast<double>(hyper.lr) / rate.divisor * rate.weight_decay;
        hyper.decay = decay < 0.0 ? 0.0f : static_cast<float>(decay);
    }
    if (launch.grad_scale) hyper.unscale = static_cast<float>(1.0 / static_cast<double>(*launch.grad_scale));
    decision.step = static_cast<uint32_t>(counter_of(launch, tensor).updates) + 1;
    __threadfence();  // the counter must be read before others see that this block has arrived
    unsigned long long& arrived = counter_of(launch, launch.tensors[0]).arrived;
    decision.last = atomicAdd(&arrived, 1ull) == gridDim.x - 1;
    if (decision.last) arrived = 0;
    return decision;
}

// ---- The kernel -----------------------------------------------------------------------------------------------------

// Steps the share of one CUDA block. The template arguments are common to all tensors of a launch.
template <int32_t param_dtype, int32_t grad_dtype, int32_t momentum_bits, int32_t block_size, int32_t rounding,
          bool general, bool on_device, class Launch>
LION8BIT_FN void update_tile(const Launch& launch) {
    using Param = ElementOf<param_dtype>;
    using Grad = ElementOf<grad_dtype>;
    using Byte = typename PatternOf<1>::type;
    using Momentum = typename PatternOf<momentum_bits == 32 ? 4 : 1>::type;
    constexpr bool quantized = momentum_bits < 32;
    constexpr int32_t kLanes = block_size / kPerLane;
    constexpr int32_t kBlocksPerPass = kThreads / kLanes;
    constexpr int32_t kStride = kThreads * kPerLane;  // elements from one pass to the next
    struct Loaded {                                   // what a thread reads in one pass
        Elements<Param> params;
        Elements<Grad> grads;
        Elements<Momentum, momentum_bits> momenta;
        Elements<Byte> residuals;
        float scale = 0.0f;
    };

    const int32_t tile = static_cast<int32_t>(blockIdx.x);
    int32_t index = 0;  // the last tensor whose first tile is at or before this one
    for (int32_t end = launch.count; end - index > 1;) {
        const int32_t middle = (index + end) / 2;
        (launch.first_tile[middle] <= tile ? index : end) = middle;
    }
    const TensorRow& tensor = launch.tensors[index];
    Hyper hyper = launch.hypers[tensor.hyper];
    uint32_t update = tensor.step;
    if constexpr (on_device) {
        if (launch.found_inf && *launch.found_inf != 0.0f) return;
        __shared__ Decision decision;
        if (threadIdx.x == 0) decision = decide(launch, tensor);
        __syncthreads();
        hyper = decision.hyper;
        update = decision.step;
        if (decision.last) {
            for (int32_t i = threadIdx.x; i < launch.count; i += kThreads) {
                if (launch.tensors[i].step < kUncounted) ++counter_of(launch, launch.tensors[i]).updates;
            }
        }
    }
    // If rows end with a whole block, they are treated as one row, unless the whole parameter has more elements between
    // them.
    const bool together = rounding != kStochastic || tensor.row_stride == static_cast<uint32_t>(tensor.cols);
    const bool seamless = tensor.rows == 1 || (tensor.cols % block_size == 0 && together);
    const int64_t cols = seamless ? tensor.rows * tensor.cols : tensor.cols;
    const int64_t row_blocks = blocks_per_row(cols, block_size);
    const int64_t blocks = seamless ? row_blocks : tensor.rows * row_blocks;
    const int64_t first_block =
        static_cast<int64_t>(tile - launch.first_tile[index]) * launch.passes * kBlocksPerPass;  // of this tile
    const int64_t row = seamless ? 0 : first_block / row_blocks;
    const int64_t in_row = first_block - row * row_blocks;
    const int32_t thread = static_cast<int32_t>(threadIdx.x);
    const int32_t lane = static_cast<int32_t>(threadIdx.x % kLanes);
    const int32_t thread_block = static_cast<int32_t>(threadIdx.x / kLanes);
    // The first element of this thread in its first pass, if the row does not end before it.
    const int64_t first_element = row * cols + in_row * block_size + thread * kPerLane;
    auto* param = static_cast<Param*>(tensor.param) + first_element;
    const auto* grad = static_cast<const Grad*>(tensor.grad) + first_element;
    auto* momentum = static_cast<Momentum*>(tensor.momentum) +
                     momentum_index<momentum_bits>(row, in_row * block_size + thread * kPerLane, cols);
    auto* residual = reinterpret_cast<Byte*>(tensor.residual) + first_element;
    float* scales = tensor.scales + first_block + thread_block;
    const bool vectors = (seamless || cols % kPerLane == 0) && aligned(tensor.param, 16) && aligned(tensor.grad, 16) &&
                         aligned(tensor.momentum, Elements<Momentum, momentum_bits>::kAlignment) &&
                         (rounding != kCompensated || aligned(tensor.residual, Elements<Byte>::kAlignment));
    uint32_t key = random_key(tensor.seed, update);
    keep(key);
    keep(hyper.lr);

    // Within a tile 32 bits are enough. Larger values are cut to kMany.
    const int32_t tile_blocks = at_most(blocks - first_block, launch.passes * kBlocksPerPass);
    const int32_t blocks_in_row = at_most(row_blocks, kMany), elements_in_row = at_most(cols, kMany);
    const int32_t blocks_to_end = at_most(row_blocks - in_row, kMany);  // of the row in which the tile begins
    const int32_t elements_to_end = at_most(cols - in_row * block_size, kMany) - thread * kPerLane;
    const int32_t gap = static_cast<int32_t>(row_blocks * block_size - cols);  // missing elements of a row's last block
    const uint32_t first_index =  // of this thread's first element, in the whole parameter
        tensor.first + static_cast<uint32_t>(row) * tensor.row_stride +
        static_cast<uint32_t>(in_row * block_size + thread * kPerLane);
    const int32_t whole_from = vectors ? kPerLane : kMany + 1;  // least number of elements left for vector access
    const uint32_t group = (kFullWarp >> (32 - kLanes)) << (threadIdx.x % 32 / kLanes * kLanes);  // lanes of a block
    // Below these limits, a step whose gradient and parameter are below 2^120 cannot give NaN.
    const uint32_t wild = magnitude(hyper.lr) < 2.0f && magnitude(hyper.decay) < 2.0f ? 0 : 1;
    constexpr int32_t kHalve = momentum_bits == 4;  // two elements in a byte
    const auto load_whole = [&](Loaded& loaded, int32_t offset) {
        if constexpr (rounding == kCompensated) loaded.residuals.load_whole(residual + offset);
        loaded.momenta.load_whole(momentum + (offset >> kHalve));
        loaded.params.load_whole(param + offset);
        loaded.grads.load_whole(grad + offset);
    };
    // The same for momentum where vectors are not whole. Codes of 4 bits have half a byte more in each odd row.
    const auto partial_offset = [&](int32_t pass_block, int32_t offset) {
        if (momentum_bits != 4 || gap % 2 == 0) return offset >> kHalve;
        const int32_t rows = (pass_block * block_size - offset) / gap;  // that ended since the first pass
        return (offset + rows) >> kHalve;
    };
    int32_t nonfinite = 0;
    Loaded next;  // already loaded for this pass, if `is_ahead`
    bool is_ahead = false;
    for (int32_t pass_block = 0; pass_block < tile_blocks; pass_block += kBlocksPerPass) {
        // Threads without elements run too, because every lane of a warp takes part in the shuffles.
        const int32_t block = pass_block + thread_block;
        int32_t offset = pass_block * block_size;  // from this thread's first element
        int32_t left = elements_to_end - offset;   // in this row
        uint32_t element = first_index;
        if (block >= blocks_to_end) {
            const uint32_t beyond = block - blocks_to_end, row_length = blocks_in_row;
            const int32_t rows = static_cast<int32_t>(beyond / row_length);
            const int32_t in_this_row = static_cast<int32_t>(beyond % row_length);
            offset -= (rows + 1) * gap;
            element += static_cast<uint32_t>(rows + 1) * (tensor.row_stride - static_cast<uint32_t>(cols));
            left = block < tile_blocks ? elements_in_row - in_this_row * block_size - lane * kPerLane : 0;
        }
        element += static_cast<uint32_t>(offset);
        const bool whole = left >= whole_from;

        Loaded now;
        if (is_ahead) {
            now = next;
        } else {
            // The scale is loaded first; after the first use of the vectors its load would wait for them.
            if (quantized && block < tile_blocks) now.scale = scales[pass_block];
            if (whole) {
                load_whole(now, offset);
            } else {
                if constexpr (rounding == kCompensated) now.residuals.load_part(residual + offset, left);
                now.momenta.load_part(momentum + partial_offset(pass_block, offset), left);
                now.params.load_part(param + offset, left);
                now.grads.load_part(grad + offset, left);
            }
        }
        if constexpr (kAhead != kNothing) {
            // Only if the thread's next elements are whole and in the same row.
            is_ahead = pass_block + kBlocksPerPass < tile_blocks && left - kStride >= whole_from;
            if (is_ahead && kAhead == kToRegisters) {
                if constexpr (quantized) next.scale = scales[pass_block + kBlocksPerPass];
                load_whole(next, offset + kStride);
            } else if (is_ahead) {
                prefetch(param + offset + kStride);
                prefetch(grad + offset + kStride);
                prefetch(momentum + ((offset + kStride) >> kHalve));
                if constexpr (rounding == kCompensated) prefetch(residual + offset + kStride);
                is_ahead = false;
            }
        }
        Codec codec = {};
        if constexpr (quantized) codec = decoder<momentum_bits>(now.scale);

        // Ordinary: no element needs a test. A few instructions on whole words check this for all elements.
        constexpr bool nan_matters = param_dtype == kBfloat16 && !packs_nan<rounding>();
        const uint32_t grad_bits = joined(now.grads);
        uint32_t doubts = grad_bits & kLargeBits<Grad>;
        if constexpr (nan_matters) doubts |= (joined(now.params) & kLargeBits<Param>) | wild;
        if constexpr (rounding == kCompensated) doubts |= zeros(now.params);
        if constexpr (rounding == kStochastic)
            doubts |= element % 2;  // the first element has the second half of a random word
        const auto ordinary = [&] {
            if constexpr (rounding == kCompensated) {
                if (zeros(now.params)) return false;
            }
            if constexpr (nan_matters) {
                if (wild || suspicious<param_dtype>(now.params)) return false;
            }
            if constexpr (rounding == kStochastic) {
                if (element % 2) return false;
            }
            return !suspicious<grad_dtype>(now.grads);
        };

        float m[kPerLane], largest = 0.0f;
        bool touched = !general && (grad_bits & kNonzeroBits<Grad>) != 0;
        Elements<Param> moved;
        Elements<Byte> moved_residuals = {};
        const auto step = [&](auto ordinary_) {
            constexpr bool plain = decltype(ordinary_)::value;
            // With flags, coupled decay or unscaling may make a finite gradient infinite.
            constexpr bool trusted = plain && !general;
            float p[kPerLane];
            [[maybe_unused]] int32_t bad = 0;
#pragma unroll
            for (int32_t i = 0; i < kPerLane; ++i) {
                if constexpr (rounding == kCompensated) {
                    const auto signed_residual = static_cast<int32_t>(static_cast<int8_t>(now.residuals.get(i)));
                    p[i] = from_compensated<float, plain>(now.params.get(i) & 0xffffu,
                                                          static_cast<uint32_t>(signed_residual) << 8);
                } else {
                    p[i] = to_float<param_dtype>(now.params.get(i));
                }
                if constexpr (quantized) {
                    m[i] = decode<momentum_bits>(code_of<momentum_bits>(now.momenta.get(i)), codec);
                } else {
                    m[i] = bit_cast<float>(now.momenta.get(i));
                }
                float g = to_float<grad_dtype>(now.grads.get(i));
                const bool skipped = lion_step<general, trusted>(hyper, p[i], g, m[i]);
                if constexpr (!trusted) (general ? bad : nonfinite) += skipped;
                largest = fmaxf(largest, magnitude(m[i]));
                if constexpr (general) touched |= g != 0.0f;
            }
            // Padding is skipped only if a constant of the group is infinite or NaN. Then every element is.
            if constexpr (general) nonfinite += left <= 0 ? 0 : bad < left ? bad : left;
            if constexpr (param_dtype == kFloat32) {
#pragma unroll
                for (int32_t i = 0; i < kPerLane; ++i) moved.words[i] = bit_cast<uint32_t>(p[i]);
            } else if constexpr (rounding == kCompensated) {
                moved = {};
#pragma unroll
                for (int32_t i = 0; i < kPerLane; ++i) {
                    const uint32_t rounded = to_24_bits<plain>(p[i]);
                    moved.put(i, bfloat16_part(rounded));
                    moved_residuals.put(i, residual_part(rounded) & 0xffu);
                }
            } else {
#pragma unroll
                for (int32_t i = 0; i < kPerLane; i += 2) {
                    uint32_t random = 0;
                    if constexpr (rounding == kStochastic) {
                        const uint32_t first = element + static_cast<uint32_t>(i);
                        random = random_word(key, plain ? first : first & ~1u);
                        if (!plain && element % 2) random = random >> 16 | random_word(key, first + 1) << 16;
                    }
                    moved.words[i / 2] = pack<param_dtype, rounding, plain>(p[i], p[i + 1], random);
                }
            }
        };
        if (doubts == 0 || ordinary()) {
            step(Constant<true>());
        } else {
            step(Constant<false>());
        }
        if (whole) {
            moved.store_whole(param + offset);
            if constexpr (rounding == kCompensated) moved_residuals.store_whole(residual + offset);
        } else {
            moved.store_part(param + offset, left);
            if constexpr (rounding == kCompensated) moved_residuals.store_part(residual + offset, left);
        }

        Elements<Momentum, momentum_bits> stored = {};
        bool idle = false;
        if constexpr (quantized) {
            float scale = decayed_scale(now.scale, hyper.beta);
            idle = (__ballot_sync(kFullWarp, touched) & group) == 0 && scale >= kMinScale;
#pragma unroll
            for (int32_t distance = kLanes / 2; distance > 0; distance /= 2) {
                largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, distance));
            }
            if (!idle) scale = stored_scale(largest);
            codec = encoder<momentum_bits>(scale);
#pragma unroll
            for (int32_t i = 0; i < kPerLane; ++i) {
                stored.put(i, static_cast<uint32_t>(encode(root(m[i], codec), codec)) & ((1u << momentum_bits) - 1));
            }
            if (lane == 0 && block < tile_blocks) scales[pass_block] = scale;
        } else {
#pragma unroll
            for (int32_t i = 0; i < kPerLane; ++i) stored.put(i, bit_cast<uint32_t>(m[i]));
        }
        if (idle) continue;
        if (whole) {
            stored.store_whole(momentum + (offset >> kHalve));
        } else {
            stored.store_part(momentum + partial_offset(pass_block, offset), left);
        }
    }

    if (__any_sync(kFullWarp, nonfinite != 0)) {
#pragma unroll
        for (int32_t distance = 16; distance > 0; distance /= 2) {
            nonfinite += __shfl_xor_sync(kFullWarp, nonfinite, distance);
        }
        if (threadIdx.x % 32 == 0) atomicAdd(launch.nonfinite, static_cast<unsigned long long>(nonfinite));
    }
}

}  // namespace lion8bit

#if defined(LION8BIT_PARAM_DTYPE)
extern "C" __global__ void __launch_bounds__(lion8bit::kThreads, LION8BIT_RESIDENT)
    lion8bit_update(const __grid_constant__ lion8bit::Launch<LION8BIT_TENSORS, LION8BIT_HYPERS> launch) {
    lion8bit::update_tile<LION8BIT_PARAM_DTYPE, LION8BIT_GRAD_DTYPE, LION8BIT_MOMENTUM_BITS, LION8BIT_BLOCK_SIZE,
                          LION8BIT_WEIGHT_ROUNDING, LION8BIT_GENERAL, LION8BIT_ON_DEVICE>(launch);
}
#endif
