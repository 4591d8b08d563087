// The CPU loops over blocks, vectorised for one instruction set. Compiled once per set; LION8BIT_ISA is its name.
//
// A block is decoded and stepped in groups of four vectors. Its new momentum goes to a buffer in the first-level cache.
// Encoding of block i is interleaved with stepping of block i+2. A first pass over the gradients and codes of a block
// finds out whether it is idle (all gradients zero) and whether it is ordinary (no element needs a test). Codes of 4
// bits pass through buffers of bytes, so that the same code serves them.
#include "cpu_kernel.h"

#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(LION8BIT_X86)
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
constexpr int kGroup = 4 * kLanes;  // elements of four vectors; every block size is a multiple

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
    static LION8BIT_FN Floats subtract_where(Int condition, Floats a, Floats b) {  // a mask is cheaper than a select
        return a - (condition ? b : Floats{});
    }
    static LION8BIT_FN Floats clamp(Floats x, Floats limit) {  // to [-limit, limit]; x is not NaN, limit > 0
#if defined(__AVX2__)  // integer units are idle here; read as unsigned, negative numbers have the largest patterns
        const Uint pattern = bit_cast<Uint>(x), lowest = bit_cast<Uint>(-limit);
        const Int above = bit_cast<Int>(pattern < lowest ? pattern : lowest), highest = bit_cast<Int>(limit);
        return bit_cast<Floats>(above < highest ? above : highest);
#else
        const Floats above = x > -limit ? x : -limit;
        return above < limit ? above : limit;
#endif
    }
    static LION8BIT_FN Floats signed_root(Floats x) { return copy_sign(square_root(magnitude(x)), x); }
    static LION8BIT_FN Floats square_root(Floats x) {
#if defined(__AVX512F__)
        return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
        return _mm256_sqrt_ps(x);
#elif defined(LION8BIT_X86)
        return _mm_sqrt_ps(x);
#else
        for (int lane = 0; lane < kLanes; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
        return x;
#endif
    }
    static LION8BIT_FN Int truncate(Floats x) { return __builtin_convertvector(x, Int); }
    static LION8BIT_FN Int round(Floats x) {  // to nearest even
#if defined(__AVX512F__)
        return bit_cast<Int>(_mm512_cvtps_epi32(x));
#elif defined(__AVX2__)
        return bit_cast<Int>(_mm256_cvtps_epi32(x));
#elif defined(LION8BIT_X86)
        return bit_cast<Int>(_mm_cvtps_epi32(x));
#else
        return bit_cast<Int>(x + 12582912.0f) - 0x4b400000;  // 1.5 * 2^23
#endif
    }
};

namespace {

using Ints = Int<Floats>;
using Uints = Uint<Floats>;

// ---- Groups of four vectors in memory -------------------------------------------------------------------------------
//
// The instructions that widen and narrow elements work inside 128-bit parts of a register. If a tensor has 16-bit
// elements, a group is therefore in woven order: of each two vectors the first holds the even and the second the odd
// runs of four elements. With four lanes this is the plain order.

template <class T> struct Pair {
    T first, second;
};

template <class V, class T> LION8BIT_FN V load(const T* from) {
    V vector;
    std::memcpy(&vector, from, sizeof(vector));
    return vector;
}
template <class V, class T> LION8BIT_FN void store(T* to, V vector) { std::memcpy(to, &vector, sizeof(vector)); }

#if defined(__AVX512F__)
using Whole = __m512i;  // a whole register
#elif defined(__AVX2__)
using Whole = __m256i;
#elif defined(LION8BIT_X86)
using Whole = __m128i;
#endif

// Convert two vectors from plain to woven order, and back.
LION8BIT_FN Pair<Floats> weave(Floats a, Floats b) {
#if defined(__AVX512F__)
    return {_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)};
#elif defined(__AVX2__)
    return {_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)};
#else
    return {a, b};
#endif
}
LION8BIT_FN Pair<Floats> unweave(Floats even, Floats odd) {
#if defined(__AVX512F__)
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high = _mm512_add_epi64(low, _mm512_set1_epi64(4));
    const __m512d a = _mm512_castps_pd(even), b = _mm512_castps_pd(odd);
    return {_mm512_castpd_ps(_mm512_permutex2var_pd(a, low, b)), _mm512_castpd_ps(_mm512_permutex2var_pd(a, high, b))};
#else
    return weave(even, odd);
#endif
}

