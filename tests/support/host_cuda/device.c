/* One device of compute capability 8.9. Its driver answers what the runtime asks it directly. */

#include "cuda.h"

enum { MAJOR = 75, MINOR = 76, INTEGRATED = 18, MULTIPROCESSORS = 16 }; /* of both APIs' attributes */

static int answer(int *value, int attribute, int device) {
    if (device) return INVALID_DEVICE;
    switch (attribute) {
        case MAJOR: *value = 8; break;
        case MINOR: *value = 9; break;
        case MULTIPROCESSORS: *value = 1; break;
        default: *value = 0;
    }
    return SUCCESS;
}

int cudaGetDeviceCount(int *count) {
    *count = 1;
    return SUCCESS;
}

int cudaGetDevice(int *device) {
    *device = 0;
    return SUCCESS;
}

int cudaSetDevice(int device) { return device ? INVALID_DEVICE : SUCCESS; }
int cudaDeviceGetAttribute(int *value, int attribute, int device) { return answer(value, attribute, device); }

int cudaDriverGetVersion(int *version) {
    *version = 13000;
    return SUCCESS;
}

int cuInit(unsigned flags) { return flags ? INVALID_VALUE : SUCCESS; }

int cuDeviceGet(int *device, int ordinal) {
    *device = 0;
    return ordinal ? INVALID_DEVICE : SUCCESS;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) { return answer(value, attribute, device); }
