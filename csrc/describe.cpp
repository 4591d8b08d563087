// Owns what a step does with many of Python's objects at once: fetches gradients, looks at tensors, counts in dicts.
//
// It needs neither torch's nor Python's headers. Tensors are read through the functions that torch keeps for compiled
// models (aoti_torch, a C interface that may only grow), the rest through Python's stable ABI. The caller holds
// Python's lock.
#include <cstdint>

#include "export.h"

namespace {

// What is called, in the order of `_PYTHON` and `_TORCH` in describe.py. Python's functions set its exception where
// they fail.
struct Calls {
    intptr_t (*list_size)(void* list);                               // PyList_Size
    void* (*list_item)(void* list, intptr_t index);                  // PyList_GetItem; a borrowed reference
    int (*set_list_item)(void* list, intptr_t index, void* item);    // PyList_SetItem; takes the reference
    void* (*dict_item)(void* dict, void* key);                       // PyDict_GetItemWithError; a borrowed reference
    int (*set_dict_item)(void* dict, void* key, void* item);         // PyDict_SetItem
    void* (*attribute)(void* object, void* name);                    // PyObject_GetAttr; a new reference
    int (*is_instance)(void* object, const void* type);              // PyObject_IsInstance
    int32_t (*data_ptr)(const void* tensor, void** result);          // aoti_torch_get_data_ptr, and so on; not 0 where
    int32_t (*dim)(const void* tensor, int64_t* result);             // the tensor has no such thing
    int32_t (*sizes)(const void* tensor, const int64_t** result);    // [dim]
    int32_t (*strides)(const void* tensor, const int64_t** result);  // [dim], in elements
    int32_t (*dtype)(const void* tensor, int32_t* result);
    int32_t (*device_type)(const void* tensor, int32_t* result);
    int32_t (*device_index)(const void* tensor, int32_t* result);
    const void* none;  // None
    const void* type;  // torch.Tensor
    intptr_t handle;   // where in a tensor's Python object is what these functions take for the tensor, in bytes
};

}  // namespace

// Fetches `name` of every parameter. Returns how many are not None; -1 with Python's exception set.
LION8BIT_EXPORT int64_t lion8bit_gradients(const Calls* calls,
                                           void* params,   // list
                                           void* name,     // str
                                           void* grads) {  // list of the same length, written
    int64_t found = 0;
    const intptr_t count = calls->list_size(params);
    for (intptr_t i = 0; i < count; ++i) {
        void* param = calls->list_item(params, i);
        void* grad = param ? calls->attribute(param, name) : nullptr;
        if (!grad || calls->set_list_item(grads, i, grad)) return -1;
        found += grad != calls->none;
    }
    return found;
}

// Looks at the tensors of columns. What is seen of one is a word for dtype, device and dimensions, its sizes, its
// strides, and but for the first column its Python object and address. Words are written as far as they fit, or
// compared with what is there. An object is compared before anything is read from it.
//
// Returns how many words there are; 0 if one of those compared differs; -1 where a dict has no such key, and where a
// tensor has no memory or no strides.
LION8BIT_EXPORT int64_t lion8bit_describe(const Calls* calls,
                                          void* columns,  // list: tensors, None, tensors, None, dicts, their key, ...
                                          uint64_t* addresses,  // written: of the first column
                                          int64_t* seen,        // [words]
                                          int64_t words, int32_t compare) {
    int64_t used = 0;
    bool same = true;
    const auto put = [&](int64_t word) {
        if (compare) {
            same &= used < words && seen[used] == word;
        } else if (used < words) {
            seen[used] = word;
        }
        ++used;
    };
    const intptr_t ends = calls->list_size(columns);
    for (intptr_t column = 0; column < ends; column += 2) {
        void* objects = calls->list_item(columns, column);
        void* key = calls->list_item(columns, column + 1);
        const intptr_t count = calls->list_size(objects);
        for (intptr_t i = 0; i < count; ++i) {
            void* object = calls->list_item(objects, i);
            if (key != calls->none) object = calls->dict_item(object, key);
            if (!object) return -1;
            if (column) put(reinterpret_cast<int64_t>(object));
            if (!same) return 0;
            if ((column == 0 || !compare) && calls->is_instance(object, calls->type) != 1) return -1;
            const void* tensor = static_cast<char*>(object) + calls->handle;
            int32_t dtype, device_type, device_index;
            int64_t dim;
            const int64_t *sizes, *strides;
            void* data;
            if (calls->data_ptr(tensor, &data) || calls->dim(tensor, &dim) || calls->sizes(tensor, &sizes) ||
                calls->strides(tensor, &strides) || calls->dtype(tensor, &dtype) ||
                calls->device_type(tensor, &device_type) || calls->device_index(tensor, &device_index)) {
                return -1;
            }
            if (column) {
                put(reinterpret_cast<int64_t>(data));
            } else {
                addresses[i] = reinterpret_cast<uint64_t>(data);
            }
            put(int64_t{dtype} << 48 | int64_t{device_type} << 32 | int64_t{device_index & 0xffff} << 16 | dim);
            for (int64_t k = 0; k < dim; ++k) put(sizes[k]);
            for (int64_t k = 0; k < dim; ++k) put(strides[k]);
        }
    }
    return same ? used : 0;
}

// Puts `item` under a key of every dict if all have this very `former` there. Returns whether they had; -1 with
// Python's exception set.
LION8BIT_EXPORT int32_t lion8bit_replace(const Calls* calls,
                                         void* dicts,  // list
                                         void* key, const void* former, void* item) {
    const intptr_t count = calls->list_size(dicts);
    for (intptr_t i = 0; i < count; ++i) {
        if (calls->dict_item(calls->list_item(dicts, i), key) != former) return 0;
    }
    for (intptr_t i = 0; i < count; ++i) {
        if (calls->set_dict_item(calls->list_item(dicts, i), key, item)) return -1;
    }
    return 1;
}
