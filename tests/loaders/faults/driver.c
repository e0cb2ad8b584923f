/* A CUDA driver for machines without one, so that the real kvikio runs there. It is named libcuda.so.1.
 *
 *   (nothing)   no device: every call says that CUDA is not initialised, and kvikio reads into host memory
 *   -DHANGS     not even its version can be asked, for which kvikio waits for ever
 *   -DDEVICE    one device, whose memory is ordinary memory that only these functions may touch
 */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 1, NOT_INITIALISED = 3, UNKNOWN = 999 };
enum { ATTRIBUTE_CONTEXT = 1, ATTRIBUTE_MEMORY_TYPE = 2, ATTRIBUTE_DEVICE_POINTER = 3, ATTRIBUTE_ORDINAL = 9 };

int cuDriverGetVersion(int *version) {
#ifdef HANGS
    return UNKNOWN;
#endif
    *version = 13000;
    return OK;
}

int cuGetErrorName(int error, const char **name) { (void)error; *name = "FAKE_ERROR"; return OK; }
int cuGetErrorString(int error, const char **text) { (void)error; *text = "of the test's driver"; return OK; }

#ifndef DEVICE
#define REFUSED(name) int name(void) { return NOT_INITIALISED; }
REFUSED(cuInit)
REFUSED(cuDeviceGet)
REFUSED(cuDeviceGetCount)
REFUSED(cuDevicePrimaryCtxRetain)
REFUSED(cuCtxGetCurrent)
REFUSED(cuCtxSetCurrent)
REFUSED(cuMemHostAlloc)
REFUSED(cuMemFreeHost)
REFUSED(cuMemHostRegister_v2)
REFUSED(cuMemHostUnregister)
REFUSED(cuMemcpyHtoDAsync_v2)
REFUSED(cuMemcpyDtoHAsync_v2)
REFUSED(cuMemcpyAsync)
REFUSED(cuMemcpyBatchAsync_v2)
REFUSED(cuPointerGetAttribute)
REFUSED(cuPointerGetAttributes)
REFUSED(cuMemGetAddressRange_v2)
REFUSED(cuCtxPushCurrent_v2)
REFUSED(cuCtxPopCurrent_v2)
REFUSED(cuStreamCreate)
REFUSED(cuStreamSynchronize)
#else
static struct { uintptr_t start, length; } allocated[256];
static int allocations;
static int the_context;

static int find(uintptr_t address) {
    for (int i = 0; i < allocations; i++)
        if (address - allocated[i].start < allocated[i].length) return i;
    return -1;
}

int cuInit(unsigned flags) { (void)flags; return OK; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return ordinal ? INVALID_VALUE : OK; }
int cuDeviceGetCount(int *count) { *count = 1; return OK; }
int cuDevicePrimaryCtxRetain(void **context, int device) { (void)device; *context = &the_context; return OK; }
int cuCtxGetCurrent(void **context) { *context = &the_context; return OK; }
int cuCtxSetCurrent(void *context) { (void)context; return OK; }
int cuCtxPushCurrent_v2(void *context) { (void)context; return OK; }
int cuCtxPopCurrent_v2(void **context) { *context = &the_context; return OK; }
int cuStreamCreate(void **stream, unsigned flags) { (void)flags; *stream = &the_context; return OK; }
int cuStreamSynchronize(void *stream) { (void)stream; return OK; }

int cuMemAlloc_v2(uintptr_t *address, size_t length) {
    if (allocations == 256) return INVALID_VALUE;
    *address = (uintptr_t)aligned_alloc(4096, (length + 4095) & ~(size_t)4095);
    allocated[allocations].start = *address;
    allocated[allocations++].length = length;
    return OK;
}

int cuMemGetAddressRange_v2(uintptr_t *start, size_t *length, uintptr_t address) {
    int found = find(address);
    if (found < 0) return INVALID_VALUE;
    *start = allocated[found].start;
    *length = allocated[found].length;
    return OK;
}

int cuPointerGetAttribute(void *value, int attribute, uintptr_t address) {
    if (find(address) < 0) return INVALID_VALUE;
    if (attribute == ATTRIBUTE_CONTEXT) *(void **)value = &the_context;
    else if (attribute == ATTRIBUTE_MEMORY_TYPE) *(unsigned *)value = 2;
    else if (attribute == ATTRIBUTE_DEVICE_POINTER) *(uintptr_t *)value = address;
    else if (attribute == ATTRIBUTE_ORDINAL) *(int *)value = 0;
    else return INVALID_VALUE;
    return OK;
}

int cuPointerGetAttributes(unsigned count, int *attributes, void **values, uintptr_t address) {
    for (unsigned i = 0; i < count; i++)
        if (find(address) < 0) *(unsigned *)values[i] = 0;
        else if (cuPointerGetAttribute(values[i], attributes[i], address)) return INVALID_VALUE;
    return OK;
}

int cuMemHostAlloc(void **memory, size_t length, unsigned flags) { (void)flags; *memory = malloc(length); return OK; }
int cuMemFreeHost(void *memory) { free(memory); return OK; }
int cuMemHostRegister_v2(void *memory, size_t length, unsigned flags) {
    (void)memory, (void)length, (void)flags;
    return OK;
}
int cuMemHostUnregister(void *memory) { (void)memory; return OK; }

int cuMemcpyAsync(uintptr_t to, uintptr_t from, size_t length, void *stream) {
    (void)stream;
    memcpy((void *)to, (void *)from, length);
    return OK;
}
int cuMemcpyHtoDAsync_v2(uintptr_t to, void *from, size_t length, void *stream) {
    return cuMemcpyAsync(to, (uintptr_t)from, length, stream);
}
int cuMemcpyDtoHAsync_v2(void *to, uintptr_t from, size_t length, void *stream) {
    return cuMemcpyAsync((uintptr_t)to, from, length, stream);
}
int cuMemcpyDtoH_v2(void *to, uintptr_t from, size_t length) { return cuMemcpyAsync((uintptr_t)to, from, length, 0); }
int cuMemcpyHtoD_v2(uintptr_t to, void *from, size_t length) { return cuMemcpyAsync(to, (uintptr_t)from, length, 0); }
int cuMemsetD8_v2(uintptr_t to, unsigned char value, size_t length) { memset((void *)to, value, length); return OK; }
int cuMemcpyBatchAsync_v2(uintptr_t *to, uintptr_t *from, size_t *length, size_t count) {
    for (size_t i = 0; i < count; i++) memcpy((void *)to[i], (void *)from[i], length[i]);
    return OK;
}
#endif

/* kvikio looks all of its functions up and calls these in neither case. */
#define UNUSED(name) int name(void) { return UNKNOWN; }
UNUSED(cuCtxCreate_v2)
UNUSED(cuCtxCreate_v4)
UNUSED(cuCtxDestroy_v2)
UNUSED(cuCtxGetDevice)
UNUSED(cuDeviceGetAttribute)
UNUSED(cuDevicePrimaryCtxRelease_v2)
UNUSED(cuEventCreate)
UNUSED(cuEventDestroy_v2)
UNUSED(cuEventQuery)
UNUSED(cuEventRecord)
UNUSED(cuEventSynchronize)
UNUSED(cuLaunchHostFunc)
UNUSED(cuMemcpyBatchAsync)
UNUSED(cuStreamDestroy_v2)
