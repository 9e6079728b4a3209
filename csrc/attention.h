// What the CPU and CUDA kernels of attention_grad_ share; schema and reference stand in lib/ops/association.py.
// On the CPU, vec.h comes before.
#pragma once
#include "association.h"
#include "exponential.h"

namespace segadapt {

inline void check_attention_grad(const at::Tensor& s, const at::Tensor& x, const at::Tensor& y, const at::Tensor& rows,
                                 const at::Tensor& cols) {
  for (const at::Tensor& t : {s, x, y}) check_panel(t, "attention_grad_: s, x and y");
  TORCH_CHECK_VALUE(s.sizes() == x.sizes() && s.sizes() == y.sizes() &&
                        rows.sizes() == at::IntArrayRef({5, s.size(0)}) &&
                        cols.sizes() == at::IntArrayRef({5, s.size(1)}) && rows.is_contiguous() && cols.is_contiguous(),
                    "attention_grad_: sizes differ");
  for (const at::Tensor& t : {x, y, rows, cols}) {
    TORCH_CHECK_VALUE(t.scalar_type() == s.scalar_type() && t.device() == s.device(),
                      "attention_grad_: dtypes or devices differ");
  }
}

// Of one vector i: 1/t, S_ii, A_ii, sum_k A_ik dL/dA_ik, 1/|v|. V: the dtype, or on the CPU a register of it.
template <class V>
struct AttentionRow {
  V inverse, top, peak, mean, scale;

  // A_ij for S_ij. S_ii is the largest but for rounding.
  SEGADAPT_SHARED V attention(V s) const {
    const V below = (s - top) * inverse;
    return exp_negative(below < V{} ? below : V{}) * peak;
  }
  SEGADAPT_SHARED V gradient(V a, V x) const { return a * (x - mean) * inverse; }
};

}  // namespace segadapt
