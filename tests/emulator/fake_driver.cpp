// Owns a library that stands in for NVIDIA's driver (libcuda.so.1) below the real cuda-bindings: it checks what a
// driver would refuse and hands each launch to a callback of tests/through_driver.py.
#include <dlfcn.h>

#include <cstdint>
#include <cstring>

enum Result : int { kSuccess = 0, kInvalidValue = 1, kInvalidImage = 200, kInvalidContext = 201, kNotFound = 500 };

using Launched = void(uintptr_t function, uint32_t grid, uint32_t threads, void* stream, const void* parameters);

extern "C" {

Launched* fake_launched = nullptr;
int32_t fake_modules = 0;  // loaded so far; functions are numbered likewise, from 1
int32_t fake_failure = 0;  // what the next launches return

static char primary_context;
static void* current_context = nullptr;

int cuInit(unsigned) { return kSuccess; }
int cuDriverGetVersion(int* version) { return *version = 13000, kSuccess; }
int cuGetErrorName(int error, const char** name) {
    return *name = error == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR_OTHER", kSuccess;
}
int cuDevicePrimaryCtxRetain(void** context, int) { return *context = &primary_context, kSuccess; }
int cuCtxGetCurrent(void** context) { return *context = current_context, kSuccess; }
int cuCtxSetCurrent(void* context) { return current_context = context, kSuccess; }
int cuModuleLoadData(uintptr_t* module, const void* image) {
    if (current_context != &primary_context) return kInvalidContext;
    if (std::memcmp(image, "\x7f\x45LF", 4) != 0) return kInvalidImage;
    return *module = static_cast<uintptr_t>(++fake_modules), kSuccess;
}
int cuModuleGetFunction(uintptr_t* function, uintptr_t module, const char* name) {
    if (std::strcmp(name, "lion8bit_update") != 0) return kNotFound;
    return *function = module, kSuccess;
}
int cuLaunchKernel(uintptr_t function, unsigned grid, unsigned grid_y, unsigned grid_z, unsigned threads,
                   unsigned threads_y, unsigned threads_z, unsigned shared, void* stream, void** parameters,
                   void** extra) {
    if (current_context != &primary_context) return kInvalidContext;
    if (grid == 0 || grid_y * grid_z * threads_y * threads_z != 1 || shared != 0 || extra) return kInvalidValue;
    if (fake_failure) return fake_failure;
    fake_launched(function, grid, threads, stream, parameters[0]);
    return kSuccess;
}

// cuda-bindings asks for every function by this one.
int cuGetProcAddress_v2(const char* name, void** address, int, uint64_t, int* found) {
    Dl_info self;
    dladdr(&primary_context, &self);
    void* library = dlopen(self.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    *address = dlsym(library, name);
    if (found) *found = *address ? 0 : 1;
    return *address ? kSuccess : kNotFound;
}
int cuGetProcAddress(const char* name, void** address, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, address, version, flags, nullptr);
}

}  // extern "C"
