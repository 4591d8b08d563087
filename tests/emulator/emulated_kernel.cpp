// Owns the library that tests/emulated.py builds: csrc/cuda_kernel.cu on the emulator, its combinations chosen at run
// time. EMULATE_FEW leaves out fp16 and two block sizes. EMULATE_VARIANT, for other tunings than the default, leaves
// out fp16, fp32 momentum, mixed dtypes and what is read from device memory. EMULATE_UNIT makes one of four units that
// are compiled in parallel: 0 to 2 have the parameters of one dtype, 3 has the rest.
#include "../../csrc/export.h"
#include "emulator.h"

#define LION8BIT_EMULATED
#include "../../csrc/cuda_kernel.cu"

#if !defined(EMULATE_UNIT) || EMULATE_UNIT == 3
// The hardware's approximations. The reciprocal is off by up to 4 units in the last place, more than NVIDIA documents,
// by a hash of the argument; the reciprocal root is a table of NVIDIA's, here the nearest float.
float lion8bit::approximate_reciprocal(float x) {
    const float nearest = static_cast<float>(1.0 / x);
    return bit_cast<float>(bit_cast<uint32_t>(nearest) + fmix32(bit_cast<uint32_t>(x)) % 9 - 4);
}
float lion8bit::approximate_reciprocal_root(float x) {
    return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x)));
}
#endif

namespace emulated {

using emulator::Error;
using lion8bit::kBfloat16;
using lion8bit::kCompensated;
using lion8bit::kFloat16;
using lion8bit::kFloat32;

using Small = lion8bit::Launch<36, 14>;   // SMALL of lion8bit/backends/cuda.py
using Large = lion8bit::Launch<362, 32>;  // LARGE

// The arguments of `emulate`.
struct Call {
    int32_t param_dtype, grad_dtype, momentum_bits, block_size, weight_rounding, general, on_device, order;
    int64_t first, last;
    const void* launch;
};

template <class Body> Error run(int64_t first, int64_t last, int32_t threads, int32_t order, const Body& body) {
    static emulator::Block block;  // keeps its stacks
    emulator::running = &block;
    return block.launch(first, last, threads, order, body);
}

template <class Launch, int32_t param, int32_t grad, int32_t momentum_bits, int32_t block_size, int32_t rounding,
          bool general, bool on_device = false>
Error with_all(const Call& call) {
    const auto& launch = *static_cast<const Launch*>(call.launch);
    return run(call.first, call.last, lion8bit::kThreads, call.order, [&launch] {
        lion8bit::update_tile<param, grad, momentum_bits, block_size, rounding, general, on_device>(launch);
    });
}

template <int32_t param, int32_t grad, int32_t momentum_bits, int32_t block_size, int32_t rounding>
Error with_rounding(const Call& call) {
#if !defined(EMULATE_VARIANT)
    if constexpr (param == grad && block_size == 128) {  // the rest is not built
        if (call.on_device) {
            return call.general ? with_all<Small, param, grad, momentum_bits, block_size, rounding, true, true>(call)
                                : with_all<Small, param, grad, momentum_bits, block_size, rounding, false, true>(call);
        }
    }
#endif
    if (call.on_device) return emulator::kUnknown;
    return call.general ? with_all<Small, param, grad, momentum_bits, block_size, rounding, true>(call)
                        : with_all<Small, param, grad, momentum_bits, block_size, rounding, false>(call);
}

template <int32_t param, int32_t grad, int32_t momentum_bits, int32_t block_size>
Error with_block_size(const Call& call) {
    if constexpr (param != kFloat32) {
        if (call.weight_rounding == lion8bit::kStochastic) {
            return with_rounding<param, grad, momentum_bits, block_size, lion8bit::kStochastic>(call);
        }
    }
    if constexpr (param == kBfloat16) {
        if (call.weight_rounding == kCompensated) {
            return with_rounding<param, grad, momentum_bits, block_size, kCompensated>(call);
        }
    }
    return with_rounding<param, grad, momentum_bits, block_size, lion8bit::kNearest>(call);
}

template <int32_t param, int32_t grad, int32_t momentum_bits> Error with_momentum(const Call& call) {
    switch (call.block_size) {
#if !defined(EMULATE_FEW)
        case 64: return with_block_size<param, grad, momentum_bits, 64>(call);
        case 256: return with_block_size<param, grad, momentum_bits, 256>(call);
#endif
        case 128: return with_block_size<param, grad, momentum_bits, 128>(call);
        default: return emulator::kUnknown;
    }
}

template <int32_t param, int32_t grad> Error with_grad(const Call& call) {
#if defined(EMULATE_VARIANT)
    if (param != grad) return emulator::kUnknown;
#endif
    switch (call.momentum_bits) {
        case 4: return with_momentum<param, grad, 4>(call);
        case 8: return with_momentum<param, grad, 8>(call);
#if !defined(EMULATE_VARIANT)
        case 32: return with_momentum<param, grad, 32>(call);
#endif
        default: return emulator::kUnknown;
    }
}

template <int32_t param> Error with_param(const Call& call) {
    switch (call.grad_dtype) {
        case kFloat32: return with_grad<param, kFloat32>(call);
        case kBfloat16: return with_grad<param, kBfloat16>(call);
#if !defined(EMULATE_FEW) && !defined(EMULATE_VARIANT)
        case kFloat16: return with_grad<param, kFloat16>(call);
#endif
        default: return emulator::kUnknown;
    }
}

#if defined(EMULATE_UNIT) && EMULATE_UNIT < 3
template Error with_param<EMULATE_UNIT>(const Call& call);
#elif defined(EMULATE_UNIT)
extern template Error with_param<kFloat32>(const Call& call);
extern template Error with_param<kBfloat16>(const Call& call);
extern template Error with_param<kFloat16>(const Call& call);
#endif

}  // namespace emulated

