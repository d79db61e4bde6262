/* CUDA's driver (-DDRIVER) and runtime libraries for a GPU that is not there: memory is the host's, kernels are
   not run but recorded. MOQC_RECORD names the file that gets a line for each launch, copy and graph. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void record(const char* what, const unsigned* numbers, int count) {
  FILE* file = fopen(getenv("MOQC_RECORD"), "a");
  if (file == NULL) abort();
  fputs(what, file);
  for (int i = 0; i < count; ++i) fprintf(file, " %u", numbers[i]);
  fputc('\n', file);
  fclose(file);
}

static int copy(const char* what, void* to, const void* from, size_t bytes) {
  const unsigned size = (unsigned)bytes;
  record(what, &size, 1);
  memcpy(to, from, bytes);
  return 0;
}

static int made(void** handle) {
  *handle = malloc(1);
  return 0;
}

#ifdef DRIVER

/* CUlaunchConfig and CUlaunchAttribute of cuda.h. */
struct attribute { int id; char pad[4]; char value[64]; };
struct configuration {
  unsigned grid[3], block[3], shared;
  void* stream;
  const struct attribute* attributes;
  unsigned count;
};

int cuInit(unsigned flags) { return 0; }
int cuDeviceGetCount(int* count) { *count = 1; return 0; }
int cuDeviceGetName(char* name, int size, int device) { snprintf(name, size, "recorder"); return 0; }
int cuGetErrorName(int status, const char** name) { *name = "error"; return 0; }
int cuGetErrorString(int status, const char** text) { *text = "error"; return 0; }
int cuModuleLoadData(void** module, const void* image) { return made(module); }
int cuModuleUnload(void* module) { return 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) { *function = strdup(name); return 0; }
int cuFuncSetAttribute(void* function, int attribute, int value) {
  const unsigned numbers[] = {(unsigned)attribute, (unsigned)value};
  record(function, numbers, 2);
  return 0;
}
int cuLaunchKernelEx(const struct configuration* at, void* function, void** arguments, void** extra) {
  unsigned numbers[24] = {at->grid[0], at->grid[1], at->grid[2], at->block[0], at->block[1], at->block[2], at->shared};
  for (unsigned i = 0; i < at->count; ++i) numbers[7 + i] = (unsigned)at->attributes[i].id;
  record(function, numbers, 7 + (int)at->count);
  return 0;
}
int cuTensorMapEncodeTiled(void) { return 801; }  /* not supported */
int cuMemsetD8Async(void* to, unsigned char value, size_t bytes, void* stream) {
  const unsigned size = (unsigned)bytes;
  record("clear", &size, 1);
  memset(to, value, bytes);
  return 0;
}
int cuMemcpyHtoDAsync_v2(void* to, const void* from, size_t bytes, void* s) { return copy("up", to, from, bytes); }
int cuMemcpyDtoHAsync_v2(void* to, const void* from, size_t bytes, void* s) { return copy("down", to, from, bytes); }
int cuStreamSynchronize(void* stream) { return 0; }
int cuStreamBeginCapture_v2(void* stream, int mode) { record("capture", NULL, 0); return 0; }
int cuStreamEndCapture(void* stream, void** graph) { record("captured", NULL, 0); return made(graph); }
int cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long flags) { return made(executable); }
int cuGraphGetNodes(void* graph, void* nodes, size_t* count) { *count = 0; return 0; }
int cuGraphDestroy(void* graph) { return 0; }
int cuGraphLaunch(void* executable, void* stream) { record("graph", NULL, 0); return 0; }

#else

enum { MAJOR = 75, MINOR = 76 };  /* cudaDevAttrComputeCapability... */
int cudaDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == MAJOR ? 8 : attribute == MINOR ? 7 : 1024;
  return 0;
}
int cudaGetDeviceCount(int* count) { *count = 1; return 0; }
int cudaGetDevice(int* device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetDeviceProperties(void* properties, int device) { return 801; }
const char* cudaGetErrorName(int status) { return "error"; }
const char* cudaGetErrorString(int status) { return "error"; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaMalloc(void** memory, size_t bytes) { *memory = aligned_alloc(256, (bytes + 255) / 256 * 256); return 0; }
int cudaFree(void* memory) { free(memory); return 0; }
int cudaMallocHost(void** memory, size_t bytes) { return cudaMalloc(memory, bytes); }
int cudaFreeHost(void* memory) { return cudaFree(memory); }
int cudaMemGetInfo(size_t* unused, size_t* all) { *unused = *all = (size_t)1 << 32; return 0; }
int cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, void* s) { return copy("copy", to, from, bytes); }
int cudaMemcpyPeerAsync(void* to, int d, const void* from, int e, size_t n, void* s) { return copy("peer", to, from, n); }
int cudaStreamCreate(void** stream) { return made(stream); }
int cudaStreamCreateWithFlags(void** stream, unsigned flags) { return made(stream); }
int cudaStreamDestroy(void* stream) { free(stream); return 0; }
int cudaStreamSynchronize(void* stream) { return 0; }
int cudaStreamWaitEvent(void* stream, void* event, unsigned flags) { return 0; }
int cudaStreamBeginCapture(void* stream, int mode) { return 801; }
int cudaStreamEndCapture(void* stream, void** graph) { return 801; }
int cudaGraphInstantiate(void** executable, void* graph, unsigned long long flags) { return 801; }
int cudaGraphLaunch(void* executable, void* stream) { return 801; }
int cudaGraphDestroy(void* graph) { return 0; }
int cudaGraphExecDestroy(void* executable) { return 0; }
int cudaEventCreate(void** event) { return made(event); }
int cudaEventDestroy(void* event) { free(event); return 0; }
int cudaEventRecord(void* event, void* stream) { return 0; }
int cudaEventSynchronize(void* event) { return 0; }
int cudaEventElapsedTime(float* milliseconds, void* first, void* last) { *milliseconds = 0; return 0; }

#endif
