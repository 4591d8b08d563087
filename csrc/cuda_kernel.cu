// Owns the CUDA kernel: how threads walk the blocks of many tensors in one launch; the arithmetic is block_math.h's.
//
// lion8bit/cuda.py compiles it with NVRTC, one module per combination of the LION8BIT_* macros at the end, and packs
// the Launch. Each thread holds 8 consecutive elements in registers, block_size / 8 neighbouring threads hold a block,
// and the largest new momentum of a block travels between them by shuffles, so that each byte is read once and written
// once.
#include "block_math.h"

namespace lion8bit {

constexpr int32_t kThreads = 256;  // of a CUDA block
constexpr int32_t kPerLane = 8;    // consecutive elements of a thread
constexpr uint32_t kFullWarp = 0xffffffffu;

// A learning rate in device memory, of one parameter group.
struct Rate {
    const float* lr;  // [1]; null where Hyper has the rate already
    double divisor;   // decay = 1 - lr / divisor * weight_decay
    double weight_decay;
};

// The updates of one parameter, where the device decides whether there is one.
struct Counter {
    unsigned long long updates;
    unsigned long long arrived;  // of the launch whose first tensor this is: CUDA blocks that have read their counter
};
constexpr uint32_t kUncounted = 1u << 31;  // beside the index in Tensor::step: a later piece will count this update

// All that one launch works on, passed by value: no table on the device, no copy, and a CUDA graph keeps it.
// What stands after `nonfinite` up to `counters`, and `rates`, is read where the kernel is compiled for it (on_device).
template <int32_t tensor_capacity, int32_t hyper_capacity> struct Launch {
    unsigned long long* nonfinite;        // [1], counts elements skipped for a bad gradient
    const float* grad_scale;              // [1], what gradients are to be divided by; or null
    const float* found_inf;               // [1], nothing is written where it is not 0; or null
    Counter* counters;                    // indexed by Tensor::step, see counter_of
    int32_t count;                        // tensors in use, at least 1
    int32_t passes;                       // a CUDA block steps passes * kThreads * kPerLane elements
    int32_t first_tile[tensor_capacity];  // index of the first CUDA block of each tensor, ascending from 0
    Tensor tensors[tensor_capacity];      // none of them empty, unless on_device
    Hyper hypers[hyper_capacity];         // indexed by Tensor::hyper
    Rate rates[hyper_capacity];           // likewise
};

// ---- Eight consecutive elements of a thread, as they lie in memory --------------------------------------------------

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

template <class T> struct Octet {
    static constexpr int32_t kPerWord = 4 / sizeof(T);
    static constexpr int32_t kWords = kPerLane / kPerWord;
    uint32_t words[kWords];

    LION8BIT_FN uint32_t get(int32_t i) const { return words[i / kPerWord] >> (i % kPerWord * 8 * sizeof(T)); }
    LION8BIT_FN void put(int32_t i, uint32_t pattern) {  // once per element, from all zero
        words[i / kPerWord] |= pattern << (i % kPerWord * 8 * sizeof(T));
    }

    // All 8 elements, at an address aligned to their size, or to 16 bytes where they are larger.
    LION8BIT_FN void load_whole(const T* from) {
        if constexpr (sizeof(T) == 1) {
            const uint2 a = *reinterpret_cast<const uint2*>(from);
            words[0] = a.x, words[1] = a.y;
        } else {
#pragma unroll
            for (int32_t w = 0; w < kWords; w += 4) {
                const uint4 a = reinterpret_cast<const uint4*>(from)[w / 4];
                words[w] = a.x, words[w + 1] = a.y, words[w + 2] = a.z, words[w + 3] = a.w;
            }
        }
    }
    LION8BIT_FN void store_whole(T* to) const {
        if constexpr (sizeof(T) == 1) {
            *reinterpret_cast<uint2*>(to) = {words[0], words[1]};
        } else {
#pragma unroll
            for (int32_t w = 0; w < kWords; w += 4) {
                reinterpret_cast<uint4*>(to)[w / 4] = {words[w], words[w + 1], words[w + 2], words[w + 3]};
            }
        }
    }

    // The first `count` elements, at any address; the others read as `padding`.
    LION8BIT_FN void load_part(const T* from, int32_t count, uint32_t padding) {
        *this = {};
#pragma unroll
        for (int32_t i = 0; i < kPerLane; ++i) put(i, i < count ? from[i] : padding);
    }
    LION8BIT_FN void store_part(T* to, int32_t count) const {
#pragma unroll
        for (int32_t i = 0; i < kPerLane; ++i) {
            if (i < count) to[i] = static_cast<T>(get(i));
        }
    }
};

template <int32_t dtype> LION8BIT_FN float to_float(uint32_t pattern) {
    if constexpr (dtype == kFloat32) return bit_cast<float>(pattern);
    if constexpr (dtype == kBfloat16) return from_bfloat16<float>(pattern & 0xffffu);
    if constexpr (dtype == kFloat16) {
#if defined(__CUDA_ARCH__)  // one instruction for the same
        float x;
        asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(static_cast<uint16_t>(pattern)));
        return x;
#else
        return from_float16<float>(pattern & 0xffffu);
#endif
    }
}

