#include <ATen/ATen.h>
#include <torch/library.h>

namespace segadapt {
namespace {
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> mutual_argmax(const at::Tensor& a, const at::Tensor& b) {
  return {a, b, a, b};
}
}  // namespace
}  // namespace segadapt

TORCH_LIBRARY_IMPL(segadapt, CPU, m) { m.impl("mutual_argmax", segadapt::mutual_argmax); }
