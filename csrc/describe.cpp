// Owns the look at Python's tensors from outside of torch: where each lies, and with which dtype, device and shape.
//
// It needs neither torch's nor Python's headers: tensors are read through DLPack's C exchange API (dlpack.h 1.3, which
// torch offers since 2.10), lists through a function of Python's stable ABI. The caller holds Python's lock.
#include <cstdint>

#include "export.h"

namespace {

// DLPack's view of a tensor, which still belongs to torch.
struct DLTensor {
    void* data;
    int32_t device_type, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    const int64_t* shape;    // [ndim]
    const int64_t* strides;  // [ndim], in elements
    uint64_t byte_offset;
};
static_assert(sizeof(DLTensor) == 48, "dlpack.h fixes this layout");

using ListItem = void*(void* list, intptr_t index);      // PyList_GetItem
using ReadTensor = int(void* tensor, DLTensor* result);  // DLPackExchangeAPI::dltensor_from_py_object_no_sync

}  // namespace

// Describes the tensors of a list. The layout of a tensor is a word for dtype, device and dimensions, then its sizes,
// then its strides. Words that fit are written, or compared with what is there.
//
// Returns how many words the layout takes; 0 if one of those compared differs; -1, with Python's exception set, where
// torch cannot tell: a tensor without memory or strides.
LION8BIT_EXPORT int64_t lion8bit_describe(ListItem* item, ReadTensor* read, void* list, int64_t count,
                                          uint64_t* places,  // [2, count], written: the Python object, the address
                                          int64_t* layout,   // [words]
                                          int64_t words, int32_t compare) {
    int64_t used = 0;
    bool same = true;
    const auto put = [&](int64_t word) {
        if (used >= words) {
        } else if (compare) {
            same &= layout[used] == word;
        } else {
            layout[used] = word;
        }
        ++used;
    };
    for (int64_t i = 0; i < count; ++i) {
        DLTensor tensor;
        void* object = item(list, static_cast<intptr_t>(i));
        if (!object || read(object, &tensor)) return -1;
        places[i] = reinterpret_cast<uint64_t>(object);
        places[count + i] = reinterpret_cast<uint64_t>(tensor.data) + tensor.byte_offset;
        put(int64_t{tensor.code} << 56 | int64_t{tensor.bits} << 48 | int64_t{tensor.lanes} << 32 |
            int64_t{tensor.ndim} << 24 | int64_t{tensor.device_type} << 16 | tensor.device_id);
        for (int32_t dim = 0; dim < tensor.ndim; ++dim) put(tensor.shape[dim]);
        for (int32_t dim = 0; dim < tensor.ndim; ++dim) put(tensor.strides[dim]);
    }
    return same ? used : 0;
}
