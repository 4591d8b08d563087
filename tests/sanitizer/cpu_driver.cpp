// Owns a program that runs the CPU kernels over buffers of exactly the right size, to be built with the sanitizers.
//
// Without an argument it must end well. With "param", "grad", "momentum", "scales" or "residual" that buffer is one
// element short, and the sanitizers must stop it: that shows that they watch the kernels' own accesses. With "digest"
// and the number of a kernel it runs that one alone and prints a hash of all results, which every processor has to
// give. A number after that is set as the floating-point environment of the calling thread.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cpu_kernel.h"

extern "C" {
int32_t lion8bit_kernels();
uint64_t lion8bit_environment();
void lion8bit_set_environment(uint64_t environment);
int64_t lion8bit_update(const lion8bit::TensorRow* tensors, int64_t count, const lion8bit::Hyper* hypers,
                        int32_t kernel, int32_t threads);
}

namespace {

using namespace lion8bit;

// A heap buffer that ends with its last element, `shift` bytes beyond an aligned address; pseudorandom small numbers.
struct Buffer {
    Buffer(int64_t elements, int64_t size, int64_t shift)
        : bytes(elements * size), base(static_cast<char*>(std::malloc(elements * size + shift))), data(base + shift) {
        static uint32_t state = 1;
        for (int64_t i = 0; i < elements * size; ++i) {
            state = state * 1664525u + 1013904223u;
            // The exponent's byte of a little-endian number stays below that of 1: nothing is NaN or infinite.
            data[i] = static_cast<char>(i % size == size - 1 && size > 1 ? 0x3c | (state >> 31 << 7) : state >> 24);
        }
    }
    ~Buffer() {
        for (int64_t i = 0; i < bytes; ++i) digest = (digest ^ static_cast<unsigned char>(data[i])) * 1099511628211u;
        std::free(base);
    }
    Buffer(const Buffer&) = delete;
    int64_t bytes;
    char *base, *data;
    static uint64_t digest;  // of what all buffers held at their end
};

uint64_t Buffer::digest = 14695981039346656037u;  // FNV-1a

struct Case {
    int64_t rows, cols;
    int32_t param_dtype, grad_dtype, momentum_bits, rounding, block;
    uint32_t flags;
    bool shifted;  // pointers aligned to one element only
    bool idle;     // all gradients zero
    int32_t kernel, threads;
};

void run(const Case& c, const std::string& fault) {
    const auto size = [](int32_t dtype) { return dtype == kFloat32 ? 4 : 2; };
    const int64_t count = c.rows * c.cols, blocks = c.rows * blocks_per_row(c.cols, c.block);
    const auto make = [&](const char* name, int64_t elements, int64_t bytes) {
        return Buffer(elements > 0 ? elements - (fault == name) : 0, bytes, c.shifted ? bytes : 0);
    };
    Buffer param = make("param", count, size(c.param_dtype)), grad = make("grad", count, size(c.grad_dtype));
    const bool quantized = c.momentum_bits < 32;
    const int64_t row_bytes = c.momentum_bits == 4 ? (c.cols + 1) / 2 : c.cols;
    Buffer momentum = make("momentum", c.rows * row_bytes, quantized ? 1 : 4), scales = make("scales", blocks, 4);
    Buffer residual = make("residual", c.rounding == kCompensated ? count : 0, 1);
    if (c.idle && fault.empty()) std::memset(grad.data, 0, count * size(c.grad_dtype));
    TensorRow tensor = {};
    tensor.param = param.data;
    tensor.grad = grad.data;
    tensor.momentum = momentum.data;
    tensor.scales = quantized ? reinterpret_cast<float*>(scales.data) : nullptr;
    tensor.residual = c.rounding == kCompensated ? reinterpret_cast<int8_t*>(residual.data) : nullptr;
    tensor.rows = c.rows;
    tensor.cols = c.cols;
    tensor.row_stride = static_cast<uint32_t>(c.cols);
    tensor.first = c.shifted;
    tensor.seed = 7;
    tensor.step = 1;
    tensor.param_dtype = static_cast<int8_t>(c.param_dtype);
    tensor.grad_dtype = static_cast<int8_t>(c.grad_dtype);
    tensor.momentum_bits = static_cast<int16_t>(c.momentum_bits);
    const Hyper hyper = {1e-3f, 1.0f, 0.1f, 0.9f, 0.1f, 0.99f, 0.01f, 0.5f, c.flags, c.block, c.rounding};
    lion8bit_update(&tensor, 1, &hyper, c.kernel, c.threads);
}

}  // namespace

int main(int argc, char** argv) {
    const bool digests = argc > 2;
    const uint64_t environment = argc > 3 ? std::strtoull(argv[3], nullptr, 0) : lion8bit_environment();
    lion8bit_set_environment(environment);
    const std::string fault = argc == 2 ? argv[1] : "";
    const int32_t alone = digests ? std::atoi(argv[2]) : -1;
    const int64_t shapes[][2] = {{0, 0},   {1, 1},   {3, 7},   {1, 63},  {2, 65},  {1, 127},
                                 {2, 128}, {1, 129}, {5, 200}, {2, 256}, {1, 257}, {1, 9001}};
    int cases = 0;
    for (int32_t kernel = 0; kernel < lion8bit_kernels(); ++kernel) {
        if (digests && kernel != alone) continue;
        for (int32_t dtypes = 0; dtypes < 9; ++dtypes) {
            for (int32_t rounding = kNearest; rounding <= kCompensated; ++rounding) {
                const int32_t param_dtype = dtypes / 3, grad_dtype = dtypes % 3;
                if (rounding == kCompensated && param_dtype != kBfloat16) continue;
                for (const auto& shape : shapes) {
                    for (int32_t number = 0; number < 3 * 8; ++number) {
                        constexpr int32_t kMomentumBits[] = {4, 8, 32};
                        const int32_t bits = number % 8;  // a choice each
                        const int32_t block = 64 << cases % 3, threads = 1 + cases % 2;
                        const uint32_t flags = bits & 1 ? 15 : 0;
                        run({shape[0], shape[1], param_dtype, grad_dtype, kMomentumBits[number / 8], rounding, block,
                             flags, (bits & 2) != 0, (bits & 4) != 0, kernel, threads},
                            fault);
                        ++cases;
                    }
                }
            }
        }
    }
    if (lion8bit_environment() != environment) return 1;
    if (digests) {
        std::printf("%016llx\n", static_cast<unsigned long long>(Buffer::digest));
    } else {
        std::printf("sound\n");
    }
    return 0;
}
