// Owns a program that runs the emulated kernel over buffers of exactly the right size, to be built with the sanitizers.
//
// Without an argument it must end well. With "cols", "scales" or "unaligned" it hands the kernel a table that is wrong
// in that way, and the sanitizers must stop it: that shows that they watch the kernel's own accesses.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "emulated_kernel.cpp"

namespace {

// A heap buffer that ends with its last element, `shift` bytes beyond an aligned address.
struct Buffer {
    Buffer(size_t bytes, size_t shift) : base(static_cast<char*>(std::malloc(bytes + shift))), data(base + shift) {
        std::memset(base, 0, bytes + shift);
    }
    ~Buffer() { std::free(base); }
    Buffer(const Buffer&) = delete;
    char *base, *data;
};

struct Case {
    int64_t rows, cols;
    int32_t param_dtype, grad_dtype, momentum_bits, rounding, general, on_device;
    bool shifted;  // pointers aligned to one element only
};

int32_t run_case(const Case& c, const std::string& fault) {
    constexpr int32_t kBlock = 128;
    const int64_t count = c.rows * c.cols, blocks = c.rows * lion8bit::blocks_per_row(c.cols, kBlock);
    const size_t param_bytes = c.param_dtype == kFloat32 ? 4 : 2, grad_bytes = c.grad_dtype == kFloat32 ? 4 : 2;
    const bool quantized = c.momentum_bits < 32;
    const int64_t row_bytes = (c.cols * c.momentum_bits + 7) / 8;
    const size_t short_by = fault == "scales" ? 1 : 0;
    Buffer param(count * param_bytes, c.shifted ? param_bytes : 0),
        grad(count * grad_bytes, c.shifted ? grad_bytes : 0);
    Buffer momentum(c.rows * row_bytes, c.shifted ? (quantized ? 1 : 4) : 0), scales((blocks - short_by) * 4, 0);
    Buffer residual(c.rounding == kCompensated ? count : 0, c.shifted ? 1 : 0);
    auto launch = std::make_unique<Small>();
    std::memset(static_cast<void*>(launch.get()), 0, sizeof(Small));
    unsigned long long nonfinite = 0;
    launch->nonfinite = &nonfinite;
    launch->count = 1;
    launch->passes = 1;
    lion8bit::TensorRow& tensor = launch->tensors[0];
    tensor.param = param.data;
    tensor.grad = fault == "unaligned" ? grad.data + 1 : grad.data;
    tensor.momentum = momentum.data;
    tensor.scales = quantized ? reinterpret_cast<float*>(scales.data) : nullptr;
    tensor.residual = reinterpret_cast<int8_t*>(residual.data);
    tensor.rows = c.rows;
    tensor.cols = fault == "cols" ? c.cols + 1 : c.cols;
    tensor.row_stride = static_cast<uint32_t>(c.cols);
    tensor.first = c.shifted;
    tensor.seed = 7;
    tensor.step = 1;
    tensor.param_dtype = c.param_dtype;
    tensor.grad_dtype = c.grad_dtype;
    tensor.momentum_bits = c.momentum_bits;
    launch->hypers[0] = {1e-3f, 1.0f, 0.0f, 0.9f, 0.1f, 0.99f, 0.01f, 0.5f, c.general ? 15u : 0u, kBlock, c.rounding};
    Buffer counters(2 * sizeof(lion8bit::Counter), 0);
    float lr = 1e-3f, grad_scale = 2.0f, found_inf = 0.0f;
    launch->counters = reinterpret_cast<lion8bit::Counter*>(counters.data);
    launch->grad_scale = &grad_scale;
    launch->found_inf = &found_inf;
    launch->rates[0] = {&lr, 1.0, 0.1};
    const int64_t tiles = (blocks * kBlock + 2047) / 2048;
    return emulate(c.param_dtype, c.grad_dtype, c.momentum_bits, kBlock, c.rounding, c.general, c.on_device, 2, 0,
                   tiles, launch.get());
}

}  // namespace

int main(int argc, char** argv) {
    const std::string fault = argc > 1 ? argv[1] : "";
    const int64_t shapes[][2] = {{1, 1}, {1, 127}, {1, 128}, {1, 129}, {3, 8}, {5, 17}, {2, 256}, {3, 200}, {1, 5000}};
    for (const auto& shape : shapes) {
        for (int32_t number = 0; number < 3 * 128; ++number) {
            constexpr int32_t kMomentumBits[] = {4, 8, 32};
            const int32_t bits = number % 128;  // a choice each
            const int32_t param_dtype = bits & 1, grad_dtype = bits >> 1 & 1, on_device = bits >> 6 & 1;
            const int32_t rounding = (bits >> 2 & 1) + (bits >> 5 & 1);
            if ((bits & 0x24) == 0x20) continue;  // the same rounding as 0x04
            if (rounding == kCompensated && param_dtype != kBfloat16) continue;
            if (on_device && param_dtype != grad_dtype) continue;
            const Case c = {shape[0], shape[1],      param_dtype, grad_dtype,          kMomentumBits[number / 128],
                            rounding, bits >> 3 & 1, on_device,   (bits >> 4 & 1) != 0};
            if (const int32_t error = run_case(c, fault)) {
                std::printf("error %d\n", error);
                return 1;
            }
        }
    }
    std::printf("sound\n");
    return 0;
}
