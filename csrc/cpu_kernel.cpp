// Owns the CPU loops over blocks, vectorised for one instruction set; built once per set, with LION8BIT_ISA naming it.
//
// A block goes through two loops: one dequantizes, steps and finds the largest new momentum, which waits in a buffer of
// the first-level cache; the other requantizes it.
#include "cpu_kernel.h"

#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lion8bit {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

namespace {

template <class T> struct VectorOf {
    typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
template <class T> using Vector = typename VectorOf<T>::type;
using Floats = Vector<float>;

}  // namespace

template <> struct LanesOf<Floats> {
    using Int = Vector<int32_t>;
    using Uint = Vector<uint32_t>;
    static LION8BIT_FN Floats square_root(Floats x) {
#if defined(__AVX512F__)
        return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
        return _mm256_sqrt_ps(x);
#else
        for (int lane = 0; lane < kLanes; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
        return x;
#endif
    }
    static LION8BIT_FN Int truncate(Floats x) { return __builtin_convertvector(x, Int); }
};

namespace {

// Elements of a vector that lies wholly inside the block, or of its last one, padded.
template <class T> LION8BIT_FN Vector<T> load(const T* from, int count, T padding = 0) {
    Vector<T> vector = Vector<T>{} + padding;
    std::memcpy(&vector, from, count * sizeof(T));
    return vector;
}
template <class T> LION8BIT_FN void store(T* to, Vector<T> vector, int count) {
    std::memcpy(to, &vector, count * sizeof(T));
}

// Conversions between lanes of 8, 16 and 32 bits; narrowing keeps the low bits. Compilers turn the plain form into
// scalar code.
LION8BIT_FN Int<Floats> widen(Vector<int8_t> bytes) {
#if defined(__AVX512F__)
    return bit_cast<Int<Floats>>(_mm512_cvtepi8_epi32(bit_cast<__m128i>(bytes)));
#elif defined(__AVX2__)
    return bit_cast<Int<Floats>>(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bit_cast<int64_t>(bytes))));
#else
    return __builtin_convertvector(bytes, Int<Floats>);
#endif
}
LION8BIT_FN Floats to_floats(Vector<int8_t> codes) { return __builtin_convertvector(widen(codes), Floats); }
LION8BIT_FN Uint<Floats> widen(Vector<uint16_t> patterns) {
#if defined(__AVX512F__)
    return bit_cast<Uint<Floats>>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(patterns)));
#elif defined(__AVX2__)
    return bit_cast<Uint<Floats>>(_mm256_cvtepu16_epi32(bit_cast<__m128i>(patterns)));
#else
    return __builtin_convertvector(patterns, Uint<Floats>);
#endif
}
LION8BIT_FN Vector<int8_t> low_bytes(Int<Floats> levels) {
#if defined(__AVX512F__)
    return bit_cast<Vector<int8_t>>(_mm512_cvtepi32_epi8(bit_cast<__m512i>(levels)));
#elif defined(__AVX2__)
    const __m256i places = _mm256_set1_epi32(0x0c080400);
    const __m256i packed = _mm256_shuffle_epi8(bit_cast<__m256i>(levels), places);
    const __m128i joined = _mm_unpacklo_epi32(_mm256_castsi256_si128(packed), _mm256_extracti128_si256(packed, 1));
    return bit_cast<Vector<int8_t>>(_mm_cvtsi128_si64(joined));
#else
    return __builtin_convertvector(levels, Vector<int8_t>);
#endif
}
LION8BIT_FN Vector<uint16_t> narrow(Uint<Floats> patterns) {  // each below 2^16
#if defined(__AVX512F__)
    return bit_cast<Vector<uint16_t>>(_mm512_cvtepi32_epi16(bit_cast<__m512i>(patterns)));
#elif defined(__AVX2__)
    const __m256i wide = bit_cast<__m256i>(patterns);
    return bit_cast<Vector<uint16_t>>(
        _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
#else
    return __builtin_convertvector(patterns, Vector<uint16_t>);
#endif
}

// How a parameter or gradient of each dtype is read, and how a parameter is written.
struct Float32 {
    using Element = float;
    static LION8BIT_FN Floats read(const float* from, int count) { return load(from, count); }
    template <int32_t> static LION8BIT_FN void write(float* to, Floats x, Uint<Floats>, int count) {
        store(to, x, count);
    }
};
struct Bfloat16 {
    using Element = uint16_t;
    static LION8BIT_FN Floats read(const uint16_t* from, int count) {
        return from_bfloat16<Floats>(widen(load(from, count)));
    }
    // A NaN here comes from a bf16 NaN, whose low 16 bits are zero: it stays one without care.
    template <int32_t rounding> static LION8BIT_FN void write(uint16_t* to, Floats x, Uint<Floats> random, int count) {
        store(to, narrow(to_bfloat16<rounding, true>(x, random)), count);
    }
};
struct Float16 {
    using Element = uint16_t;
    static LION8BIT_FN Floats read(const uint16_t* from, int count) {
        return from_float16<Floats>(widen(load(from, count)));
    }
    template <int32_t rounding> static LION8BIT_FN void write(uint16_t* to, Floats x, Uint<Floats> random, int count) {
        store(to, narrow(to_float16<rounding>(x, random)), count);
    }
};

#define LION8BIT_INLINE __attribute__((always_inline))

// Calls body(position, lanes) for each vector in [at, length); `lanes` is constant for all but a short last one.
template <class Body> LION8BIT_FN void for_each_vector(int at, int length, const Body& body) {
#pragma GCC unroll 2
    for (; at + kLanes <= length; at += kLanes) body(at, kLanes);
    if (at < length) body(at, length - at);
}

// Whether some lane is not zero.
LION8BIT_FN bool any(Int<Floats> x) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask(bit_cast<__m512i>(x), bit_cast<__m512i>(x)) != 0;
#elif defined(__AVX2__)
    return !_mm256_testz_si256(bit_cast<__m256i>(x), bit_cast<__m256i>(x));
#else
    int32_t joined = 0;
    for (int lane = 0; lane < kLanes; ++lane) joined |= x[lane];
    return joined != 0;
#endif
}

