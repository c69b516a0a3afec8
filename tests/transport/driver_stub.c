// SPDX-License-Identifier: Apache-2.0
// libcuda.so.1 with GPU 3 alone, whose memory is host memory: checks what it is asked.
#include <cuda.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define PAGE ((size_t)2 << 20)
#define EXPECT(condition) \
  if (!(condition)) return CUDA_ERROR_INVALID_VALUE

static int is_gpu(CUmemLocation location) {
  return location.type == CU_MEM_LOCATION_TYPE_DEVICE && location.id == 3;
}

static int is_known(const CUmemAllocationProp *prop) {
  CUmemAllocationProp expected;
  memset(&expected, 0, sizeof expected);
  expected.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  expected.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  expected.location = prop->location;
  return is_gpu(prop->location) && !memcmp(prop, &expected, sizeof expected);
}

CUresult cuMemGetAllocationGranularity(size_t *granularity,
                                       const CUmemAllocationProp *prop,
                                       CUmemAllocationGranularity_flags option) {
  EXPECT(is_known(prop) && option == CU_MEM_ALLOC_GRANULARITY_MINIMUM);
  *granularity = PAGE;
  return CUDA_SUCCESS;
}

CUresult cuMemCreate(CUmemGenericAllocationHandle *handle, size_t size,
                     const CUmemAllocationProp *prop, unsigned long long flags) {
  EXPECT(is_known(prop) && size % PAGE == 0 && !flags);
  if (size > 16 * PAGE) return CUDA_ERROR_OUT_OF_MEMORY;
  const int memory = memfd_create("gpu", MFD_CLOEXEC);
  EXPECT(memory >= 0 && ftruncate(memory, (off_t)size) == 0);
  *handle = (CUmemGenericAllocationHandle)memory;
  return CUDA_SUCCESS;
}

CUresult cuMemRelease(CUmemGenericAllocationHandle handle) {
  EXPECT(close((int)handle) == 0);
  return CUDA_SUCCESS;
}

CUresult cuMemExportToShareableHandle(void *target, CUmemGenericAllocationHandle handle,
                                      CUmemAllocationHandleType type,
                                      unsigned long long flags) {
  EXPECT(type == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR && !flags);
  *(int *)target = dup((int)handle);
  return CUDA_SUCCESS;
}

CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle *handle,
                                        void *source, CUmemAllocationHandleType type) {
  EXPECT(type == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
  struct stat status;
  EXPECT(fstat((int)(long)source, &status) == 0 && S_ISREG(status.st_mode));
  *handle = (CUmemGenericAllocationHandle)dup((int)(long)source);
  return CUDA_SUCCESS;
}

CUresult cuMemAddressReserve(CUdeviceptr *address, size_t size, size_t alignment,
                             CUdeviceptr fixed, unsigned long long flags) {
  EXPECT(size % PAGE == 0 && !alignment && !fixed && !flags);
  void *range = mmap(0, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  EXPECT(range != MAP_FAILED);
  *address = (CUdeviceptr)range;
  return CUDA_SUCCESS;
}

CUresult cuMemMap(CUdeviceptr address, size_t size, size_t offset,
                  CUmemGenericAllocationHandle handle, unsigned long long flags) {
  struct stat status;
  EXPECT(fstat((int)handle, &status) == 0 && (size_t)status.st_size >= size);
  EXPECT(!offset && !flags);
  EXPECT(mmap((void *)address, size, PROT_NONE, MAP_SHARED | MAP_FIXED, (int)handle,
              0) != MAP_FAILED);
  return CUDA_SUCCESS;
}

CUresult cuMemSetAccess(CUdeviceptr address, size_t size, const CUmemAccessDesc *access,
                        size_t count) {
  EXPECT(count == 1 && is_gpu(access->location));
  EXPECT(access->flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
  EXPECT(mprotect((void *)address, size, PROT_READ | PROT_WRITE) == 0);
  return CUDA_SUCCESS;
}

CUresult cuMemUnmap(CUdeviceptr address, size_t size) {
  EXPECT(mmap((void *)address, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED,
              -1, 0) != MAP_FAILED);
  return CUDA_SUCCESS;
}

CUresult cuMemAddressFree(CUdeviceptr address, size_t size) {
  EXPECT(munmap((void *)address, size) == 0);
  return CUDA_SUCCESS;
}
