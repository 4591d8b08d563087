// Owns the program that benchmarks/instructions.py counts under callgrind: one step of one parameter through the C API.
//
// Arguments: dtypes of parameter and gradient, momentum (1: int8, 0: fp32), weight rounding and flags as numbers of
// csrc/block_math.h, the kernel's number, and the elements.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "block_math.h"

using Update = int64_t(const lion8bit::Tensor*, int64_t, const lion8bit::Hyper*, int32_t, int32_t);

int main(int argc, char** argv) {
    if (argc != 9) return std::fprintf(stderr, "8 arguments, see the top of this file\n"), 2;
    void* library = dlopen(argv[1], RTLD_NOW);
    if (!library) return std::fprintf(stderr, "%s\n", dlerror()), 2;
    auto* update = reinterpret_cast<Update*>(dlsym(library, "lion8bit_update"));
    const auto number = [&](int i) { return std::atol(argv[i]); };
    const int64_t count = number(8);
    // bf16 and fp32 alike: 0x3c23 is 0.01 in bf16, and 0x3c233c23 is 0.00996 in fp32.
    std::vector<uint16_t> param(2 * count, 0x3c23), grad(2 * count, 0x3c23), momentum(2 * count, 0x0101);
    std::vector<int8_t> residual(count, 1);
    std::vector<float> scales(count / 128, 0.01f);
    lion8bit::Tensor tensor = {};
    tensor.param = param.data();
    tensor.grad = grad.data();
    tensor.momentum = momentum.data();
    tensor.scales = number(4) ? scales.data() : nullptr;
    tensor.residual = residual.data();
    tensor.rows = 1;
    tensor.cols = count;
    tensor.row_stride = static_cast<uint32_t>(count);
    tensor.step = 1;
    tensor.param_dtype = static_cast<int32_t>(number(2));
    tensor.grad_dtype = static_cast<int32_t>(number(3));
    lion8bit::Hyper hyper = {};
    hyper.lr = 1e-4f, hyper.decay = 0.99f, hyper.blend = 0.9f, hyper.one_minus_blend = 0.1f;
    hyper.beta = 0.99f, hyper.one_minus_beta = 0.01f, hyper.block_size = 128;
    hyper.weight_rounding = static_cast<int32_t>(number(5));
    hyper.flags = static_cast<uint32_t>(number(6));
    update(&tensor, 1, &hyper, static_cast<int32_t>(number(7)), 1);
    return 0;
}
