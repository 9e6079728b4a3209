#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/cuda/CUDAException.h>
#include <torch/library.h>

namespace segadapt {
namespace {
__global__ void k(float* x) { x[threadIdx.x] = 1; }
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> mutual_argmax(const at::Tensor& a, const at::Tensor& b) {
  c10::cuda::CUDAGuard guard(a.device());
  k<<<1, 32, 0, c10::cuda::getCurrentCUDAStream()>>>(a.data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {a, b, a, b};
}
}  // namespace
}  // namespace segadapt

TORCH_LIBRARY_IMPL(segadapt, CUDA, m) { m.impl("mutual_argmax", segadapt::mutual_argmax); }
