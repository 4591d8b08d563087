// The mark of functions that Python calls.
#pragma once

#if defined(_WIN32)
#define LION8BIT_EXPORT extern "C" __declspec(dllexport)
#else
#define LION8BIT_EXPORT extern "C" __attribute__((visibility("default")))
#endif
