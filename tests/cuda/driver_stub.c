// SPDX-License-Identifier: Apache-2.0
// Built twice: as libnvidia-ml.so.1 it shows one Hopper GPU, as libcuda.so.1 it lets
// vLLM's CUDA extensions load. No call reaches a device: cuInit finds none.

#include <string.h>

#ifdef STUB_NVML

typedef struct {
  unsigned long long total, free, used;
} memory_t;

static const unsigned long long kTotal = 80ULL << 30;

int nvmlInit(void) { return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned flags) { (void)flags; return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return 0; }
int nvmlDeviceGetCount(unsigned *count) { return nvmlDeviceGetCount_v2(count); }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
  *device = (void *)(unsigned long)(index + 1);
  return index ? 2 : 0;
}
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
  (void)device;
  *major = 9;
  *minor = 0;
  return 0;
}
int nvmlDeviceGetMemoryInfo(void *device, memory_t *memory) {
  (void)device;
  memory->total = kTotal;
  memory->free = kTotal;
  memory->used = 0;
  return 0;
}
int nvmlDeviceGetName(void *device, char *name, unsigned length) {
  (void)device;
  strncpy(name, "NVIDIA stub H100", length);
  return 0;
}
int nvmlDeviceGetUUID(void *device, char *uuid, unsigned length) {
  (void)device;
  strncpy(uuid, "GPU-00000000-0000-0000-0000-000000000000", length);
  return 0;
}
const char *nvmlErrorString(int result) { (void)result; return "stub"; }

#else

enum { kNoDevice = 100, kNotFound = 500 };

#define NO_DEVICE(name) \
  int name(void) { return kNoDevice; }

NO_DEVICE(cuInit)
NO_DEVICE(cuCtxGetCurrent)
NO_DEVICE(cuCtxSetCurrent)
NO_DEVICE(cuDeviceGetAttribute)
NO_DEVICE(cuDevicePrimaryCtxRetain)
NO_DEVICE(cuGetErrorString)
NO_DEVICE(cuMemAddressFree)
NO_DEVICE(cuMemAddressReserve)
NO_DEVICE(cuMemCreate)
NO_DEVICE(cuMemGetAllocationGranularity)
NO_DEVICE(cuMemMap)
NO_DEVICE(cuMemRelease)
NO_DEVICE(cuMemSetAccess)
NO_DEVICE(cuMemUnmap)
NO_DEVICE(cuPointerGetAttribute)
NO_DEVICE(cuTensorMapEncodeTiled)
int cuGetProcAddress_v2(void) { return kNotFound; }

#endif