// The largest lane.
LION8BIT_FN int32_t horizontal_max(Int<Floats> x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_epi32(bit_cast<__m512i>(x));
#elif defined(__AVX2__)
    const __m256i wide = bit_cast<__m256i>(x);
    __m128i max = _mm_max_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    max = _mm_max_epi32(max, _mm_shuffle_epi32(max, 0x4e));
    max = _mm_max_epi32(max, _mm_shuffle_epi32(max, 0xb1));
    return _mm_cvtsi128_si32(max);
#else
    int32_t max = x[0];
    for (int lane = 1; lane < kLanes; ++lane) max = x[lane] > max ? x[lane] : max;
    return max;
#endif
}

// A block that has been stepped and waits to be encoded.
struct Stepped {
    alignas(64) float momentum[kMaxBlockSize];
    Codec codec;
    int8_t* codes;
    int length = 0;
};

LION8BIT_FN void encode_block(const Stepped& block) {
    const Codec codec = block.codec;
    int start = 0;
#if defined(__AVX2__) && !defined(__AVX512F__)
    // Four vectors at a time: their low bytes meet in one register without leaving its 128-bit halves.
    for (; start + 4 * kLanes <= block.length; start += 4 * kLanes) {
        const auto codes = [&](int vector) LION8BIT_INLINE {
            const Floats momentum = load(block.momentum + start + vector * kLanes, kLanes);
            return _mm256_and_si256(bit_cast<__m256i>(encode(momentum, codec)), _mm256_set1_epi32(0xff));
        };
        const __m256i first = _mm256_packus_epi32(codes(0), codes(1));
        const __m256i second = _mm256_packus_epi32(codes(2), codes(3));
        const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
        const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(first, second), order);
        std::memcpy(block.codes + start, &packed, sizeof(packed));
    }
#endif
    for_each_vector(start, block.length, [&](int at, int count) LION8BIT_INLINE {
        store(block.codes + at, low_bytes(encode(load(block.momentum + at, kLanes), codec)), count);
    });
}

// 16 random bits for each element of a block.
LION8BIT_FN void fill_random(uint16_t* random, uint32_t key, int length) {
    Uint<Floats> pair;
    for (int lane = 0; lane < kLanes; ++lane) pair[lane] = lane;
    for (int at = 0; at < length; at += 2 * kLanes, pair += kLanes) {
        const Uint<Floats> words = random_word(key, pair);
        std::memcpy(random + at, &words, sizeof(words));  // little-endian: the even element is the low half
    }
}

