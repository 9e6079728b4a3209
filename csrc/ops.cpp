// Schemas of all operators. Kernels register themselves in cpu/*.cpp and cuda/*.cu; fake kernels, autograd formulas and the
// PyTorch references stand in lib/ops.py.
#include <torch/library.h>

TORCH_LIBRARY(segadapt, m) {
  // ---- Cycle association (Kang et al., NeurIPS 2020) -----------------------------------------------------------------------

  // For each row of a [N1, C] the row of b [N2, C] with the largest dot product of the normalised vectors, and the reverse.
  // -> row_index [N1] int64, row_value [N1], col_index [N2] int64, col_value [N2]; values in the inputs' dtype.
  // float32 or float64. Exact and deterministic: ties of the float64 dot products go to the lowest index.
  m.def("mutual_argmax(Tensor a, Tensor b) -> (Tensor row_index, Tensor row_value, Tensor col_index, Tensor col_value)");

  // ---- Class-balanced pseudo-labels (Zou et al., ECCV 2018, ICCV 2019) -----------------------------------------------------

  // argmax_c of the bilinearly upsampled logits [N, C, h, w], C <= 255 -> label [N, H, W] uint8, size = (H, W). Any floating
  // dtype (half and bfloat16 are interpolated in float32). Deterministic; ties go to the lowest class.
  m.def("upsample_argmax(Tensor logits, SymInt[2] size, bool align_corners) -> Tensor label");
}
