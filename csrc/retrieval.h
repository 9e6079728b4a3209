// What the CPU and CUDA kernels for retrieval share: the truth, and how far a tile may be from it.
//
// The truth is d = max(|x|^2 + |y|^2 - 2 x y, 1e-8) in float64, all three products summed by exact_dot. A tile gives
// t ~ |y|^2 - 2 x y, and only where the bound below leaves a comparison of d - |x|^2 open is d itself computed. To make
// the bound narrow, products are summed over pieces of kDepth and then added: a chain of n additions errs by no more
// than n u sum |x_k y_k|, whatever its order.
#pragma once
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <limits>

namespace segadapt {

constexpr int64_t kDepth = 512;
constexpr double kFloor = 1e-8;

// |t - (d - |x|^2)| <= xy |x| |y| + xx |x|^2 + yy |y|^2 + least, before the floor, together with the rounding of
// another distance to be compared: products, |y|^2 rounded to T, the difference rounded to T, float64 sums on both
// sides, and products below T's range.
struct ErrorBound {
  double xy, xx, yy, least;
  double operator()(double x, double y) const { return xy * x * y + xx * x * x + yy * y * y + least; }
};

template <class T>
ErrorBound error_bound(int64_t channels) {
  const double u = std::numeric_limits<T>::epsilon() / 2, v = std::numeric_limits<double>::epsilon() / 2;
  const double c = double(channels), chain = std::min(c, double(kDepth)) + c / double(kDepth) + 3;
  return {1.01 * (2 * chain * u + 2 * u + v * (c / 4 + 64)), 1.01 * 8 * v, 1.01 * (2 * u + 8 * v),
          4 * c * double(std::numeric_limits<T>::min())};
}

// Whether tiles of float32 could overflow; such magnitudes are taken to float64.
inline bool overflows(at::ScalarType type, double longest_x, double longest_y) {
  return type == at::kFloat && longest_x + longest_y > 1e18;
}

inline void check_points(const at::Tensor& x, const at::Tensor& y) {
  TORCH_CHECK_VALUE(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1) && x.size(1) > 0 &&
                        x.device() == y.device() && x.scalar_type() == y.scalar_type() &&
                        (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble),
                    "expected [N1, C] and [N2, C], both float32 or float64, got ", x.sizes(), " and ", y.sizes());
}

}  // namespace segadapt