// Reads 16-bit patterns into the low half of each lane or, with `high`, into the high half; woven order.
template <bool high> LION8BIT_FN Pair<Uints> from_words(const uint16_t* from) {
#if defined(LION8BIT_X86)
    const auto words = load<Whole>(from);
    const Whole zero = {};
#if defined(__AVX512F__)
    const auto low_half = [](Whole a, Whole b) { return bit_cast<Uints>(_mm512_unpacklo_epi16(a, b)); };
    const auto high_half = [](Whole a, Whole b) { return bit_cast<Uints>(_mm512_unpackhi_epi16(a, b)); };
#elif defined(__AVX2__)
    const auto low_half = [](Whole a, Whole b) { return bit_cast<Uints>(_mm256_unpacklo_epi16(a, b)); };
    const auto high_half = [](Whole a, Whole b) { return bit_cast<Uints>(_mm256_unpackhi_epi16(a, b)); };
#else
    const auto low_half = [](Whole a, Whole b) { return bit_cast<Uints>(_mm_unpacklo_epi16(a, b)); };
    const auto high_half = [](Whole a, Whole b) { return bit_cast<Uints>(_mm_unpackhi_epi16(a, b)); };
#endif
    if constexpr (high) return {low_half(zero, words), high_half(zero, words)};
    return {low_half(words, zero), high_half(words, zero)};
#else
    const auto words = [from](int at) {
        return __builtin_convertvector(load<Vector<uint16_t>>(from + at), Uints) << (high ? 16 : 0);
    };
    return {words(0), words(kLanes)};
#endif
}

// Writes the low halves of lanes in woven order; each lane is below 2^16.
LION8BIT_FN void to_words(uint16_t* to, Pair<Uints> patterns) {
#if defined(LION8BIT_X86)
    const auto a = bit_cast<Whole>(patterns.first), b = bit_cast<Whole>(patterns.second);
#if defined(__AVX512F__)
    store(to, _mm512_packus_epi32(a, b));
#elif defined(__AVX2__)
    store(to, _mm256_packus_epi32(a, b));
#else  // SSE2 has only the signed form, which keeps sign-extended values
    store(to, _mm_packs_epi32(_mm_srai_epi32(_mm_slli_epi32(a, 16), 16), _mm_srai_epi32(_mm_slli_epi32(b, 16), 16)));
#endif
#else
    store(to, __builtin_convertvector(patterns.first, Vector<uint16_t>));
    store(to + kLanes, __builtin_convertvector(patterns.second, Vector<uint16_t>));
#endif
}

#if defined(__AVX2__)
// Takes from each 128-bit part the run of four bytes at `starts` and puts each byte into the highest byte of a lane.
LION8BIT_FN Ints spread_bytes(Whole bytes, const int (&starts)[kLanes / 4]) {
    Uints order;
    for (int lane = 0; lane < kLanes; ++lane) order[lane] = (starts[lane / 4] + lane % 4) << 24 | 0x00ffffff;
#if defined(__AVX512F__)
    return bit_cast<Ints>(_mm512_shuffle_epi8(bytes, bit_cast<Whole>(order)));
#else
    return bit_cast<Ints>(_mm256_shuffle_epi8(bytes, bit_cast<Whole>(order)));
#endif
}
#endif

