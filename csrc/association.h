// What the CPU and CUDA kernels of the cycle association (Kang et al., NeurIPS 2020) share: checks of arguments,
// constants and error bounds. Schemas and references stand in lib/ops/association.py.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>

#include "arithmetic.h"

namespace segadapt {

// The paper's code adds this to a standard deviation.
constexpr double kSigmaEpsilon = 1e-10;

// A row is constant to rounding when its values lie within eight units of its largest magnitude: equal rows of a map
// give products that a matrix product sums in several orders. Its range decides, as a deviation from a rounded mean
// would exceed any such bound in long rows.
template <class T>
SEGADAPT_SHARED bool is_constant(T top, T bottom) {
  const T largest = top > -bottom ? top : -bottom;  // of the magnitudes
  return top - bottom <= 8 * std::numeric_limits<T>::epsilon() * largest;
}

// |tile - exact| / (|x| |y|) of a product of C terms in T. A chain of C fused additions, the scaling by row and column
// and the rounding of both norms cost at most C + 16 units of half an epsilon. A library that multiplies in bfloat16 or
// TF32 although it was asked not to (which the rescored candidates show) rounds both factors to 8 bits first: 2^-7.
template <class T>
double product_error(int64_t c, bool low_precision) {
  const double full = double(c + 16) * double(std::numeric_limits<T>::epsilon()) / 2;
  return full + (low_precision ? 0x1.02p-7 : 0);
}

// How far below the best tile value the best exact value may lie, in errors: one for each of the pair, and the rounding
// of the margin and of the comparison itself.
constexpr double kPair = 2.001;

template <class T>
double candidate_margin(int64_t c, bool low_precision) {
  return kPair * product_error<T>(c, low_precision);
}

// On CUDA, tensor cores find candidates in half where that pays and its error has a bound: for C in this range. Up to
// kMaxHalfCandidates of a vector are then compared exactly; a vector that has more starts again in float32.
constexpr int64_t kMinHalfChannels = 64, kMaxHalfChannels = 1 << 16;
constexpr int kMaxHalfCandidates = 64;

// Unit vectors are multiplied by this before they are rounded to half, so that their products stay below 2^13, where
// neighbours in half are at most 4 apart.
constexpr float kHalfScale = 90;

// |tile - exact| / (|x| |y|) of a product of C terms which a tensor core sums in float32, where it cuts what lies below
// the 24th bit of the largest, and which is then rounded to half. The rounding of the vectors comes on top.
inline double half_product_error(int64_t c) { return double(c + 16) * 0x1p-23 + 2.0 / (kHalfScale * kHalfScale); }

// Squares and products of norms in this range stay far inside float32's.
constexpr double kSmallestNorm = 1e-12, kLargestNorm = 1e12;

// What a matrix product gets of the vectors, and what exact products divide by.
enum class Form {
  unit,   // x / |x| (of a zero vector: 0)
  left,   // x, scaled row by row where the range demands it: that leaves the row's best column what it is
  right,  // x, scaled as a whole
};

inline void check_rows(const at::Tensor& a, const at::Tensor& b, const char* name) {
  TORCH_CHECK_VALUE(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(1) && a.size(0) > 0 && b.size(0) > 0, name,
                    ": expected [N1, C] and [N2, C] with rows, got ", a.sizes(), " and ", b.sizes());
  TORCH_CHECK_VALUE(a.size(0) <= INT32_MAX && b.size(0) <= INT32_MAX, name, ": more than 2^31 - 1 rows");
  TORCH_CHECK_VALUE(
      a.scalar_type() == b.scalar_type() && (a.scalar_type() == at::kFloat || a.scalar_type() == at::kDouble), name,
      ": expected two tensors of float32 or two of float64");
  TORCH_CHECK_VALUE(a.device() == b.device(), name, ": the tensors are on different devices");
}

inline void check_panel(const at::Tensor& s, const char* name) {
  TORCH_CHECK_VALUE(
      s.dim() == 2 && s.is_contiguous() && (s.scalar_type() == at::kFloat || s.scalar_type() == at::kDouble), name,
      " must be a contiguous float32 or float64 matrix");
}

// A scale for each column of a panel, in its dtype; undefined without one.
inline at::Tensor checked_scale(const std::optional<at::Tensor>& col_scale, const at::Tensor& s) {
  if (!col_scale) return {};
  TORCH_CHECK_VALUE(col_scale->numel() == s.size(1) && col_scale->device() == s.device(),
                    "col_scale: expected a value for each of ", s.size(1), " columns on the panel's device");
  return col_scale->to(s.scalar_type()).contiguous();
}

inline void check_softmax_grad(const at::Tensor& m, const at::Tensor& p, const at::Tensor& row_scale) {
  check_panel(m, "softmax_grad_: m");
  check_panel(p, "softmax_grad_: p");
  TORCH_CHECK_VALUE(m.sizes() == p.sizes() && row_scale.numel() == m.size(0), "softmax_grad_: sizes differ");
  for (const at::Tensor& t : {p, row_scale}) {
    TORCH_CHECK_VALUE(t.scalar_type() == m.scalar_type() && t.device() == m.device(),
                      "softmax_grad_: dtypes or devices differ");
  }
}

}  // namespace segadapt