// Two parameters as they are stored, with 16 random bits for each. `number`: neither is a NaN.
template <int32_t dtype, int32_t rounding, bool number>
LION8BIT_FN uint32_t pack(float low, float high, uint32_t random) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800  // one instruction for the same, but for the bits of a NaN
    if constexpr (rounding == kNearest) {
        uint32_t packed;
        if constexpr (dtype == kBfloat16) {
            asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
        } else {
            asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
        }
        return packed;
    }
#endif
    if constexpr (dtype == kBfloat16) {
        return to_bfloat16<rounding, number>(low, random & 0xffffu) | to_bfloat16<rounding, number>(high, random >> 16)
                                                                          << 16;
    } else {
        return to_float16<rounding>(low, random & 0xffffu) | to_float16<rounding>(high, random >> 16) << 16;
    }
}

// Whether some of the gradients are not finite (2^120 and above counts as infinite), or may not be.
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

// Whether some of the gradients are not zero.
template <int32_t dtype, class Grads> LION8BIT_FN bool nonzero(const Grads& grads) {
    uint32_t joined = 0;
#pragma unroll
    for (int32_t w = 0; w < Grads::kWords; ++w) joined |= grads.words[w];
    return (joined & (dtype == kFloat32 ? 0x7fffffffu : 0x7fff7fffu)) != 0;
}

template <bool value_> struct Constant {
    static constexpr bool value = value_;
};

LION8BIT_FN bool aligned(const void* pointer, uint64_t bytes) {
    return reinterpret_cast<uint64_t>(pointer) % bytes == 0;
}

// ---- What device memory decides -------------------------------------------------------------------------------------

struct Decision {
    Hyper hyper;
    uint32_t step;
    bool last;  // this is the CUDA block that counts the update: all others have read their counters
};

template <class Launch> LION8BIT_FN Counter& counter_of(const Launch& launch, const Tensor& tensor) {
    return launch.counters[tensor.step & ~kUncounted];
}

template <class Launch> LION8BIT_FN Decision decide(const Launch& launch, const Tensor& tensor) {
    Decision decision = {launch.hypers[tensor.hyper], 0, false};
    Hyper& hyper = decision.hyper;
    const Rate& rate = launch.rates[tensor.hyper];
    if (rate.lr) {  // the formulas of make_hyper in lion8bit/layout.py
        hyper.lr = *rate.lr;
        hyper.decay = static_cast<float>(1.0 - static_cast<double>(hyper.lr) / rate.divisor * rate.weight_decay);
    }
    if (launch.grad_scale) hyper.unscale = static_cast<float>(1.0 / static_cast<double>(*launch.grad_scale));
    decision.step = static_cast<uint32_t>(counter_of(launch, tensor).updates) + 1;
    __threadfence();  // the counter is read before this block is seen to have arrived
    unsigned long long& arrived = counter_of(launch, launch.tensors[0]).arrived;
    decision.last = atomicAdd(&arrived, 1ull) == gridDim.x - 1;
    if (decision.last) arrived = 0;
    return decision;
}

// ---- The kernel -----------------------------------------------------------------------------------------------------

// The share of one CUDA block. The template arguments are what all tensors of a launch have in common.
template <int32_t param_dtype, int32_t grad_dtype, bool quantized, int32_t block_size, int32_t rounding, bool general,
          bool on_device, class Launch>
