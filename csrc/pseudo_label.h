// What the CPU and CUDA kernels for pseudo-labels share: arguments, their checks, the layout of the histograms.
#pragma once
#include <ATen/ATen.h>

#include <cstdint>
#include <optional>

#include "arithmetic.h"

namespace segadapt {

// A histogram row has a bin for each 2^12 neighbouring floats in [0, 2) (positive floats are ordered as their bits are;
// what is below 0 counts as 0), the number of pixels predicted as the class whose confidence is not below 2 or not a
// number, sampled or not, and the number of all pixels predicted as the class.
constexpr int32_t kBinBits = 12, kBins = 0x40000000 >> kBinBits, kInvalid = kBins, kPixels = kBins + 1;
constexpr float kCountableEnd = 2.f;

SEGADAPT_SHARED bool is_countable(float confidence) { return confidence < kCountableEnd; }  // and no NaN

// The cell of a confidence in its class's row: of the coarse histogram, or where bin is given of the fine one, which
// holds that bin alone; -1 where it has none.
SEGADAPT_SHARED int64_t cell_of(float confidence, const int64_t* bin) {
  if (!is_countable(confidence)) return -1;
  const int32_t bits = confidence > 0.f ? as_bits(confidence) : 0;
  if (!bin) return bits >> kBinBits;
  return bits >> kBinBits == *bin ? bits & ((1 << kBinBits) - 1) : -1;
}

// One axis of a bilinear interpolation, in the arithmetic of ATen's CPU kernel.
template <typename T>
struct Axis {
  int64_t in, out;
  bool align_corners;
  T scale;

  Axis(int64_t in, int64_t out, bool align_corners)
      : in(in),
        out(out),
        align_corners(align_corners),
        scale(!align_corners ? T(in) / T(out)
              : out > 1      ? T(in - 1) / T(out - 1)
                             : T(0)) {}

  // The two source pixels of pixel i, and their weights.
  template <typename Index>
  SEGADAPT_SHARED void locate(int64_t i, Index& i0, Index& i1, T& w0, T& w1) const {
    T x = in == out ? T(i) : align_corners ? product(scale, T(i)) : fused(scale, T(i) + T(0.5), T(-0.5));
    if (x < T(0)) x = T(0);
    i0 = static_cast<Index>(x);
    if (i0 > in - 1) i0 = static_cast<Index>(in - 1);
    i1 = i0 + 1 < in ? i0 + 1 : static_cast<Index>(in - 1);
    w1 = x - T(i0);
    w1 = w1 < T(0) ? T(0) : w1 > T(1) ? T(1) : w1;
    w0 = T(1) - w1;
  }
};

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
    TORCH_CHECK_VALUE(flipped->sizes() == logits.sizes() && flipped->scalar_type() == logits.scalar_type() &&
                          flipped->device() == logits.device(),
                      "flipped: expected the logits' shape, dtype and device, got ", flipped->sizes(), " ",
                      flipped->scalar_type(), " on ", flipped->device());
    maps.flipped = flipped->contiguous();
  }
  if (prior) {
    TORCH_CHECK_VALUE(prior->sizes() == at::IntArrayRef({logits.size(1), size[0], size[1]}) &&
                          prior->scalar_type() == at::kFloat && prior->device() == logits.device(),
                      "prior: expected float32 [C, H, W] on the logits' device, got ", prior->scalar_type(), " ",
                      prior->sizes(), " on ", prior->device());
    maps.prior = prior->contiguous();
  }
  return maps;
}

inline void check_histogram(const at::Tensor& hist, const std::optional<at::Tensor>& bins, int64_t classes,
                            at::Device device, int64_t rate) {
  const int64_t width = bins ? 1 << kBinBits : kBins + 2;
  TORCH_CHECK_VALUE(hist.scalar_type() == at::kLong && hist.is_contiguous() &&
                        hist.sizes() == at::IntArrayRef({classes, width}) && hist.device() == device,
                    "histogram: expected contiguous int64 ", at::IntArrayRef({classes, width}),
                    " on the images' device (new_histogram(classes, device)), got ", hist.scalar_type(), " ",
                    hist.sizes(), " on ", hist.device());
  TORCH_CHECK_VALUE(!bins || (bins->scalar_type() == at::kLong && bins->numel() == classes && bins->is_contiguous() &&
                              bins->device() == device),
                    "bins: expected contiguous int64 [", classes, "] on the images' device");
  TORCH_CHECK_VALUE(rate >= 1, "ds_rate: expected 1 or more, got ", rate);
}

struct Known {                   // what confidence_histogram_ has returned of the images
  at::Tensor label, confidence;  // uint8 and float32 [N, H, W]
};

inline Known checked(const at::Tensor& label, const at::Tensor& confidence, at::Device device) {
  TORCH_CHECK_VALUE(label.scalar_type() == at::kByte && confidence.scalar_type() == at::kFloat && label.dim() == 3 &&
                        label.sizes() == confidence.sizes() && label.device() == device &&
                        confidence.device() == device,
                    "maps: expected labels uint8 [N, H, W] and confidences float32 of that shape on ", device, ", got ",
                    label.scalar_type(), " ", label.sizes(), " on ", label.device(), " and ", confidence.scalar_type(),
                    " ", confidence.sizes(), " on ", confidence.device());
  return {label.contiguous(), confidence.contiguous()};
}

inline std::optional<Known> checked(const std::optional<at::Tensor>& label, const std::optional<at::Tensor>& confidence,
                                    const at::Tensor& logits, at::IntArrayRef size) {
  TORCH_CHECK_VALUE(label.has_value() == confidence.has_value(), "maps: expected labels and confidences, or neither");
  if (!label) return {};
  TORCH_CHECK_VALUE(label->sizes() == at::IntArrayRef({logits.size(0), size[0], size[1]}), "maps: expected the shape ",
                    at::IntArrayRef({logits.size(0), size[0], size[1]}), ", got ", label->sizes());
  return checked(*label, *confidence, logits.device());
}

inline void check_thresholds(const at::Tensor& thresholds, const at::Tensor& logits) {
  TORCH_CHECK_VALUE(thresholds.scalar_type() == at::kFloat && thresholds.numel() == logits.size(1) &&
                        thresholds.device() == logits.device(),
                    "thresholds: expected float32 [", logits.size(1), "] on the logits' device");
}

}  // namespace segadapt
