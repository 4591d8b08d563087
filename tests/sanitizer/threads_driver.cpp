// Owns a program that checks how cpu_api.cpp splits blocks over threads, with a kernel that only counts them.
//
// Prints "sound" if every block of every tensor was given to one thread exactly, whatever the number of threads.
#include <atomic>
#include <cstdio>
#include <vector>

#include "cpu_kernel.h"
#include "export.h"

LION8BIT_EXPORT int64_t lion8bit_update(const lion8bit::TensorRow* tensors, int64_t count,
                                        const lion8bit::Hyper* hypers, int32_t kernel, int32_t threads);

int64_t lion8bit::update_blocks_baseline(const TensorRow& tensor, const Hyper&, int64_t first, int64_t last) {
    auto* visits = static_cast<std::atomic<int>*>(tensor.param);
    for (int64_t block = first; block < last; ++block) ++visits[block];
    return last - first;
}

int main() {
    constexpr int64_t kShapes[][2] = {{1, 1}, {0, 5}, {300, 130}, {1, 70000}, {5, 0}, {7, 128}};
    lion8bit::Hyper hyper = {};
    hyper.block_size = 64;
    for (int32_t threads = 1; threads < 10; ++threads) {
        std::vector<std::vector<std::atomic<int>>> visits;
        std::vector<lion8bit::TensorRow> tensors;
        int64_t total = 0;
        for (const auto& shape : kShapes) {
            const int64_t blocks = shape[0] * lion8bit::blocks_per_row(shape[1], hyper.block_size);
            total += blocks;
            visits.emplace_back(blocks);
            lion8bit::TensorRow tensor = {};
            tensor.param = visits.back().data();
            tensor.rows = shape[0];
            tensor.cols = shape[1];
            tensors.push_back(tensor);
        }
        const auto count = static_cast<int64_t>(tensors.size());
        if (lion8bit_update(tensors.data(), count, &hyper, 0, threads) != total) return 1;
        for (const auto& of_tensor : visits) {
            for (const auto& count_of_block : of_tensor) {
                if (count_of_block != 1) return 2;
            }
        }
    }
    std::puts("sound");
}
