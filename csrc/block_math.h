// The momentum format and the arithmetic of one element, shared by all kernels.
//
// Functions are templates over the lane type F: `float` in the CUDA kernel, a SIMD vector of floats in the CPU kernel.
// Each operation rounds once, in the order written, without fused multiply-add (-ffp-contract=off, --fmad=false). So
// every backend gives the bits of lion8bit/reference.py, which is the specification.
#pragma once

#if defined(__CUDACC_RTC__)  // NVRTC has no standard headers
using int8_t = signed char;
using int16_t = short;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
#else
#include <cstdint>
#include <cstring>
using std::memcpy;
#endif

#if defined(__CUDACC__)
#define LION8BIT_FN __device__ __forceinline__
#else
#define LION8BIT_FN inline __attribute__((always_inline))
#endif

namespace lion8bit {

// ---- The state format, version 4 -----------------------------------------------------------------------------------
//
// A parameter is [rows, cols] in memory order. rows is shape[0], or 1 for a vector and where rows would be shorter than
// a block. A row has ceil(cols / block_size) blocks; the last one may be short.
//
//   codes   [rows, cols]            int8   -127..127; here and below 0 is an exact zero
//        or [rows, ceil(cols / 2)]  uint8  two codes of 4 bits, -7..7, the first one in the low half
//   scales  [rows, blocks_per_row]  fp32   s = max |m| over the block, or 0 if that is below kMinScale; its low byte is
//                                          the dither of the block

constexpr int32_t kFormatVersion = 4;
constexpr int32_t kMaxBlockSize = 256;                            // block sizes are 64, 128 and 256
template <int32_t bits> constexpr float kRangeSquared = 0;        // A * A by bits of a code
template <> inline constexpr float kRangeSquared<8> = 16002.25f;  // A = 126.5: |A + dither| rounds to at most 127
template <> inline constexpr float kRangeSquared<4> = 49.0f;      // A = 7: |A + dither| rounds to at most 7
constexpr float kMinScale = 0x1p-100f;                            // below it a block is all zero
constexpr int32_t kDitherMask = 0xff;                             // the scale's bits that hold the dither
constexpr int32_t kOverflowBits = (120 + 127) << 23;  // gradients of 2^120 and more count as infinite: no overflow

static_assert(126.5f * 126.5f == kRangeSquared<8>, "A * A must be exact");

enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };
enum WeightRounding : int32_t { kNearest = 0, kStochastic = 1, kCompensated = 2 };
enum Flag : uint32_t { kMaximize = 1, kCoupledDecay = 2, kCautious = 4, kUnscale = 8 };

// The options of one parameter group. Differences and products are formed in double and rounded to float once.
struct Hyper {
    float lr;             // length of a step
    float decay;          // factor on the parameter: 1 - lr * weight_decay, or 1 where decay is coupled
    float coupled_decay;  // coupled_decay * parameter is added to the gradient (kCoupledDecay)
    float blend;          // update = sign(blend * m + one_minus_blend * g)
    float one_minus_blend;
    float beta;  // m <- beta * m + one_minus_beta * g
    float one_minus_beta;
    float unscale;            // the gradient is multiplied by it first (kUnscale)
    uint32_t flags;           // Flag bits
    int32_t block_size;       // 64, 128 or 256
    int32_t weight_rounding;  // WeightRounding of 16-bit parameters; kCompensated is for bf16 only
};
static_assert(sizeof(Hyper) == 44, "mirrored by lion8bit/layout.py");

// One parameter with its gradient and state.
struct TensorRow {
    void* param;       // [rows, cols] of param_dtype, updated in place
    const void* grad;  // [rows, cols] of grad_dtype
    void* momentum;    // [rows, cols] int8 codes or fp32 values, or [rows, ceil(cols / 2)] uint8; updated in place
    float* scales;     // [rows, blocks_per_row] fp32, updated in place; null with fp32 momentum
    int8_t* residual;  // [rows, cols] int8, the next 8 bits of a bf16 param, updated in place; null unless kCompensated
    int64_t rows;
    int64_t cols;
    uint32_t first;       // index of the first element in the whole parameter, of which this may be a shard
    uint32_t row_stride;  // elements of the whole parameter from one row to the next; `first` and this are modulo 2^32
    uint32_t seed;        // of stochastic rounding; differs between parameters
    uint32_t step;        // number of this update, from 1; or an index into Launch::counters of the CUDA kernel
    int8_t param_dtype;   // Dtype
    int8_t grad_dtype;    // Dtype
    int16_t momentum_bits;  // 4, 8, or 32 for fp32
    int32_t hyper;          // index into the array of Hyper
};
static_assert(sizeof(TensorRow) == 80, "mirrored by lion8bit/layout.py");

