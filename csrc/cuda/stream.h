// The stream that every op launches on.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

namespace rmfast {

// PyTorch's current stream. Its C function lives in libtorch_cuda, which a CPU build of torch does not have: linked
// plainly, this library would not load there.
inline cudaStream_t current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Get>(dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(get != nullptr, "rmfast: this process has no libtorch_cuda, so no CUDA stream");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "rmfast: no current CUDA stream on device ", device);
  return static_cast<cudaStream_t>(stream);
}

}  // namespace rmfast