template <class Param, class Grad, bool quantized, bool general, int32_t rounding>
int64_t update_range(const Tensor& tensor, const Hyper& options, int64_t first, int64_t last) {
    const Hyper hyper = options;  // a copy that no store can alias
    const int64_t row_blocks = blocks_per_row(tensor.cols, hyper.block_size);
    const RandomKey key = random_key(tensor.seed, tensor.step);
    int64_t row = first / row_blocks, in_row = first % row_blocks;
    int64_t skipped = 0;
    alignas(64) uint16_t random[kMaxBlockSize];
    Stepped stepped[2];  // a block is encoded after the next one is stepped, which hides the latency of its scale
    for (int64_t block = first; block < last; ++block) {
        const int64_t start = in_row * hyper.block_size;
        const int64_t offset = row * tensor.cols + start;
        const int64_t left = tensor.cols - start;
        const int length = static_cast<int>(left < hyper.block_size ? left : hyper.block_size);
        auto* const param = static_cast<typename Param::Element*>(tensor.param) + offset;
        const auto* const grad = static_cast<const typename Grad::Element*>(tensor.grad) + offset;
        auto* const codes = static_cast<int8_t*>(tensor.momentum) + offset;
        auto* const values = static_cast<float*>(tensor.momentum) + offset;
        int8_t* const residual = tensor.residual + (rounding == kCompensated ? offset : 0);
        Stepped& current = stepped[block & 1];
        const Codec codec = quantized ? decoder(tensor.scales[block]) : Codec{};
        if constexpr (rounding == kStochastic) fill_random(random, block_key(key, tensor.first_block + block), length);

        Int<Floats> largest = {}, touched = {}, skipped_lanes = {};  // a true lane is -1
        for_each_vector(0, length, [&](int at, int count) LION8BIT_INLINE {
            Floats m;
            if constexpr (quantized) {
                m = decode(to_floats(load(codes + at, count, int8_t{kZeroCode})), codec);
            } else {
                m = load(values + at, count);
            }
            Floats p, g = Grad::read(grad + at, count);
            if constexpr (rounding == kCompensated) {
                p = from_compensated<Floats>(widen(load(param + at, count)),
                                             bit_cast<Uint<Floats>>(widen(load(residual + at, count))));
            } else {
                p = Param::read(param + at, count);
            }
            skipped_lanes += lion_step<general>(hyper, p, g, m);
            if constexpr (quantized) touched |= bits(g) << 1;  // without the sign of a zero
            if constexpr (rounding == kCompensated) {
                const Uint<Floats> rounded = to_24_bits(p);
                store(param + at, narrow(bfloat16_part(rounded)), count);
                store(residual + at, low_bytes(bit_cast<Int<Floats>>(residual_part(rounded))), count);
            } else {
                Uint<Floats> bits16 = {};
                if constexpr (rounding == kStochastic) bits16 = widen(load(random + at, count));
                Param::template write<rounding>(param + at, p, bits16, count);
            }
            if constexpr (quantized) {
                store(current.momentum + at, m, kLanes);
                const Int<Floats> size = bits(magnitude(m));
                largest = size > largest ? size : largest;
            } else {
                store(values + at, m, count);
            }
        });

        if constexpr (quantized) {
            float scale = decayed_scale(tensor.scales[block], hyper.beta);
            const bool idle = !any(touched) && scale >= kMinScale;
            if (!idle) scale = stored_scale(bit_cast<float>(horizontal_max(largest)));
            tensor.scales[block] = scale;
            current.codec = encoder(scale);
            current.codes = codes;
            current.length = idle ? 0 : length;
            encode_block(stepped[~block & 1]);
        }
        if (horizontal_max(-skipped_lanes) > 0) {
            for (int lane = 0; lane < kLanes; ++lane) skipped -= skipped_lanes[lane];
        }
        if (++in_row == row_blocks) {
            in_row = 0;
            ++row;
        }
    }
    if constexpr (quantized) encode_block(stepped[~last & 1]);
    return skipped;
}

template <class Param, class Grad, bool quantized, int32_t rounding>
int64_t with_flags(const Tensor& tensor, const Hyper& hyper, int64_t first, int64_t last) {
    // Rare combinations go without the variant that saves the tests of flags, which halves the time to build them.
    constexpr bool common = quantized && !std::is_same<Param, Float16>::value && !std::is_same<Grad, Float16>::value;
    if constexpr (common) {
        if (!hyper.flags) return update_range<Param, Grad, quantized, false, rounding>(tensor, hyper, first, last);
    }
    return update_range<Param, Grad, quantized, true, rounding>(tensor, hyper, first, last);
}

template <class Param, class Grad, bool quantized>
int64_t with_rounding(const Tensor& tensor, const Hyper& hyper, int64_t first, int64_t last) {
    if constexpr (sizeof(typename Param::Element) == 2) {
        if (hyper.weight_rounding == kStochastic) {
            return with_flags<Param, Grad, quantized, kStochastic>(tensor, hyper, first, last);
        }
    }
    if constexpr (std::is_same<Param, Bfloat16>::value) {
        if (hyper.weight_rounding == kCompensated) {
            return with_flags<Param, Grad, quantized, kCompensated>(tensor, hyper, first, last);
        }
    }
    return with_flags<Param, Grad, quantized, kNearest>(tensor, hyper, first, last);
}

template <class Param, class Grad>
int64_t with_momentum(const Tensor& tensor, const Hyper& hyper, int64_t first, int64_t last) {
    return tensor.scales ? with_rounding<Param, Grad, true>(tensor, hyper, first, last)
                         : with_rounding<Param, Grad, false>(tensor, hyper, first, last);
}

template <class Param> int64_t with_param(const Tensor& tensor, const Hyper& hyper, int64_t first, int64_t last) {
    switch (tensor.grad_dtype) {
        case kFloat32: return with_momentum<Param, Float32>(tensor, hyper, first, last);
        case kBfloat16: return with_momentum<Param, Bfloat16>(tensor, hyper, first, last);
        default: return with_momentum<Param, Float16>(tensor, hyper, first, last);
    }
}

}  // namespace

#define LION8BIT_NAME_(isa) update_blocks_##isa
#define LION8BIT_NAME(isa) LION8BIT_NAME_(isa)

int64_t LION8BIT_NAME(LION8BIT_ISA)(const Tensor& tensor, const Hyper& hyper, int64_t first, int64_t last) {
    switch (tensor.param_dtype) {
        case kFloat32: return with_param<Float32>(tensor, hyper, first, last);
        case kBfloat16: return with_param<Bfloat16>(tensor, hyper, first, last);
        default: return with_param<Float16>(tensor, hyper, first, last);
    }
}

}  // namespace lion8bit