LION8BIT_FN int64_t blocks_per_row(int64_t cols, int32_t block_size) { return (cols + block_size - 1) / block_size; }
// Index in TensorRow::momentum of the element at (row, col); of two codes in a byte, col must be even.
template <int32_t bits> LION8BIT_FN int64_t momentum_index(int64_t row, int64_t col, int64_t cols) {
    return bits == 4 ? row * ((cols + 1) / 2) + col / 2 : row * cols + col;
}

// ---- Lanes: what differs between a float and a vector of floats ----------------------------------------------------

template <class To, class From> LION8BIT_FN To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}

template <class F> struct LanesOf;  // what F needs besides operators; the SIMD specialisation is in the CPU kernel
#if defined(__CUDACC__) || defined(LION8BIT_EMULATED)
// IEEE square root and division without branches, for the arguments that occur here.
#if defined(__CUDACC__)
LION8BIT_FN float approximate_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
LION8BIT_FN float approximate_reciprocal_root(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#else  // defined by tests/emulator
float approximate_reciprocal(float x);
float approximate_reciprocal_root(float x);
#endif
template <> struct LanesOf<float> {
    using Int = int32_t;
    using Uint = uint32_t;
    // The root of |x| with the sign of x. These are the steps that nvcc emits for __fsqrt_rn on sm_75 to sm_120 where
    // |x| is neither tiny nor huge. Adding 2^-80 changes no |x| of 2^-55 or more, and keeps the reciprocal root finite
    // at 0. The root of a smaller |x| need not be exact, because it is far below the last bit of the dither.
    static LION8BIT_FN float signed_root(float x) {
        const float y = approximate_reciprocal_root(fabsf(x) + 0x1p-80f), size = fabsf(x) * y, root = x * y;
        return __fmaf_rn(__fmaf_rn(-root, size, x), y * 0.5f, root);
    }
    static LION8BIT_FN float subtract_where(bool condition, float a, float b) { return condition ? a - b : a; }
    static LION8BIT_FN int32_t truncate(float x) { return __float2int_rz(x); }
    // To nearest even. Adding 1.5 * 2^23 puts the integer at the end of the significand; only the low byte is valid.
    static LION8BIT_FN int32_t round(float x) { return bit_cast<int32_t>(x + 12582912.0f); }
    // A*A / scale. Both are divided by 4, so that the reciprocal never underflows. Exact for every significand, even if
    // the approximation is off by 4 units in the last place; tests/emulator tries them all.
    template <int32_t bits> static LION8BIT_FN float range_over(float scale) {
        constexpr float range = kRangeSquared<bits> * 0.25f;
        scale = scale * 0.25f;
        float y = approximate_reciprocal(scale);
        y = __fmaf_rn(__fmaf_rn(-scale, y, 1.0f), y, y);
        const float quotient = range * y;
        return __fmaf_rn(__fmaf_rn(-scale, quotient, range), y, quotient);
    }
};
#else
template <> struct LanesOf<float> {
    using Int = int32_t;
    using Uint = uint32_t;
    static LION8BIT_FN float subtract_where(bool condition, float a, float b) { return condition ? a - b : a; }
    static LION8BIT_FN int32_t truncate(float x) { return static_cast<int32_t>(x); }
    template <int32_t bits> static LION8BIT_FN float range_over(float scale) { return kRangeSquared<bits> / scale; }
};
#endif
template <class F> using Int = typename LanesOf<F>::Int;
template <class F> using Uint = typename LanesOf<F>::Uint;

template <class F> LION8BIT_FN Int<F> bits(F x) { return bit_cast<Int<F>>(x); }
template <class F> LION8BIT_FN F magnitude(F x) {
#if defined(__CUDACC__)
    return fabsf(x);  // an operand modifier, not an instruction
#else
    return bit_cast<F>(bits(x) & 0x7fffffff);
#endif
}
template <class F> LION8BIT_FN F copy_sign(F magnitude_, F sign) {
    return bit_cast<F>((bits(sign) & int32_t(0x80000000)) | bits(magnitude_));
}

// The 32-bit finaliser of MurmurHash3: a bijection; every output bit depends on every input bit.
template <class U> LION8BIT_FN U fmix32(U h) {
    h ^= h >> 16;
    h *= 0x85ebca6bu;
    h ^= h >> 13;
    h *= 0xc2b2ae35u;
    h ^= h >> 16;
    return h;
}

// ---- The momentum code ---------------------------------------------------------------------------------------------

// The constants of a block for encoding and decoding, all derived from its scale.
struct Codec {
    float dither;       // u in (-1/2, 1/2), the low byte of the scale
    float encode_gain;  // A*A / s, or 0 for an all-zero block
    float decode_gain;  // s * (1 / (A*A))
};

LION8BIT_FN float dither(float scale) {  // (byte + 1/2) / 256 - 1/2, exact; 0x43000000 is 128
    return bit_cast<float>((bits(scale) & kDitherMask) << 8 | 0x43000000) - (128.0f + 127.5f * 0x1p-8f);
}
LION8BIT_FN float stored_scale(float absmax) { return absmax < kMinScale ? 0.0f : absmax; }
template <int32_t bits> LION8BIT_FN Codec encoder(float scale) {
    return {dither(scale), scale == 0.0f ? 0.0f : LanesOf<float>::template range_over<bits>(scale), 0.0f};
}
template <int32_t bits> LION8BIT_FN Codec decoder(float scale) {
    return {dither(scale), 0.0f, scale * (1.0f / kRangeSquared<bits>)};
}

// The scale of a block whose momentum only decays: scale * beta, rounded so that the dither does not change. Then the
// codes need not change either. If the result is below kMinScale, the block must be encoded, to zeros.
LION8BIT_FN float decayed_scale(float scale, float beta) {
    const int32_t byte = bits(scale) & kDitherMask;
    return bit_cast<float>(((bits(scale * beta) - byte + kDitherMask / 2 + 1) & ~kDitherMask) | byte);
}

// code = rint(copysign(sqrt(|m| * A*A/s), m) + u), which is 0 for m = 0. The code is the low bits of the result.
// There are two functions so that the caller can put other work between them, because square roots have a long latency.
template <class F> LION8BIT_FN F root(F momentum, const Codec& codec) {
    return LanesOf<F>::signed_root(momentum * codec.encode_gain);
}
template <class F> LION8BIT_FN Int<F> encode(F root_, const Codec& codec) {
    return LanesOf<F>::round(root_ + codec.dither);
}

// 8 bits: m = t*|t| * (s * 1/(A*A)), t = code - u; 0 for the code 0. NoZeros: the caller knows that the code is not 0.
// 4 bits: m = code * |code - 2u| * (s * 1/(A*A)). Its mean over u is the momentum that was encoded.
template <int32_t bits, bool NoZeros = false, class F> LION8BIT_FN F decode(F code, const Codec& codec) {
    if constexpr (bits == 4) return code * magnitude(code - 2.0f * codec.dither) * codec.decode_gain;
    const F t = code - codec.dither;
    const F value = t * magnitude(t) * codec.decode_gain;
    if constexpr (NoZeros) return value;
    return code == 0.0f ? F{} : value;
}

// ---- The Lion step -------------------------------------------------------------------------------------------------

// Updates one element in place and returns whether it was skipped because of a bad gradient. `grad` returns the
// gradient that entered the formulas: if it is zero in a whole block, only the scale of the block changes.
//
// General:  false if no flag is set; the tests of flags are then left out.
// Trusted:  the caller knows that the gradient is finite.
// Clamped:  the caller also knows that the blended momentum is finite, is not -0, and is 0 or at least lr in magnitude,
//           because `blend` and `one_minus_blend` are large enough.
// H is Hyper, or has the same fields in lanes.
template <bool General, bool Trusted = false, bool Clamped = false, class H, class F>
LION8BIT_FN auto lion_step(const H& hyper, F& param, F& grad, F& momentum) {
    if constexpr (General) {
        if (hyper.flags & kUnscale) grad = grad * hyper.unscale;
        if (hyper.flags & kMaximize) grad = -grad;
        if (hyper.flags & kCoupledDecay) grad = grad + param * hyper.coupled_decay;
    }
    const auto skipped = (bits(grad) & 0x7fffffff) >= kOverflowBits;
    const F blended = momentum * hyper.blend + grad * hyper.one_minus_blend;
    const F averaged = momentum * hyper.beta + grad * hyper.one_minus_beta;
    F moved;
    if constexpr (Clamped) {
        moved = param * hyper.decay - LanesOf<F>::clamp(blended, hyper.lr - F{});
    } else {
        const F update = copy_sign(hyper.lr - F{}, blended);
        auto moves = blended != 0.0f;  // sign(0) = 0
        if constexpr (General) {
            if (hyper.flags & kCautious) {
                const auto agrees = (bits(blended) ^ bits(grad)) >= 0;
                moves = moves & agrees & (grad != 0.0f);
            }
        }
        moved = LanesOf<F>::subtract_where(moves, param * hyper.decay, update);
    }
    if constexpr (Trusted) {
        param = moved;
        momentum = averaged;
    } else {
        param = skipped ? param : moved;
        momentum = skipped ? momentum : averaged;
    }
    return skipped;
}

// ---- 16-bit numbers ------------------------------------------------------------------------------------------------
//
// A 16-bit pattern is in the low half of a 32-bit lane.

template <class F> LION8BIT_FN F from_bfloat16(Uint<F> pattern) { return bit_cast<F>(pattern << 16); }

template <class F> LION8BIT_FN F from_float16(Uint<F> pattern) {
    const F scaled = bit_cast<F>((pattern & 0x7fffu) << 13) * 0x1p112f;  // exact, subnormals too
    const Uint<F> special = (pattern & 0x7c00u) == 0x7c00u ? Uint<F>{} + 0x7f800000u : Uint<F>{};
    return bit_cast<F>(bit_cast<Uint<F>>(scaled) | special | ((pattern & 0x8000u) << 16));
}

// `random` is 16 uniform bits; stochastic rounding uses them so that it is unbiased.
// Number: the caller knows that x is not NaN.
template <int32_t rounding, bool Number = false, class F> LION8BIT_FN Uint<F> to_bfloat16(F x, Uint<F> random) {
    const Uint<F> pattern = bit_cast<Uint<F>>(x);
    const Uint<F> increment = rounding == kStochastic ? random : ((pattern >> 16) & 1u) + 0x7fffu;
    const Uint<F> rounded = (pattern + increment) >> 16;  // infinity stays, because the increment is below 2^16
    if constexpr (Number) return rounded;
    return x != x ? Uint<F>{} + 0x7fc0u : rounded;
}

template <int32_t rounding, class F> LION8BIT_FN Uint<F> to_float16(F x, Uint<F> random) {
    const Uint<F> pattern = bit_cast<Uint<F>>(x);
    const Uint<F> size = pattern & 0x7fffffffu;
    const F units = magnitude(x) * 0x1p24f;  // in units of the smallest subnormal; exact where it is used
    Uint<F> normal, subnormal;
    if constexpr (rounding == kStochastic) {
        normal = (size + (random >> 3)) >> 13;
        const F threshold =
            bit_cast<F>((random >> 2) + 0x4b000000u) - 0x1p23f;  // 14 bits; a whole number of units does not change
        subnormal = bit_cast<Uint<F>>(LanesOf<F>::truncate(units < 1024.0f ? units + threshold * 0x1p-14f : F{}));
    } else {
        normal = (size + ((size >> 13) & 1u) + 0xfffu) >> 13;
        subnormal = bit_cast<Uint<F>>(units + 0x1p23f) - 0x4b000000u;
    }
    normal = normal - (112u << 10);
    normal = normal > 0x7c00u ? Uint<F>{} + 0x7c00u : normal;
    Uint<F> result = size < (113u << 23) ? subnormal : normal;
    result = size > 0x7f800000u ? Uint<F>{} + 0x7e00u : result;
    return result | ((pattern >> 16) & 0x8000u);
}

// ---- Compensated weights -------------------------------------------------------------------------------------------
//
// A bf16 number and an int8 residual hold 24 bits of an fp32 number, by integer arithmetic on its pattern:
//
//   fp32 bits = (bf16 bits << 16) + (residual << 8)
//
// The residual of zero, infinity and NaN is not read. So a weight that other code sets to one of them has that value.

// `shifted` is the residual * 2^8. Number: the caller knows that the bf16 part is not zero, infinity or NaN.
template <class F, bool Number = false> LION8BIT_FN F from_compensated(Uint<F> pattern, Uint<F> shifted) {
    if constexpr (Number) return bit_cast<F>((pattern << 16) + shifted);
    const auto has_residual = (pattern & 0x7fffu) - 1u < 0x7f7fu;
    return bit_cast<F>((pattern << 16) + (has_residual ? shifted : Uint<F>{}));
}

// Rounds to 24 bits, to nearest even. The result is an fp32 pattern whose low byte has no meaning.
// Number: the caller knows that x is not NaN.
template <bool Number = false, class F> LION8BIT_FN Uint<F> to_24_bits(F x) {
    const Uint<F> pattern = bit_cast<Uint<F>>(x);
    const Uint<F> rounded = pattern + ((pattern >> 8) & 1u) + 0x7fu;
    if constexpr (Number) return rounded;
    return x != x ? Uint<F>{} + 0x7fc00000u : rounded;
}
// The two parts of a result of `to_24_bits`; the residual is the low byte of `residual_part`.
template <class U> LION8BIT_FN U bfloat16_part(U rounded) { return (rounded + 0x8000u) >> 16; }
template <class U> LION8BIT_FN U residual_part(U rounded) { return rounded >> 8; }

// ---- Random bits for stochastic rounding ---------------------------------------------------------------------------
//
// A function of parameter, update count and element alone. So it needs no state, and a shard has the bits of the whole
// parameter. Elements are counted in the whole parameter, modulo 2^32.

LION8BIT_FN uint32_t random_key(uint32_t seed, uint32_t step) { return fmix32(fmix32(seed) + step); }
// 32 bits: the low half for the element with this even index, the high half for the next element.
template <class U> LION8BIT_FN U random_word(uint32_t key, U even) { return fmix32(even ^ key); }

}  // namespace lion8bit