LION8BIT_FN void update_tile(const Launch& launch) {
    using Param = ElementOf<param_dtype>;
    using Grad = ElementOf<grad_dtype>;
    using Byte = typename PatternOf<1>::type;
    using Momentum = typename PatternOf<quantized ? 1 : 4>::type;
    constexpr int32_t kLanes = block_size / kPerLane;
    constexpr int32_t kBlocksPerPass = kThreads / kLanes;

    const int32_t tile = static_cast<int32_t>(blockIdx.x);
    int32_t index = 0;  // the last tensor whose first tile is not beyond this one
    for (int32_t end = launch.count; end - index > 1;) {
        const int32_t middle = (index + end) / 2;
        (launch.first_tile[middle] <= tile ? index : end) = middle;
    }
    const Tensor& tensor = launch.tensors[index];
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
    auto* const param = static_cast<Param*>(tensor.param);
    const auto* const grad = static_cast<const Grad*>(tensor.grad);
    auto* const momentum = static_cast<Momentum*>(tensor.momentum);
    auto* const residual = reinterpret_cast<Byte*>(tensor.residual);
    float* const scales = tensor.scales;
    const int64_t cols = tensor.cols;
    const int64_t row_blocks = blocks_per_row(cols, block_size);
    const int64_t blocks = tensor.rows * row_blocks;
    const bool flat = tensor.rows == 1 || cols % block_size == 0;  // block b starts at element b * block_size
    const int64_t run = flat ? tensor.rows * cols : cols;          // elements from one short block to the next
    const bool vector = (tensor.rows == 1 || cols % kPerLane == 0) && aligned(param, 16) && aligned(grad, 16) &&
                        aligned(momentum, quantized ? 8 : 16) && (rounding != kCompensated || aligned(residual, 8));
    RandomKey key = random_key(tensor.seed, update);
#if defined(__CUDA_ARCH__)
    asm volatile("" : "+r"(key.low), "+r"(key.high));  // or the compiler computes it anew in every pass
#endif

    const int32_t lane = static_cast<int32_t>(threadIdx.x) % kLanes;
    int64_t first_of_pass = static_cast<int64_t>(tile - launch.first_tile[index]) * launch.passes * kBlocksPerPass;
    int32_t nonfinite = 0;
    for (int32_t pass = 0; pass < launch.passes && first_of_pass < blocks; ++pass, first_of_pass += kBlocksPerPass) {
        // Threads without elements go along: every lane of a warp takes part in the shuffles.
        const int64_t block = first_of_pass + static_cast<int32_t>(threadIdx.x) / kLanes;
        int64_t in_run = block * block_size, offset = in_run;
        if (!flat) {
            const int64_t row = (block >> 31) == 0 && (row_blocks >> 31) == 0
                                    ? static_cast<uint32_t>(block) / static_cast<uint32_t>(row_blocks)
                                    : block / row_blocks;
            in_run = (block - row * row_blocks) * block_size;
            offset = row * cols + in_run;
        }
        offset += lane * kPerLane;
        const int64_t left = block < blocks ? run - in_run - lane * kPerLane : 0;
        const int32_t count = left >= kPerLane ? kPerLane : left > 0 ? static_cast<int32_t>(left) : 0;
        const bool whole = vector && count == kPerLane;

        Octet<Param> params;
        Octet<Grad> grads;
        Octet<Momentum> momenta;
        Octet<Byte> residuals;
        if (whole) {
            if constexpr (rounding == kCompensated) residuals.load_whole(residual + offset);
            momenta.load_whole(momentum + offset);
            params.load_whole(param + offset);
            grads.load_whole(grad + offset);
        } else {
            if constexpr (rounding == kCompensated) residuals.load_part(residual + offset, count, 0);
            momenta.load_part(momentum + offset, count, quantized ? uint32_t(kZeroCode & 0xff) : 0);
            params.load_part(param + offset, count, 0);
            grads.load_part(grad + offset, count, 0);
        }
        Codec codec = {};
        float old_scale = 0.0f;
        if constexpr (quantized) {
            if (block < blocks) old_scale = scales[block];
            codec = decoder(old_scale);
        }

        float p[kPerLane], m[kPerLane];
        float largest = 0.0f;
        bool touched = !general && nonzero<grad_dtype>(grads);
        const auto step = [&](auto trusted) {
#pragma unroll
            for (int32_t i = 0; i < kPerLane; ++i) {
                if constexpr (rounding == kCompensated) {
                    const auto signed_residual = static_cast<int32_t>(static_cast<int8_t>(residuals.get(i)));
                    p[i] = from_compensated<float>(params.get(i) & 0xffffu, static_cast<uint32_t>(signed_residual));
                } else {
                    p[i] = to_float<param_dtype>(params.get(i));
                }
                if constexpr (quantized) {
                    m[i] = decode(static_cast<float>(static_cast<int8_t>(momenta.get(i))), codec);
                } else {
                    m[i] = bit_cast<float>(momenta.get(i));
                }
                float g = to_float<grad_dtype>(grads.get(i));
                const bool finite = !lion_step<general, decltype(trusted)::value>(hyper, p[i], g, m[i]);
                if constexpr (!decltype(trusted)::value) nonfinite += !finite;
                largest = fmaxf(largest, magnitude(m[i]));
                if constexpr (general) touched |= g != 0.0f;
            }
        };
        // One test for all gradients of a thread; with flags, decay may still make a finite gradient infinite.
        if (general || suspicious<grad_dtype>(grads)) {
            step(Constant<false>());
        } else {
            step(Constant<true>());
        }

        Octet<Param> moved;
        Octet<Byte> moved_residuals = {};
        if constexpr (param_dtype == kFloat32) {
#pragma unroll
            for (int32_t i = 0; i < kPerLane; ++i) moved.words[i] = bit_cast<uint32_t>(p[i]);
        } else {
            uint32_t random[kPerLane / 2] = {};
            if constexpr (rounding == kStochastic) {
                const uint32_t word_key = block_key(key, tensor.first_block + block);
                const uint32_t first_pair = static_cast<uint32_t>(lane * kPerLane / 2);
#pragma unroll
                for (uint32_t i = 0; i < kPerLane / 2; ++i) random[i] = random_word(word_key, first_pair + i);
            }
            const auto pack_all = [&](auto number) {
                constexpr bool number_ = decltype(number)::value;
                if constexpr (rounding == kCompensated) {
                    moved = {};
#pragma unroll
                    for (int32_t i = 0; i < kPerLane; ++i) {
                        const uint32_t rounded = to_24_bits<number_>(p[i]);
                        moved.put(i, bfloat16_part(rounded));
                        moved_residuals.put(i, residual_part(rounded) & 0xffu);
                    }
                } else {
#pragma unroll
                    for (int32_t i = 0; i < kPerLane; i += 2) {
                        moved.words[i / 2] = pack<param_dtype, rounding, number_>(p[i], p[i + 1], random[i / 2]);
                    }
                }
            };
            bool numbers = true;  // one branch instead of a choice for each element
#pragma unroll
            for (int32_t i = 0; i < kPerLane; ++i) numbers &= p[i] == p[i];
            if (numbers) {
                pack_all(Constant<true>());
            } else {
                pack_all(Constant<false>());
            }
        }
        if (whole) {
            moved.store_whole(param + offset);
            if constexpr (rounding == kCompensated) moved_residuals.store_whole(residual + offset);
        } else {
            moved.store_part(param + offset, count);
            if constexpr (rounding == kCompensated) moved_residuals.store_part(residual + offset, count);
        }

        Octet<Momentum> stored = {};
        bool idle = false;
        if constexpr (quantized) {
            const uint32_t group = (kFullWarp >> (32 - kLanes)) << (threadIdx.x % 32 / kLanes * kLanes);
            float scale = decayed_scale(old_scale, hyper.beta);
            idle = (__ballot_sync(kFullWarp, touched) & group) == 0 && scale >= kMinScale;
#pragma unroll
            for (int32_t distance = kLanes / 2; distance > 0; distance /= 2) {
                largest = fmaxf(largest, __shfl_xor_sync(kFullWarp, largest, distance));
            }
            if (!idle) scale = stored_scale(largest);
            codec = encoder(scale);
#pragma unroll
            for (int32_t i = 0; i < kPerLane; ++i) {
                stored.put(i, static_cast<uint32_t>(encode(m[i], codec)) & 0xffu);
            }
            if (lane == 0 && block < blocks) scales[block] = scale;
        } else {
#pragma unroll
            for (int32_t i = 0; i < kPerLane; ++i) stored.put(i, bit_cast<uint32_t>(m[i]));
        }
        if (idle) continue;
        if (whole) {
            stored.store_whole(momentum + offset);
        } else {
            stored.store_part(momentum + offset, count);
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
extern "C" __global__ void __launch_bounds__(lion8bit::kThreads)
    lion8bit_update(const __grid_constant__ lion8bit::Launch<LION8BIT_TENSORS, LION8BIT_HYPERS> launch) {
    lion8bit::update_tile<LION8BIT_PARAM_DTYPE, LION8BIT_GRAD_DTYPE, LION8BIT_QUANTIZED, LION8BIT_BLOCK_SIZE,
                          LION8BIT_WEIGHT_ROUNDING, LION8BIT_GENERAL, LION8BIT_ON_DEVICE>(launch);
}
#endif
