// What this library is, and CUDA's own words for its error codes. setup.py passes RWKVMPI_ARCHITECTURES.
#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

#define RWKVMPI_TEXT_OF(x) #x
#define RWKVMPI_TEXT(x) RWKVMPI_TEXT_OF(x)

#ifdef __CUDACC__
extern "C" const char* rwkvmpi_cuda_error_text(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}
// The CUDA that this library's runtime belongs to: 13000 for 13.0.
extern "C" int rwkvmpi_cuda_version() { return CUDART_VERSION; }
#else
extern "C" const char* rwkvmpi_cuda_error_text(int) { return "the emulation has no errors of CUDA"; }
extern "C" int rwkvmpi_cuda_version() { return 0; }
#endif

// Machine code (sm_90a) and PTX (compute_80) in this library, with dots between: nvcc splits an option at commas.
extern "C" const char* rwkvmpi_cuda_architectures() {
#ifdef RWKVMPI_ARCHITECTURES
  return RWKVMPI_TEXT(RWKVMPI_ARCHITECTURES);
#else
  return "";
#endif
}
