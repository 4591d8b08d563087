// The interface between the CPU kernels, one per instruction set, and the dispatch in cpu_api.cpp.
#pragma once

#include "block_math.h"

namespace lion8bit {

// Steps the blocks [first, last) of a tensor. Returns the number of elements skipped because of a bad gradient.
using UpdateBlocks = int64_t(const TensorRow& tensor, const Hyper& hyper, int64_t first, int64_t last);

UpdateBlocks update_blocks_baseline;
#if defined(LION8BIT_X86)
UpdateBlocks update_blocks_avx2;
UpdateBlocks update_blocks_avx512;
#endif

}  // namespace lion8bit
