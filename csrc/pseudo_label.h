// What the CPU and CUDA kernels for pseudo-labels share: arguments, their checks, the layout of the histograms.
#pragma once
#include <ATen/ATen.h>

#include <cstdint>
#include <optional>

namespace segadapt {

// A histogram row has a bin for each 2^12 neighbouring floats in [0, 2) (positive floats are ordered as their bits are;
// what is below 0 counts as 0), one for what is not below 2 or not a number, and the number of all pixels predicted as
// the class.
constexpr int32_t kBinBits = 12, kBins = 0x40000000 >> kBinBits, kInvalid = kBins, kPixels = kBins + 1;

struct Maps {                         // what every pass over probabilities takes
  at::Tensor logits;                  // [N, C, h, w], any floating dtype
  std::optional<at::Tensor> flipped;  // the same of the mirrored images
  std::optional<at::Tensor> prior;    // float32 [C, H, W]
  bool align_corners, probabilities;
};

inline void check_logits(const at::Tensor& logits, at::IntArrayRef size) {
  TORCH_CHECK_VALUE(logits.dim() == 4, "logits: expected [N, C, h, w], got ", logits.sizes());
  TORCH_CHECK_VALUE(logits.size(1) >= 1 && logits.size(1) <= 255, "logits: 1 to 255 classes, got ", logits.size(1));
  TORCH_CHECK_VALUE(size.size() == 2 && size[0] > 0 && size[1] > 0, "size: expected (height, width), got ", size);
  TORCH_CHECK_VALUE(logits.size(2) > 0 && logits.size(3) > 0, "logits: empty map ", logits.sizes());
}

inline Maps checked(const at::Tensor& logits, const std::optional<at::Tensor>& flipped,
                    const std::optional<at::Tensor>& prior, at::IntArrayRef size, bool align_corners,
                    bool probabilities) {
  check_logits(logits, size);
  Maps maps{logits.contiguous(), {}, {}, align_corners, probabilities};
  if (flipped) {
    TORCH_CHECK_VALUE(flipped->sizes() == logits.sizes() && flipped->scalar_type() == logits.scalar_type(),
                      "flipped: expected the logits' shape and dtype, got ", flipped->sizes(), " ",
                      flipped->scalar_type());
    maps.flipped = flipped->contiguous();
  }
  if (prior) {
    TORCH_CHECK_VALUE(
        prior->sizes() == at::IntArrayRef({logits.size(1), size[0], size[1]}) && prior->scalar_type() == at::kFloat,
        "prior: expected float32 [C, H, W], got ", prior->scalar_type(), " ", prior->sizes());
    maps.prior = prior->contiguous();
  }
  return maps;
}

inline void check_histogram(const at::Tensor& hist, const std::optional<at::Tensor>& bins, int64_t classes,
                            int64_t rate) {
  const int64_t width = bins ? 1 << kBinBits : kBins + 2;
  TORCH_CHECK_VALUE(
      hist.scalar_type() == at::kLong && hist.is_contiguous() && hist.sizes() == at::IntArrayRef({classes, width}),
      "histogram: expected contiguous int64 ", at::IntArrayRef({classes, width}), ", got ", hist.scalar_type(), " ",
      hist.sizes());
  TORCH_CHECK_VALUE(!bins || (bins->scalar_type() == at::kLong && bins->numel() == classes), "bins: expected int64 [",
                    classes, "]");
  TORCH_CHECK_VALUE(rate >= 1, "ds_rate: expected 1 or more, got ", rate);
}

}  // namespace segadapt
