// Schemas of all operators. Kernels register themselves in cpu/*.cpp and cuda/*.cu; fake kernels, autograd formulas and
// the PyTorch references stand in lib/ops.py.
#include <torch/library.h>

TORCH_LIBRARY(segadapt, m) {
  // ---- Cycle association (Kang et al., NeurIPS 2020) ----------------------------------------------------------------

  // For each row of a [N1, C] the row of b [N2, C] with the largest dot product of the normalised vectors, and the
  // reverse.
  // -> row_index [N1] int64, row_value [N1], col_index [N2] int64, col_value [N2]; values in the inputs' dtype.
  // float32 or float64. Exact and deterministic: ties of the float64 dot products go to the lowest index.
  m.def(
      "mutual_argmax(Tensor a, Tensor b) -> (Tensor row_index, Tensor row_value, Tensor col_index, Tensor col_value)");

  // For each row of x [N1, C] the row of y [N2, C] with the largest dot product, as exact. -> index [N1] int64.
  m.def("product_argmax(Tensor x, Tensor y) -> Tensor");

  // In place on a panel s [R, N], contiguous: s_ij <- softmax_j(s_ij c_j / t_i), with column scales c [N] (or ones) and
  // t_i = unbiased standard deviation of row i + 1e-10 (contrast normalisation; its shift cancels), or 1.
  // -> 1 / t [R]; 0 where the row is constant to rounding, so that its softmax is uniform and its gradient zero.
  m.def("contrast_softmax_(Tensor(a!) s, Tensor? col_scale, bool contrast) -> Tensor");

  // In place on m [R, N] = dL/dP, with P [R, N] the rows' softmax: m_ij <- P_ij (m_ij - sum_k P_ik m_ik) r_i c_j;
  // col_sum [N] += sum_i P_ij m_ij (of the old m). Bits depend on the number of threads, not on the run.
  m.def("softmax_grad_(Tensor(a!) m, Tensor p, Tensor row_scale, Tensor? col_scale, Tensor(b!) col_sum) -> ()");

  // ---- Class-balanced pseudo-labels (Zou et al., ECCV 2018, ICCV 2019) ----------------------------------------------

  // argmax_c of the bilinearly upsampled logits [N, C, h, w], C <= 255 -> label [N, H, W] uint8, size = (H, W). Any
  // floating dtype (half and bfloat16 are interpolated in float32). Deterministic; ties go to the lowest class.
  m.def("upsample_argmax(Tensor logits, SymInt[2] size, bool align_corners) -> Tensor label");

  // p = softmax of the upsampled logits (or, with probabilities, the values themselves), averaged with the mirrored
  // image's p (flipped, mirrored back), times prior [C, H, W] float32. label [N, H, W] uint8 = the first argmax_c p_c,
  // confidence float32 = max_c p_c. Counts confidences by class and float bits into hist: int64 [C, 2^18 + 2] without
  // bins (2^18 bins of 2^12 floats over [0, 2), then invalid values, then all pixels of the class), [C, 2^12] with bins
  // [C] int64 (the floats inside bin bins[c]). Counted are every ds_rate-th pixel of a class in raster order, starting
  // anew in each image or, with own, p_c of every ds_rate-th pixel of the image for all c. Deterministic; p has the
  // same bits in every pass.
  m.def(
      "confidence_histogram_(Tensor(a!) hist, Tensor? bins, Tensor logits, Tensor? flipped, Tensor? prior, "
      "SymInt[2] size, bool align_corners, bool probabilities, int ds_rate, bool own) "
      "-> (Tensor label, Tensor confidence)");

  // The counting alone, for label and confidence [N, H, W] kept from confidence_histogram_ (not own).
  m.def("count_confidences_(Tensor(a!) hist, Tensor? bins, Tensor label, Tensor confidence, int ds_rate) -> ()");

  // argmax_c p_c / thresholds_c (IEEE division, float32 [C]), 255 where the maximum is below 1; p as above.
  m.def(
      "pseudo_label(Tensor logits, Tensor thresholds, Tensor? flipped, Tensor? prior, SymInt[2] size, "
      "bool align_corners, bool probabilities) -> Tensor label");
}