// Reads bytes into the highest byte of each lane; the other bytes are zero.
template <bool woven> LION8BIT_FN Pair<Ints> from_bytes(const int8_t* from) {
#if defined(__AVX512F__)
    if constexpr (woven) {
        const __m512i runs = _mm512_cvtepu32_epi64(load<__m256i>(from));  // two runs in each part
        return {spread_bytes(runs, {0, 0, 0, 0}), spread_bytes(runs, {8, 8, 8, 8})};
    }
    return {spread_bytes(_mm512_broadcast_i32x4(load<__m128i>(from)), {0, 4, 8, 12}),
            spread_bytes(_mm512_broadcast_i32x4(load<__m128i>(from + kLanes)), {0, 4, 8, 12})};
#elif defined(__AVX2__)
    const __m256i bytes = _mm256_broadcastsi128_si256(load<__m128i>(from));
    if constexpr (woven) return {spread_bytes(bytes, {0, 8}), spread_bytes(bytes, {4, 12})};
    return {spread_bytes(bytes, {0, 4}), spread_bytes(bytes, {8, 12})};
#elif defined(LION8BIT_X86)
    const __m128i bytes = _mm_unpacklo_epi8(__m128i{}, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
    return {bit_cast<Ints>(_mm_unpacklo_epi16(__m128i{}, bytes)), bit_cast<Ints>(_mm_unpackhi_epi16(__m128i{}, bytes))};
#else
    return {__builtin_convertvector(load<Vector<int8_t>>(from), Ints) << 24,
            __builtin_convertvector(load<Vector<int8_t>>(from + kLanes), Ints) << 24};
#endif
}

// A group of integers in [-128, 127] as bytes in the order of memory.
typedef int8_t GroupBytes __attribute__((vector_size(kGroup)));
template <bool woven> LION8BIT_FN GroupBytes to_bytes(const Ints (&group)[4]) {
#if defined(LION8BIT_X86)
    Whole v[4];
    for (int i = 0; i < 4; ++i) v[i] = bit_cast<Whole>(group[i]);
#if defined(__AVX512F__)
    const __m512i packed = _mm512_packs_epi16(_mm512_packs_epi32(v[0], v[1]), _mm512_packs_epi32(v[2], v[3]));
    const __m512i order = woven ? _mm512_setr_epi32(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15)
                                : _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return bit_cast<GroupBytes>(_mm512_permutexvar_epi32(order, packed));
#elif defined(__AVX2__)
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    const __m256i order = woven ? _mm256_setr_epi32(0, 1, 4, 5, 2, 3, 6, 7) : _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return bit_cast<GroupBytes>(_mm256_permutevar8x32_epi32(packed, order));
#else
    return bit_cast<GroupBytes>(_mm_packs_epi16(_mm_packs_epi32(v[0], v[1]), _mm_packs_epi32(v[2], v[3])));
#endif
#else
    GroupBytes bytes;
    for (int i = 0; i < 4; ++i) {
        const auto part = __builtin_convertvector(group[i], Vector<int8_t>);
        std::memcpy(reinterpret_cast<int8_t*>(&bytes) + i * kLanes, &part, sizeof(part));
    }
    return bytes;
#endif
}

// Two codes in a byte. The first one is in the low half.
typedef uint8_t PackedGroup __attribute__((vector_size(kGroup / 2)));
typedef uint16_t GroupPairs __attribute__((vector_size(kGroup)));

// Puts the codes of a group into the high halves of bytes.
LION8BIT_FN void unpack(int8_t* to, const uint8_t* from) {
    const GroupPairs pairs = __builtin_convertvector(load<PackedGroup>(from), GroupPairs);
    store(to, (pairs << 8 | pairs << 4) & 0xf0f0);
}
// The codes of a group from the low halves of bytes.
LION8BIT_FN PackedGroup pack(GroupBytes codes) {
    const auto pairs = bit_cast<GroupPairs>(codes);
    return __builtin_convertvector((pairs & 0x0f) | (pairs >> 4 & 0xf0), PackedGroup);
}

// Reading of parameters and gradients and writing of parameters by dtype, two vectors at a time.
struct Float32 {
    using Element = float;
    // Bits of a word in memory; kLarge is set if the magnitude is at least 2.
    static constexpr uint32_t kSign = 0x80000000u, kLarge = 0x40000000u;
    static constexpr int32_t kTooLarge = 0x43800000;  // the pattern of kOrdinaryLimit
    template <bool woven> static LION8BIT_FN Pair<Floats> read(const float* from) {
        const auto a = load<Floats>(from), b = load<Floats>(from + kLanes);
        return woven ? weave(a, b) : Pair<Floats>{a, b};
    }
    template <bool woven, int32_t> static LION8BIT_FN void write(float* to, Floats a, Floats b, Pair<Uints>) {
        const Pair<Floats> plain = woven ? unweave(a, b) : Pair<Floats>{a, b};
        store(to, plain.first);
        store(to + kLanes, plain.second);
    }
};
struct Bfloat16 {
    using Element = uint16_t;
    static constexpr uint32_t kSign = 0x80008000u, kLarge = 0x40004000u;
    static constexpr int16_t kTooLarge = 0x4380;
    template <bool> static LION8BIT_FN Pair<Floats> read(const uint16_t* from) {
        const Pair<Uints> patterns = from_words<true>(from);
        return {bit_cast<Floats>(patterns.first), bit_cast<Floats>(patterns.second)};
    }
    // A NaN here comes from a bf16 NaN, whose low 16 bits are zero, so rounding keeps it a NaN without a test.
    template <bool, int32_t rounding>
    static LION8BIT_FN void write(uint16_t* to, Floats a, Floats b, Pair<Uints> random) {
        to_words(to, {to_bfloat16<rounding, true>(a, random.first), to_bfloat16<rounding, true>(b, random.second)});
    }
};
struct Float16 {
    using Element = uint16_t;
    template <bool> static LION8BIT_FN Pair<Floats> read(const uint16_t* from) {
        const Pair<Uints> patterns = from_words<false>(from);
        return {from_float16<Floats>(patterns.first), from_float16<Floats>(patterns.second)};
    }
    template <bool, int32_t rounding>
    static LION8BIT_FN void write(uint16_t* to, Floats a, Floats b, Pair<Uints> random) {
        to_words(to, {to_float16<rounding>(a, random.first), to_float16<rounding>(b, random.second)});
    }
};

// ---- Reductions -----------------------------------------------------------------------------------------------------

LION8BIT_FN int32_t horizontal_max(Ints x) {
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

LION8BIT_FN bool any_set(Ints x, uint32_t mask) {
    const Ints masked = x & static_cast<int32_t>(mask);
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask(bit_cast<__m512i>(masked), bit_cast<__m512i>(masked)) != 0;
#elif defined(__AVX2__)
    return !_mm256_testz_si256(bit_cast<__m256i>(masked), bit_cast<__m256i>(masked));
#else
    int32_t joined = 0;
    for (int lane = 0; lane < kLanes; ++lane) joined |= masked[lane];
    return joined != 0;
#endif
}

// ---- Ordinary blocks ------------------------------------------------------------------------------------------------
//
// A block is ordinary if its gradients are below 256, no code is 0 and the scale is in [2^-56, 256). The group must
// have 2^-6 <= blend <= 1, 0 <= one_minus_blend <= 1 and 0 < lr <= 1. Then no element needs a test:
//
// - Momenta are normal numbers: |t| is at least 2^-9, so |m| is at least 2^-56 * 2^-18 * 2^-14. So codes may stay in
//   the top byte of a lane, which makes them 2^24 times as large, because powers of two cancel exactly.
// - Products with blend and one_minus_blend, both multiplied by 2^118, do not overflow. Their sum is zero, or at least
//   half a unit in the last place of blend * m, which is at least 2^118 * 2^-94 * 2^-24 = 1, so at least lr.
//
// With 4 bits codes may be 0, because they decode to 0 without a test, and such codes are too many. The second point
// does not hold then, so the sum is not multiplied, and its zeros are found by a test. The codes are in the top half of
// the top byte, which makes them 2^28 times as large.
constexpr float kOrdinaryLimit = 256.0f, kOrdinaryScale = 0x1p-56f, kBlendFactor = 0x1p118f;

LION8BIT_FN bool allows_ordinary_blocks(const Hyper& hyper) {
    return hyper.blend >= 0x1p-6f && hyper.blend <= 1.0f && hyper.one_minus_blend >= 0.0f &&
           hyper.one_minus_blend <= 1.0f && hyper.lr > 0.0f && hyper.lr <= 1.0f;
}

// Hyper with a lane for each element.
struct WideHyper {
    Floats lr, decay, coupled_decay, blend, one_minus_blend, beta, one_minus_beta, unscale;
    uint32_t flags;
    float scalar_beta;
    bool ordinary_allowed;  // the constants are those that ordinary blocks require
};
LION8BIT_FN WideHyper widen(const Hyper& hyper, float blend_factor = 1.0f) {
    const auto wide = [](float x) { return x - Floats{}; };
    return {wide(hyper.lr),
            wide(hyper.decay),
            wide(hyper.coupled_decay),
            wide(hyper.blend * blend_factor),
            wide(hyper.one_minus_blend * blend_factor),
            wide(hyper.beta),
            wide(hyper.one_minus_beta),
            wide(hyper.unscale),
            hyper.flags,
            hyper.beta,
            allows_ordinary_blocks(hyper)};
}

template <int32_t bits> constexpr int kCodeShift = 32 - bits;  // of a code in the top of a lane

template <int32_t bits> LION8BIT_FN Codec shifted(const Codec& codec) {
    constexpr float factor = 1u << kCodeShift<bits>;
    return {codec.dither * factor, codec.encode_gain, codec.decode_gain / factor / factor};
}

struct BlockCheck {
    bool idle;      // all gradients of the block are zero
    bool ordinary;  // the gradients and codes are those of an ordinary block
};
template <class Grad, int32_t bits>
LION8BIT_FN BlockCheck check_block(const typename Grad::Element* grad, const int8_t* codes, int length) {
    using Element = std::conditional_t<sizeof(typename Grad::Element) == 2, int16_t, int32_t>;
    typedef Element Numbers __attribute__((vector_size(kLanes * 4)));
    typedef uint8_t Bytes __attribute__((vector_size(kGroup)));
    constexpr int kVectors = sizeof(Element);  // vectors of a group
    const auto numbers = [grad](int at, int i) {
        return load<Numbers>(reinterpret_cast<const char*>(grad + at) + i * sizeof(Numbers));
    };
    Numbers joined = {};
    Bytes least = Bytes{} - 1;
    for (int at = 0; at < length; at += kGroup) {
#pragma GCC unroll 4
        for (int i = 0; i < kVectors; ++i) joined |= numbers(at, i);
        if constexpr (bits == 8) {
            const auto bytes = load<Bytes>(codes + at);
            least = bytes < least ? bytes : least;
        }
    }
    BlockCheck result = {!any_set(bit_cast<Ints>(joined), ~Grad::kSign), !any_set(bit_cast<Ints>(least == 0), ~0u)};
    if (result.ordinary && any_set(bit_cast<Ints>(joined), Grad::kLarge)) {
        Numbers largest = {};
        for (int at = 0; at < length; at += kGroup) {
#pragma GCC unroll 4
            for (int i = 0; i < kVectors; ++i) {
                const Numbers size = numbers(at, i) & std::numeric_limits<Element>::max();
                largest = size > largest ? size : largest;
            }
        }
        result.ordinary = !any_set(bit_cast<Ints>(largest >= Grad::kTooLarge), ~0u);
    }
    return result;
}

struct Roots {
    Floats of[4];
};

// A stepped block i that is encoded while block i+2 is stepped. This hides the latency of its scale, and the square
// roots, whose throughput is low, run beside other work.
template <bool woven, class Code> struct PendingBlock {
    bool any = false;
    const float* momentum = nullptr;
    Codec codec = {};
    Code* codes = nullptr;  // int8_t, or uint8_t for two in a byte

    LION8BIT_FN Roots begin(int place) const {
        Roots roots;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) roots.of[i] = root(load<Floats>(momentum + place + i * kLanes), codec);
        return roots;
    }
    LION8BIT_FN void end(int place, const Roots& roots) const {
        Ints levels[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) levels[i] = encode(roots.of[i], codec);
        if constexpr (std::is_same<Code, uint8_t>::value) {
            store(codes + place / 2, pack(to_bytes<woven>(levels)));
        } else {
            store(codes + place, to_bytes<woven>(levels));
        }
    }
};

// Writes 16 random bits for each element of a block to `random`, and returns where they begin there. `element` is the
// index of the block's first element in the whole parameter. `random` has room for two more vectors.
LION8BIT_FN const uint16_t* fill_random(uint16_t* random, uint32_t key, uint32_t element, int length) {
    const int odd = element % 2;
    Uints even;
    for (int lane = 0; lane < kLanes; ++lane) even[lane] = 2 * lane;
    even += element - odd;
    for (int at = 0; at < length + odd; at += 2 * kLanes, even += 2 * kLanes) {
        store(random + at, random_word(key, even));  // little-endian: the even element is the low half
    }
    return random + odd;
}

// ---- The loops ------------------------------------------------------------------------------------------------------

#define LION8BIT_INLINE __attribute__((always_inline))

// Addresses of blocks that follow each other in memory.
template <class Param, class Grad, class Momentum> struct Blocks {
    Param* param;
    const Grad* grad;
    Momentum* momentum;
    int8_t* residual;
    float* scale;
    uint32_t element;  // index of the first element in the whole parameter
};

template <int32_t momentum_bits> using Momentum =
    std::conditional_t<momentum_bits == 8, int8_t, std::conditional_t<momentum_bits == 4, uint8_t, float>>;

// The block size that loops of 4-bit codes are compiled for, because blocks are short there.
using UsualLength = std::integral_constant<int, 64>;

// Steps `count` blocks of `length` elements, a multiple of kGroup. Length is int or UsualLength.
template <class Param, class Grad, int32_t momentum_bits, bool general, int32_t rounding, class Length>
__attribute__((noinline)) int64_t
step_blocks(Blocks<typename Param::Element, typename Grad::Element, Momentum<momentum_bits>> at, Length length,
            int64_t count, uint32_t key, const WideHyper& hyper, const WideHyper& ordinary_hyper) {
    constexpr bool quantized = momentum_bits < 32;
    constexpr bool woven = sizeof(typename Param::Element) == 2 || sizeof(typename Grad::Element) == 2;
    int64_t skipped = 0;
    alignas(64) uint16_t random_bits[kMaxBlockSize + 2 * kLanes];
    const uint16_t* random = random_bits;
    alignas(64) float momenta[3][kMaxBlockSize];  // of this block and of the two before it
    float *stepped = momenta[0], *free = momenta[1], *free_next = momenta[2];
    alignas(64) int8_t unpacked[kMaxBlockSize];
    PendingBlock<woven, Momentum<momentum_bits>> pending, next;
    for (; count > 0; --count) {
        const float old_scale = quantized ? *at.scale : 0.0f;
        Codec codec = {};
        if constexpr (quantized) codec = decoder<momentum_bits>(old_scale);
        const int8_t* codes = unpacked;
        if constexpr (momentum_bits == 8) codes = at.momentum;
        if constexpr (momentum_bits == 4) {
            for (int place = 0; place < length; place += kGroup) unpack(unpacked + place, at.momentum + place / 2);
        }
        if constexpr (rounding == kStochastic) random = fill_random(random_bits, key, at.element, length);

        Ints largest = {}, touched = {}, skipped_lanes = {};  // a true lane is -1
        const auto step_pair = [&](auto ordinary_, const Codec& codec, const WideHyper& constants, int place,
                                   Ints* residuals) LION8BIT_INLINE {
            constexpr bool ordinary = decltype(ordinary_)::value, clamped = ordinary && momentum_bits == 8;
            const Pair<Floats> grads = Grad::template read<woven>(at.grad + place);
            Floats p[2], g[2] = {grads.first, grads.second}, m[2];
            if constexpr (quantized) {
                const Pair<Ints> shifted_codes = from_bytes<woven>(codes + place);
                const int shift = ordinary ? 0 : kCodeShift<momentum_bits>;
                m[0] = decode<momentum_bits, ordinary>(__builtin_convertvector(shifted_codes.first >> shift, Floats),
                                                       codec);
                m[1] = decode<momentum_bits, ordinary>(__builtin_convertvector(shifted_codes.second >> shift, Floats),
                                                       codec);
            } else {
                const Pair<Floats> values = Float32::read<woven>(at.momentum + place);
                m[0] = values.first, m[1] = values.second;
            }
            if constexpr (rounding == kCompensated) {
                const Pair<Uints> patterns = from_words<false>(at.param + place);
                const Pair<Ints> below = from_bytes<woven>(at.residual + place);
                p[0] = from_compensated<Floats>(patterns.first, bit_cast<Uints>(below.first >> 16));
                p[1] = from_compensated<Floats>(patterns.second, bit_cast<Uints>(below.second >> 16));
            } else {
                const Pair<Floats> params = Param::template read<woven>(at.param + place);
                p[0] = params.first, p[1] = params.second;
            }
            for (int i = 0; i < 2; ++i) {
                const auto bad = lion_step<general, ordinary, clamped>(constants, p[i], g[i], m[i]);
                if constexpr (!ordinary) {
                    skipped_lanes += bad;
                    touched |= bits(g[i]);
                }
                if constexpr (quantized) {
                    store(stepped + place + i * kLanes, m[i]);
                    const Ints size = bits(magnitude(m[i]));
                    largest = size > largest ? size : largest;
                }
            }
            if constexpr (!quantized) Float32::write<woven, kNearest>(at.momentum + place, m[0], m[1], Pair<Uints>());
            if constexpr (rounding == kCompensated) {
                const Uints a = to_24_bits(p[0]), b = to_24_bits(p[1]);
                to_words(at.param + place, Pair<Uints>{bfloat16_part(a), bfloat16_part(b)});
                residuals[0] = bit_cast<Ints>(residual_part(a)) << 24 >> 24;
                residuals[1] = bit_cast<Ints>(residual_part(b)) << 24 >> 24;
            } else {
                Pair<Uints> bits16 = {Uints{}, Uints{}};
                if constexpr (rounding == kStochastic) bits16 = from_words<false>(random + place);
                Param::template write<woven, rounding>(at.param + place, p[0], p[1], bits16);
            }
        };
        const auto step_block = [&](auto ordinary, const Codec& codec) LION8BIT_INLINE {
            const WideHyper constants =
                decltype(ordinary)::value ? ordinary_hyper : hyper;  // a copy stays in registers
            for (int place = 0; place < length; place += kGroup) {
                Ints residuals[4];
                Roots roots;
                if constexpr (quantized) {
                    if (pending.any) roots = pending.begin(place);
                }
                step_pair(ordinary, codec, constants, place, residuals);
                step_pair(ordinary, codec, constants, place + 2 * kLanes, residuals + 2);
                if constexpr (rounding == kCompensated) store(at.residual + place, to_bytes<woven>(residuals));
                if constexpr (quantized) {
                    if (pending.any) pending.end(place, roots);
                }
            }
        };
        bool idle;
        if constexpr (general) {
            step_block(std::false_type(), codec);
            idle = !any_set(touched, 0x7fffffffu);
        } else {
            const BlockCheck check = check_block<Grad, momentum_bits>(at.grad, codes, length);
            idle = check.idle;
            if (check.ordinary && hyper.ordinary_allowed && old_scale >= kOrdinaryScale && old_scale < kOrdinaryLimit) {
                step_block(std::true_type(), shifted<momentum_bits>(codec));
            } else {
                step_block(std::false_type(), codec);
            }
        }

        if constexpr (quantized) {
            pending = next;
            next.any = false;
            float scale = decayed_scale(old_scale, hyper.scalar_beta);
            if (!(idle && scale >= kMinScale)) {
                scale = stored_scale(bit_cast<float>(horizontal_max(largest)));
                next = {true, stepped, encoder<momentum_bits>(scale), at.momentum};
                std::swap(stepped, free);
                std::swap(free, free_next);
            }
            *at.scale++ = scale;
        }
        if (general || any_set(skipped_lanes, ~0u)) {
            for (int lane = 0; lane < kLanes; ++lane) skipped -= skipped_lanes[lane];
        }
        at.param += length;
        at.grad += length;
        at.element += length;
        at.momentum += momentum_bits == 4 ? length / 2 : length;
        if constexpr (rounding == kCompensated) at.residual += length;
    }
    if constexpr (quantized) {
        for (int left = 2; left > 0; --left, pending = next, next.any = false) {
            if (!pending.any) continue;
            for (int place = 0; place < length; place += kGroup) pending.end(place, pending.begin(place));
        }
    }
    return skipped;
}

template <class Param, class Grad, int32_t momentum_bits, bool general, int32_t rounding>
int64_t update_range(const TensorRow& tensor, const Hyper& options, int64_t first, int64_t last) {
    using ParamElement = typename Param::Element;
    using GradElement = typename Grad::Element;
    const WideHyper hyper = widen(options), ordinary_hyper = widen(options, momentum_bits == 8 ? kBlendFactor : 1.0f);
    const uint32_t key = random_key(tensor.seed, tensor.step);
    const int64_t block_size = options.block_size, cols = tensor.cols;
    const int64_t row_blocks = blocks_per_row(cols, options.block_size);
    using TheBlocks = Blocks<ParamElement, GradElement, Momentum<momentum_bits>>;
    const auto blocks_from = [&](int64_t block, int64_t row, int64_t col) {
        const int64_t offset = row * cols + col;
        return TheBlocks{
            static_cast<ParamElement*>(tensor.param) + offset,
            static_cast<const GradElement*>(tensor.grad) + offset,
            static_cast<Momentum<momentum_bits>*>(tensor.momentum) + momentum_index<momentum_bits>(row, col, cols),
            tensor.residual + (rounding == kCompensated ? offset : 0),
            tensor.scales + (momentum_bits < 32 ? block : 0),
            tensor.first + static_cast<uint32_t>(row * tensor.row_stride + col)};
    };
    const auto step = [&](const auto& at, int length, int64_t count) {
        if constexpr (momentum_bits == 4 && !general) {
            if (length == UsualLength()) {
                return step_blocks<Param, Grad, momentum_bits, general, rounding>(at, UsualLength(), count, key, hyper,
                                                                                  ordinary_hyper);
            }
        }
        return step_blocks<Param, Grad, momentum_bits, general, rounding>(at, length, count, key, hyper,
                                                                          ordinary_hyper);
    };
    // If rows end with a whole block, blocks are contiguous across rows, here and in the whole parameter.
    if (cols % block_size == 0 && (rounding != kStochastic || tensor.row_stride == static_cast<uint32_t>(cols))) {
        return step(blocks_from(first, 0, first * block_size), static_cast<int>(block_size), last - first);
    }

    int64_t skipped = 0;
    for (int64_t block = first; block < last;) {
        const int64_t row = block / row_blocks, in_row = block % row_blocks, begin = in_row * block_size;
        const auto at = blocks_from(block, row, begin);
        const int64_t whole = cols / block_size - in_row;
        if (whole > 0) {
            const int64_t count = whole < last - block ? whole : last - block;
            skipped += step(at, static_cast<int>(block_size), count);
            block += count;
            continue;
        }
        // The short block at the end of a row is stepped in a copy, padded with zeros, which change nothing.
        const auto length = static_cast<size_t>(cols % block_size);
        alignas(64) ParamElement param[kMaxBlockSize];
        alignas(64) GradElement grad[kMaxBlockSize];
        alignas(64) Momentum<momentum_bits> momentum[kMaxBlockSize] = {};
        alignas(64) int8_t residual[kMaxBlockSize];
        const int padded = static_cast<int>((length + kGroup - 1) / kGroup * kGroup);
        std::memset(param + length, 0, (padded - length) * sizeof(ParamElement));
        std::memset(grad + length, 0, (padded - length) * sizeof(GradElement));
        std::memcpy(param, at.param, length * sizeof(ParamElement));
        std::memcpy(grad, at.grad, length * sizeof(GradElement));
        const size_t momentum_bytes = momentum_bits == 4 ? (length + 1) / 2 : length * sizeof(Momentum<momentum_bits>);
        std::memcpy(momentum, at.momentum, momentum_bytes);
        if constexpr (rounding == kCompensated) {
            std::memset(residual + length, 0, padded - length);
            std::memcpy(residual, at.residual, length);
        }
        const TheBlocks copy = {param, grad, momentum, residual, at.scale, at.element};
        // Padding is skipped only if a constant of the group is infinite or NaN. Then every element is skipped.
        const int64_t bad = step(copy, padded, 1), most = static_cast<int64_t>(length);
        skipped += bad < most ? bad : most;
        std::memcpy(at.param, param, length * sizeof(ParamElement));
        std::memcpy(at.momentum, momentum, momentum_bytes);
        if constexpr (rounding == kCompensated) std::memcpy(at.residual, residual, length);
        ++block;
    }
    return skipped;
}

template <class Param, class Grad, int32_t momentum_bits, int32_t rounding>
int64_t with_flags(const TensorRow& tensor, const Hyper& hyper, int64_t first, int64_t last) {
    // Rare combinations have only the general variant. This halves the time to compile them.
    constexpr bool common =
        momentum_bits < 32 && !std::is_same<Param, Float16>::value && !std::is_same<Grad, Float16>::value;
    if constexpr (common) {
        if (!hyper.flags) return update_range<Param, Grad, momentum_bits, false, rounding>(tensor, hyper, first, last);
    }
    return update_range<Param, Grad, momentum_bits, true, rounding>(tensor, hyper, first, last);
}
template <class Param, class Grad, int32_t momentum_bits>
int64_t with_rounding(const TensorRow& tensor, const Hyper& hyper, int64_t first, int64_t last) {
    if constexpr (sizeof(typename Param::Element) == 2) {
        if (hyper.weight_rounding == kStochastic) {
            return with_flags<Param, Grad, momentum_bits, kStochastic>(tensor, hyper, first, last);
        }
    }
    if constexpr (std::is_same<Param, Bfloat16>::value) {
        if (hyper.weight_rounding == kCompensated) {
            return with_flags<Param, Grad, momentum_bits, kCompensated>(tensor, hyper, first, last);
        }
    }
    return with_flags<Param, Grad, momentum_bits, kNearest>(tensor, hyper, first, last);
}

template <class Param, class Grad>
int64_t with_momentum(const TensorRow& tensor, const Hyper& hyper, int64_t first, int64_t last) {
    switch (tensor.momentum_bits) {
        case 4: return with_rounding<Param, Grad, 4>(tensor, hyper, first, last);
        case 8: return with_rounding<Param, Grad, 8>(tensor, hyper, first, last);
        default: return with_rounding<Param, Grad, 32>(tensor, hyper, first, last);
    }
}

template <class Param> int64_t with_param(const TensorRow& tensor, const Hyper& hyper, int64_t first, int64_t last) {
    switch (tensor.grad_dtype) {
        case kFloat32: return with_momentum<Param, Float32>(tensor, hyper, first, last);
        case kBfloat16: return with_momentum<Param, Bfloat16>(tensor, hyper, first, last);
        default: return with_momentum<Param, Float16>(tensor, hyper, first, last);
    }
}

}  // namespace

#define LION8BIT_NAME_(isa) update_blocks_##isa
#define LION8BIT_NAME(isa) LION8BIT_NAME_(isa)

int64_t LION8BIT_NAME(LION8BIT_ISA)(const TensorRow& tensor, const Hyper& hyper, int64_t first, int64_t last) {
    switch (tensor.param_dtype) {
        case kFloat32: return with_param<Float32>(tensor, hyper, first, last);
        case kBfloat16: return with_param<Bfloat16>(tensor, hyper, first, last);
        default: return with_param<Float16>(tensor, hyper, first, last);
    }
}

}  // namespace lion8bit
