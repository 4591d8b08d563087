// Owns the program that benchmarks/instructions.py counts under callgrind and times: steps of one parameter through the
// C API.
//
// Arguments: the library, dtypes of parameter and gradient, bits of the momentum, weight rounding and flags as
// numbers of csrc/block_math.h, the kernel's number, the elements, and the steps. Prints the least time of a step in
// nanoseconds, and the processor's clock in GHz.
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "block_math.h"

namespace {

template <class Work> double nanoseconds(const Work& work) {
    const auto begin = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - begin).count();
}

// By additions that wait for each other, one in a cycle.
double clock_in_ghz() {
    constexpr int kRounds = 100000, kAdditions = 8;
    double least = 1e30;
    for (int repeat = 0; repeat < 20; ++repeat) {
        long x = 0;
        least = std::min(least, nanoseconds([&] {
                             for (int i = 0; i < kRounds; ++i) {
#pragma GCC unroll 8
                                 for (int k = 0; k < kAdditions; ++k) {
                                     x += 3;
                                     asm volatile("" : "+r"(x));
                                 }
                             }
                         }));
    }
    return kRounds * kAdditions / least;
}

}  // namespace

using Update = int64_t(const lion8bit::TensorRow*, int64_t, const lion8bit::Hyper*, int32_t, int32_t);

int main(int argc, char** argv) {
    if (argc != 10) return std::fprintf(stderr, "9 arguments, see the top of this file\n"), 2;
    void* library = dlopen(argv[1], RTLD_NOW);
    if (!library) return std::fprintf(stderr, "%s\n", dlerror()), 2;
    auto* update = reinterpret_cast<Update*>(dlsym(library, "lion8bit_update"));
    const auto number = [&](int i) { return std::atol(argv[i]); };
    const int64_t count = number(8);
    std::vector<uint16_t> param(2 * count), grad(2 * count), momentum(2 * count, 0x0101);
    uint32_t state = 1;
    for (auto* numbers : {&param, &grad}) {
        for (uint16_t& word : *numbers) {  // of either sign, 2^-7 to 2^-5: as bf16, or with the word below as fp32
            state = state * 1664525u + 1013904223u;
            word = static_cast<uint16_t>(0x3c00 | (state >> 31 << 15) | (state >> 16 & 0xff));
        }
    }
    std::vector<int8_t> residual(count, 1);
    const int32_t bits = static_cast<int32_t>(number(4)), block_size = bits == 4 ? 64 : 128;
    std::vector<float> scales(count / block_size, 0.01f);
    lion8bit::TensorRow tensor = {};
    tensor.param = param.data();
    tensor.grad = grad.data();
    tensor.momentum = momentum.data();
    tensor.momentum_bits = static_cast<int16_t>(bits);
    tensor.scales = bits < 32 ? scales.data() : nullptr;
    tensor.residual = residual.data();
    tensor.rows = 1;
    tensor.cols = count;
    tensor.row_stride = static_cast<uint32_t>(count);
    tensor.step = 1;
    tensor.param_dtype = static_cast<int8_t>(number(2));
    tensor.grad_dtype = static_cast<int8_t>(number(3));
    lion8bit::Hyper hyper = {};
    hyper.lr = 1e-4f, hyper.decay = 0.99f, hyper.blend = 0.9f, hyper.one_minus_blend = 0.1f;
    hyper.beta = 0.99f, hyper.one_minus_beta = 0.01f, hyper.block_size = block_size;
    hyper.weight_rounding = static_cast<int32_t>(number(5));
    hyper.flags = static_cast<uint32_t>(number(6));
    double least = 1e30;
    for (long step = 0; step < number(9); ++step) {
        least = std::min(least, nanoseconds([&] { update(&tensor, 1, &hyper, static_cast<int32_t>(number(7)), 1); }));
    }
    std::printf("%f %f\n", least, number(9) > 1 ? clock_in_ghz() : 0.0);
    return 0;
}