#if !defined(EMULATE_UNIT) || EMULATE_UNIT == 3
using namespace emulated;

// Runs the CUDA blocks [first, last) of one launch of the small capacity and returns an emulator::Error.
LION8BIT_EXPORT int32_t emulate(int32_t param_dtype, int32_t grad_dtype, int32_t momentum_bits, int32_t block_size,
                                int32_t weight_rounding, int32_t general, int32_t on_device, int32_t order,
                                int64_t first, int64_t last, const void* launch) {
    const Call call = {param_dtype, grad_dtype, momentum_bits, block_size, weight_rounding, general,
                       on_device,   order,      first,         last,       launch};
    switch (param_dtype) {
        case kFloat32: return with_param<kFloat32>(call);
        case kBfloat16: return with_param<kBfloat16>(call);
#if !defined(EMULATE_FEW) && !defined(EMULATE_VARIANT)
        case kFloat16: return with_param<kFloat16>(call);
#endif
        default: return emulator::kUnknown;
    }
}

// Runs a launch of the large capacity, of the one combination that is built for it.
LION8BIT_EXPORT int32_t emulate_large(int64_t last, const void* launch) {
    const Call call = {kBfloat16, kBfloat16, 8, 128, lion8bit::kNearest, 0, 0, 0, 0, last, launch};
    return with_all<Large, kBfloat16, kBfloat16, 8, 128, lion8bit::kNearest, false>(call);
}

LION8BIT_EXPORT int64_t launch_bytes(int32_t large) { return large ? sizeof(Large) : sizeof(Small); }

// Kernels that are sound (0) or have a known fault: they show what the emulator reports.
LION8BIT_EXPORT int32_t emulate_example(int32_t which, int32_t order) {
    int32_t shared[64] = {}, wrong = 0;
    const Error error = run(0, 2, 64, order, [&] {
        const int32_t thread = static_cast<int32_t>(threadIdx.x), lane = thread % 32;
        const uint32_t all = 0xffffffffu;
        if (which == 0) {
            int32_t sum = thread;
            for (int32_t distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(all, sum, distance);
            shared[thread] = sum;
            __syncthreads();
            wrong += sum + shared[63 - thread] != 31 * 32 + 32 * 32;
            const uint32_t half = lane < 16 ? 0xffffu : 0xffff0000u;
            wrong += __shfl_sync(half, thread, lane & 16) != thread / 16 * 16;
            wrong += __ballot_sync(all, lane == 3) != 8u;
            wrong += __any_sync(all, lane == 40);
            __syncwarp();
            __syncthreads();
        } else if (which == 1) {  // half a warp is missing from a shuffle that names all of it
            if (lane < 16) __shfl_xor_sync(all, thread, 1);
        } else if (which == 2) {  // the halves of a warp wait at different operations
            lane < 16 ? __shfl_xor_sync(all, thread, 1) : __any_sync(all, thread);
        } else if (which == 3) {  // the upper lanes are not in their own mask
            __shfl_xor_sync(0xffffu, thread, 1);
        } else if (thread != 5) {  // one thread does not reach the barrier
            __syncthreads();
        }
    });
    return error == emulator::kOk && wrong ? -1 : error;
}

// How many significands the branch-free square root and division get wrong, against IEEE's, and how many tiny roots are
// not far below a code.
LION8BIT_EXPORT int64_t inexact_results() {
    using Lanes = lion8bit::LanesOf<float>;
    int64_t wrong = 0;
    for (const float tiny : {0.0f, 0x1p-149f, 0x1p-126f, 0x1p-80f, 0x1p-56f}) {
        const float root = Lanes::signed_root(tiny);
        wrong += !(root >= 0.0f && root <= 0x1p-28f && Lanes::signed_root(-tiny) == -root);
    }
    for (uint32_t i = 0; i < 1u << 24; ++i) {
        const float x = lion8bit::bit_cast<float>(0x3f800000u + i);  // [1, 4)
        wrong += Lanes::signed_root(x) != std::sqrt(x) || Lanes::signed_root(-x) != -std::sqrt(x);
        for (const float scale : {x, x * 0x1p-100f, x * 0x1p125f}) {  // also the smallest and largest scales
            wrong += Lanes::range_over<8>(scale) != lion8bit::kRangeSquared<8> / scale;
            wrong += Lanes::range_over<4>(scale) != lion8bit::kRangeSquared<4> / scale;
        }
    }
    return wrong;
}
#endif
