// The part of the C API that the test uses, written out from the functions' documentation.
#pragma once

#include <cstddef>

using CUdeviceptr = unsigned long long;
using Handle = void*;

extern "C" {
int cuInit(unsigned);
int cuDeviceGet(int*, int);
int cuDeviceGetAttribute(int*, int, int);
int cuDevicePrimaryCtxRetain(Handle*, int);
int cuCtxSetCurrent(Handle);
int cuCtxSynchronize();
int cuMemGetInfo_v2(size_t*, size_t*);
int cuMemAlloc_v2(CUdeviceptr*, size_t);
int cuMemFree_v2(CUdeviceptr);
int cuMemcpyHtoD_v2(CUdeviceptr, const void*, size_t);
int cuMemcpyDtoH_v2(void*, CUdeviceptr, size_t);
int cuMemcpyHtoDAsync_v2(CUdeviceptr, const void*, size_t, Handle);
int cuMemsetD32_v2(CUdeviceptr, unsigned, size_t);
int cuMemsetD32Async(CUdeviceptr, unsigned, size_t, Handle);
int cuMemHostRegister_v2(void*, size_t, unsigned);
int cuMemHostUnregister(void*);
int cuStreamCreate(Handle*, unsigned);
int cuStreamSynchronize(Handle);
int cuStreamWaitEvent(Handle, Handle, unsigned);
int cuStreamBeginCapture_v2(Handle, int);
int cuStreamEndCapture(Handle, Handle*);
int cuStreamIsCapturing(Handle, int*);
int cuEventCreate(Handle*, unsigned);
int cuEventRecord(Handle, Handle);
int cuEventElapsedTime_v2(float*, Handle, Handle);
int cuGraphGetNodes(Handle, Handle*, size_t*);
int cuGraphInstantiateWithFlags(Handle*, Handle, unsigned long long);
int cuGraphExecUpdate_v2(Handle, Handle, void*);
int cuGraphLaunch(Handle, Handle);
int cuGraphExecDestroy(Handle);
int cuGraphDestroy(Handle);
int cuModuleLoadData(Handle*, const void*);
int cuModuleGetFunction(Handle*, Handle, const char*);
int cuModuleGetGlobal_v2(CUdeviceptr*, size_t*, Handle, const char*);
int cuModuleUnload(Handle);
int cuFuncSetAttribute(Handle, int, int);
int cuFuncGetAttribute(int*, int, Handle);
int cuFuncGetParamInfo(Handle, size_t, size_t*, size_t*);
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int*, Handle, int, size_t);
int cuLaunchKernel(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                   Handle, void**, void**);

int nvrtcCreateProgram(Handle*, const char*, const char*, int, const char* const*,
                       const char* const*);
int nvrtcCompileProgram(Handle, int, const char* const*);
int nvrtcGetProgramLogSize(Handle, size_t*);
int nvrtcGetProgramLog(Handle, char*);
int nvrtcGetCUBINSize(Handle, size_t*);
int nvrtcGetCUBIN(Handle, char*);
int nvrtcDestroyProgram(Handle*);
}
