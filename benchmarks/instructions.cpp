// Owns the program that benchmarks/instructions.py runs under callgrind: steps one parameter of a given size once.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../csrc/cpu_kernel.h"

extern "C" int64_t lion8bit_update(const lion8bit::Tensor*, int64_t, const lion8bit::Hyper*, int32_t, int32_t);

// Arguments: elements, param dtype, grad dtype, weight rounding, kernel (numbers as in block_math.h and cpu_api.cpp).
int main(int argc, char** argv) {
    if (argc != 6) return std::fputs("usage: instructions elements param grad rounding kernel\n", stderr), 2;
    const int64_t elements = std::atoll(argv[1]);
    constexpr int32_t kBlockSize = 128;
    std::vector<float> param(elements, 0.0f), grad(elements, 0.0f), scales(elements / kBlockSize + 1, 1.0f);
    std::vector<int8_t> codes(elements, 5);
    lion8bit::Hyper hyper = {1e-3f, 1.0f, 0.0f, 0.9f, 0.1f, 0.99f, 0.01f, 0, kBlockSize, std::atoi(argv[4])};
    lion8bit::Tensor tensor = {};
    tensor.param = param.data();
    tensor.grad = grad.data();
    tensor.momentum = codes.data();
    tensor.scales = scales.data();
    tensor.rows = 1;
    tensor.cols = elements;
    tensor.step = 1;
    tensor.param_dtype = std::atoi(argv[2]);
    tensor.grad_dtype = std::atoi(argv[3]);
    return lion8bit_update(&tensor, 1, &hyper, std::atoi(argv[5]), 1) == 0 ? 0 : 1;
}
