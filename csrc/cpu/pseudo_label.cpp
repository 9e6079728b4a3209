// Class-balanced pseudo-labels (Zou et al., ECCV 2018) and label maps, without ever writing H x W x C values.
// Images are walked row by row; a row is cut into blocks of pixels that stay in the L1 cache. All loops over pixels are plain
// and branch-free, so that the compiler vectorises them for whatever CPU it builds for.
#include "pseudo_label.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

namespace segadapt {
namespace {

constexpr int64_t kBlock = 256;  // pixels: 19 classes x 256 x 4 bytes = 19 KB

template <typename T>
inline T fma(T a, T b, T c) {
#if defined(__FMA__) || defined(__aarch64__)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

// The bilinear weights of one axis, in the arithmetic of ATen's CPU kernel: index and weight of the two source pixels.
template <typename T>
struct Axis {
  std::vector<int32_t> i0, i1;
  std::vector<T> w0, w1;

  Axis(int64_t in, int64_t out, bool align_corners) : i0(out), i1(out), w0(out), w1(out) {
    const T scale = !align_corners ? T(in) / T(out) : out > 1 ? T(in - 1) / T(out - 1) : T(0);
    for (int64_t i = 0; i < out; ++i) {
      T x = in == out ? T(i) : align_corners ? scale * T(i) : std::max(fma(scale, T(i) + T(0.5), T(-0.5)), T(0));
      i0[i] = static_cast<int32_t>(std::min<int64_t>(static_cast<int64_t>(x), in - 1));
      i1[i] = std::min<int32_t>(i0[i] + 1, in - 1);
      w1[i] = std::min(std::max(x - T(i0[i]), T(0)), T(1));
      w0[i] = T(1) - w1[i];
    }
  }
};

// The first class of the largest value, and that value where `top` is given; false when `check` finds one that is not finite.
template <bool check, typename T, typename Value>
bool argmax_block(int64_t classes, int64_t n, const Value& value, uint8_t* label, T* top = nullptr) {
  T best[kBlock], poison[kBlock];
  int32_t index[kBlock] = {};
  for (int64_t j = 0; j < n; ++j) best[j] = value(0, j);
  for (int64_t j = 0; j < n; ++j) poison[j] = best[j] * T(0);
  for (int64_t c = 1; c < classes; ++c) {
    for (int64_t j = 0; j < n; ++j) {
      const T v = value(c, j);
      const bool greater = v > best[j];
      best[j] = greater ? v : best[j];
      index[j] = greater ? static_cast<int32_t>(c) : index[j];
      if (check) poison[j] = fma(v, T(0), poison[j]);
    }
  }
  for (int64_t j = 0; j < n; ++j) label[j] = static_cast<uint8_t>(index[j]);
  if (top) std::copy(best, best + n, top);
  return !check || std::all_of(poison, poison + n, [](T p) { return p == T(0); });
}

// One image [C, h, w] seen at size H x W, a row at a time. Equal sizes are read in place; otherwise the two source rows around
// the current row are kept at full width, so that a row costs one vertical interpolation. S: stored type, T: arithmetic.
template <typename S, typename T>
class Upsampler {
 public:
  Upsampler(const S* x, int64_t classes, int64_t h, int64_t w, const Axis<T>& rows, const Axis<T>& columns, bool mirror)
      : x_(x), classes_(classes), h_(h), w_(w), H_(rows.i0.size()), W_(columns.i0.size()), rows_(rows), columns_(columns),
        mirror_(mirror), in_place_(h == H_ && w == W_) {
    if (!in_place_) {
      for (auto& buffer : buffer_) buffer.resize(classes * W_);
    }
  }

  void select_row(int64_t y) {
    y_ = y;
    if (in_place_) return;
    const int32_t top = rows_.i0[y], bottom = rows_.i1[y];
    if (held_[0] != top && held_[1] == top) {
      std::swap(buffer_[0], buffer_[1]);
      std::swap(held_[0], held_[1]);
    }
    load(0, top);
    load(1, bottom);
  }

  // Columns begin .. begin + n of one class in the selected row.
  void read(int64_t c, int64_t begin, int64_t n, T* out) const {
    if (in_place_) {
      const S* x = x_ + (c * H_ + y_) * W_;
      if (mirror_) {
        x += W_ - 1 - begin;
        for (int64_t j = 0; j < n; ++j) out[j] = static_cast<T>(x[-j]);
      } else {
        x += begin;
        for (int64_t j = 0; j < n; ++j) out[j] = static_cast<T>(x[j]);
      }
      return;
    }
    const T *a = buffer_[0].data() + c * W_ + begin, *b = buffer_[1].data() + c * W_ + begin;
    const T w0 = rows_.w0[y_], w1 = rows_.w1[y_];
    for (int64_t j = 0; j < n; ++j) out[j] = fma(a[j], w0, b[j] * w1);
  }

  // The first class of the largest value for columns begin .. begin + n; false when one is not finite.
  bool argmax(int64_t begin, int64_t n, uint8_t* label) const {
    if (in_place_) {
      const S* x = x_ + y_ * W_ + begin;
      const int64_t stride = H_ * W_;
      return argmax_block<true, T>(classes_, n, [=](int64_t c, int64_t j) { return static_cast<T>(x[c * stride + j]); }, label);
    }
    const T *a = buffer_[0].data() + begin, *b = buffer_[1].data() + begin;
    const T w0 = rows_.w0[y_], w1 = rows_.w1[y_];
    const int64_t stride = W_;
    return argmax_block<false, T>(
        classes_, n, [=](int64_t c, int64_t j) { return fma(a[c * stride + j], w0, b[c * stride + j] * w1); }, label);
  }

  bool finite() const { return poison_ == T(0); }  // of the source rows used so far; reading in place checks as it goes

 private:
  void load(int slot, int32_t y) {
    if (held_[slot] == y) return;
    held_[slot] = y;
    const int32_t *i0 = columns_.i0.data(), *i1 = columns_.i1.data();
    const T *w0 = columns_.w0.data(), *w1 = columns_.w1.data();
    std::vector<T> source(w_);
    for (int64_t c = 0; c < classes_; ++c) {
      const S* x = x_ + (c * h_ + y) * w_;
      for (int64_t j = 0; j < w_; ++j) {
        source[j] = static_cast<T>(x[j]);
        poison_ = fma(source[j], T(0), poison_);
      }
      T* out = buffer_[slot].data() + c * W_;
      for (int64_t j = 0; j < W_; ++j) out[j] = fma(source[i0[j]], w0[j], source[i1[j]] * w1[j]);
      if (mirror_) std::reverse(out, out + W_);
    }
  }

  const S* x_;
  int64_t classes_, h_, w_, H_, W_, y_ = 0;
  const Axis<T>&rows_, &columns_;
  bool mirror_, in_place_;
  std::vector<T> buffer_[2];
  int32_t held_[2] = {-1, -1};
  T poison_ = 0;
};

int64_t rows_per_task(int64_t rows, int64_t width) {
  return std::max<int64_t>(1, std::min<int64_t>(rows, (1 << 16) / std::max<int64_t>(1, width)));
}

// ---- label maps -------------------------------------------------------------------------------------------------------------

template <typename S, typename T>
void upsample_argmax_images(const at::Tensor& logits, bool align_corners, at::Tensor& label) {
  const int64_t C = logits.size(1), h = logits.size(2), w = logits.size(3), H = label.size(1), W = label.size(2);
  const Axis<T> rows(h, H, align_corners), columns(w, W, align_corners);
  const S* x = logits.const_data_ptr<S>();
  uint8_t* out = label.mutable_data_ptr<uint8_t>();
  std::atomic<bool> finite{true};
  at::parallel_for(0, logits.size(0) * H, rows_per_task(H, W), [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t image = begin / H, stop = std::min(end, (image + 1) * H);
      Upsampler<S, T> map(x + image * C * h * w, C, h, w, rows, columns, false);
      for (; begin < stop; ++begin) {
        map.select_row(begin - image * H);
        for (int64_t i = 0; i < W; i += kBlock) {
          const int64_t n = std::min(kBlock, W - i);
          if (!map.argmax(i, n, out + begin * W + i)) finite = false;
        }
      }
      if (!map.finite()) finite = false;
    }
  });
  TORCH_CHECK_VALUE(finite, "logits hold NaN or infinite values");
}

at::Tensor upsample_argmax(const at::Tensor& logits_, at::IntArrayRef size, bool align_corners) {
  check_logits(logits_, size);
  const at::Tensor logits = logits_.contiguous();
  at::Tensor label = at::empty({logits.size(0), size[0], size[1]}, logits.options().dtype(at::kByte));
  if (logits.scalar_type() == at::kDouble) {
    upsample_argmax_images<double, double>(logits, align_corners, label);
  } else {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits.scalar_type(), "upsample_argmax",
                                    [&] { upsample_argmax_images<scalar_t, float>(logits, align_corners, label); });
  }
  return label;
}

// ---- probabilities ----------------------------------------------------------------------------------------------------------

// e^x for x <= 0 to about one unit in the last place (the polynomial of Cephes' expf); 0 where the result would be subnormal.
inline float exp_negative(float x) {
  const float shifter = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits
  const float shifted = fma(x, 1.44269504088896341f, shifter), n = shifted - shifter;
  const float r = fma(n, 2.12194440e-4f, fma(n, -0.693359375f, x));
  float p = 1.9875691500e-4f;
  p = fma(p, r, 1.3981999507e-3f);
  p = fma(p, r, 8.3334519073e-3f);
  p = fma(p, r, 4.1665795894e-2f);
  p = fma(p, r, 1.6666665459e-1f);
  p = fma(p, r, 5.0000001201e-1f);
  p = fma(p, r * r, r) + 1.f;
  const int32_t exponent = __builtin_bit_cast(int32_t, shifted) - __builtin_bit_cast(int32_t, shifter) + 127;
  return x < -87.f ? 0.f : p * __builtin_bit_cast(float, exponent << 23);
}

void add_exponentials(float* v, const float* top, float* sum, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    v[j] = exp_negative(v[j] - top[j]);
    sum[j] += v[j];
  }
}

// n pixels: the probability of class c at pixel j is value[c * kBlock + j] * scale[j].
struct Block {
  std::vector<float> value, scale;

  explicit Block(int64_t classes) : value(classes * kBlock), scale(kBlock) {}
};

// The class probabilities of one image, a block of pixels at a time: softmax of the upsampled logits (or the given values),
// its mean with the mirrored image's, times the prior. Every pass computes them here, so every pass sees the same bits.
template <typename S>
class Probabilities {
 public:
  Probabilities(const Maps& maps, int64_t image, const Axis<float>& rows, const Axis<float>& columns)
      : C_(maps.logits.size(1)), W_(columns.i0.size()), area_(rows.i0.size() * W_), softmax_(!maps.probabilities),
        prior_(maps.prior ? maps.prior->const_data_ptr<float>() : nullptr), block_(C_), mirrored_(maps.flipped ? C_ : 0) {
    const int64_t h = maps.logits.size(2), w = maps.logits.size(3), offset = image * C_ * h * w;
    maps_.emplace_back(maps.logits.const_data_ptr<S>() + offset, C_, h, w, rows, columns, false);
    if (maps.flipped) maps_.emplace_back(maps.flipped->const_data_ptr<S>() + offset, C_, h, w, rows, columns, true);
  }

  void select_row(int64_t y) {
    y_ = y;
    for (auto& map : maps_) map.select_row(y);
  }

  const Block& read(int64_t begin, int64_t n) {
    load(maps_[0], begin, n, block_);
    if (maps_.size() == 2) load(maps_[1], begin, n, mirrored_);
    if (maps_.size() == 2 || prior_) {
      for (int64_t c = 0; c < C_; ++c) {
        float* p = block_.value.data() + c * kBlock;
        multiply(p, block_.scale.data(), n);
        if (maps_.size() == 2) average(p, mirrored_.value.data() + c * kBlock, mirrored_.scale.data(), n);
        if (prior_) multiply(p, prior_ + c * area_ + y_ * W_ + begin, n);
      }
      std::fill(block_.scale.begin(), block_.scale.end(), 1.f);
    }
    return block_;
  }

  bool finite() const { return finite_; }  // of everything read so far

 private:
  static void multiply(float* p, const float* by, int64_t n) {
    for (int64_t j = 0; j < n; ++j) p[j] *= by[j];
  }

  static void average(float* p, const float* value, const float* scale, int64_t n) {
    for (int64_t j = 0; j < n; ++j) p[j] = (p[j] + value[j] * scale[j]) * 0.5f;
  }

  void load(const Upsampler<S, float>& map, int64_t begin, int64_t n, Block& out) {
    float top[kBlock], sum[kBlock] = {};
    if (!softmax_) {
      for (int64_t c = 0; c < C_; ++c) {
        float* v = out.value.data() + c * kBlock;
        map.read(c, begin, n, v);
        for (int64_t j = 0; j < n; ++j) sum[j] = fma(v[j], 0.f, sum[j]);
      }
      finite_ &= std::all_of(sum, sum + n, [](float x) { return x == 0.f; });
      std::fill(out.scale.begin(), out.scale.end(), 1.f);
      return;
    }
    for (int64_t c = 0; c < C_; ++c) {
      float* v = out.value.data() + c * kBlock;
      map.read(c, begin, n, v);
      if (c == 0) std::copy(v, v + n, top);
      for (int64_t j = 0; j < n; ++j) top[j] = v[j] > top[j] ? v[j] : top[j];
    }
    for (int64_t c = 0; c < C_; ++c) add_exponentials(out.value.data() + c * kBlock, top, sum, n);
    finite_ &= std::all_of(sum, sum + n, [](float x) { return x >= 1.f; });
    for (int64_t j = 0; j < n; ++j) out.scale[j] = 1.f / sum[j];
  }

  int64_t C_, W_, area_, y_ = 0;
  bool softmax_, finite_ = true;
  const float* prior_;
  std::vector<Upsampler<S, float>> maps_;
  Block block_, mirrored_;
};

// Calls visit(values, scale, offset of the first pixel in [N, H, W], number of pixels) for all blocks of all images.
template <typename Visit>
void for_each_block(const Maps& maps, at::IntArrayRef size, bool parallel, const Visit& visit) {
  const int64_t H = size[0], W = size[1], all = maps.logits.size(0) * H;
  const Axis<float> rows(maps.logits.size(2), H, maps.align_corners), columns(maps.logits.size(3), W, maps.align_corners);
  std::atomic<bool> finite{true};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, maps.logits.scalar_type(), "pseudo_label", [&] {
    at::parallel_for(0, all, parallel ? rows_per_task(all, W) : all, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t image = begin / H, stop = std::min(end, (image + 1) * H);
        Probabilities<scalar_t> source(maps, image, rows, columns);
        for (; begin < stop; ++begin) {
          source.select_row(begin - image * H);
          for (int64_t i = 0; i < W; i += kBlock) {
            const int64_t n = std::min(kBlock, W - i);
            const Block& block = source.read(i, n);
            visit(block.value.data(), block.scale.data(), begin * W + i, n);
          }
        }
        if (!source.finite()) finite = false;
      }
    });
  });
  TORCH_CHECK_VALUE(finite, "logits hold NaN or infinite values");
}

// ---- thresholds -------------------------------------------------------------------------------------------------------------

inline int32_t bits_of(float confidence) {
  return confidence > 0.f ? __builtin_bit_cast(int32_t, confidence) : confidence <= 0.f ? 0 : kInvalid << kBinBits;
}

// Adds confidences to the coarse histogram [C, kBins + 2] or, where bins is given, those in bin bins[c] to the fine one
// [C, 2^kBinBits].
struct Counter {
  int64_t *hist, width;
  const int64_t* bins;

  void operator()(int64_t c, float confidence) const {
    const int32_t bits = bits_of(confidence), bin = std::min(bits >> kBinBits, kInvalid);
    if (!bins) {
      ++hist[c * width + bin];
    } else if (bin == bins[c]) {
      ++hist[c * width + (bits & ((1 << kBinBits) - 1))];
    }
  }
};

Counter counter(at::Tensor& hist, const std::optional<at::Tensor>& bins) {
  TORCH_CHECK_VALUE(!bins || bins->is_contiguous(), "bins: expected a contiguous tensor");
  return {hist.mutable_data_ptr<int64_t>(), hist.size(1), bins ? bins->const_data_ptr<int64_t>() : nullptr};
}

// Every rate-th pixel of each class in raster order. Neighbours mostly have one class, so work goes by runs of equal labels.
void count_image(const uint8_t* label, const float* confidence, int64_t pixels, int64_t classes, int64_t rate,
                 const Counter& count, bool sample) {
  std::vector<int64_t> skip(classes, 0);  // pixels of the class to pass over before the next sample
  for (int64_t i = 0, stop; i < pixels; i = stop) {
    const uint8_t c = label[i];
    TORCH_CHECK_VALUE(c < classes, "label ", static_cast<int>(c), " among ", classes, " classes");
    const uint64_t eight = c * 0x0101010101010101u;
    uint64_t next_eight;
    for (stop = i + 1; stop + 8 <= pixels; stop += 8) {
      std::memcpy(&next_eight, label + stop, 8);
      if (next_eight != eight) break;
    }
    while (stop < pixels && label[stop] == c) ++stop;
    if (!count.bins) count.hist[c * count.width + kPixels] += stop - i;
    if (!sample) continue;
    int64_t next = i + skip[c];
    for (; next < stop; next += rate) count(c, confidence[next]);
    skip[c] = next - stop;
  }
}

void count_images(const at::Tensor& label, const at::Tensor& confidence, int64_t classes, int64_t rate, const Counter& count,
                  bool sample) {
  const int64_t area = label.size(1) * label.size(2);
  for (int64_t i = 0; i < label.size(0); ++i) {
    count_image(label.const_data_ptr<uint8_t>() + i * area, confidence.const_data_ptr<float>() + i * area, area, classes, rate,
                count, sample);
  }
}

std::tuple<at::Tensor, at::Tensor> confidence_histogram_(at::Tensor& hist, const std::optional<at::Tensor>& bins,
                                                         const at::Tensor& logits, const std::optional<at::Tensor>& flipped,
                                                         const std::optional<at::Tensor>& prior, at::IntArrayRef size,
                                                         bool align_corners, bool probabilities, int64_t rate, bool own) {
  const Maps maps = checked(logits, flipped, prior, size, align_corners, probabilities);
  const int64_t C = logits.size(1), area = size[0] * size[1];
  check_histogram(hist, bins, C, rate);
  const Counter count = counter(hist, bins);
  at::Tensor label = at::empty({logits.size(0), size[0], size[1]}, logits.options().dtype(at::kByte));
  at::Tensor confidence = at::empty(label.sizes(), logits.options().dtype(at::kFloat));
  uint8_t* y = label.mutable_data_ptr<uint8_t>();
  float* top = confidence.mutable_data_ptr<float>();
  // Counters are shared: a class's own probabilities are counted by one thread, everything else after the parallel part.
  for_each_block(maps, size, !own, [&](const float* v, const float* scale, int64_t first, int64_t n) {
    const auto p = [=](int64_t c, int64_t j) { return v[c * kBlock + j] * scale[j]; };
    argmax_block<false, float>(C, n, p, y + first, top + first);
    if (!own) return;
    for (int64_t j = (rate - first % area % rate) % rate; j < n; j += rate) {
      for (int64_t c = 0; c < C; ++c) count(c, p(c, j));
    }
  });
  count_images(label, confidence, C, rate, count, !own);
  return {label, confidence};
}

void count_confidences_(at::Tensor& hist, const std::optional<at::Tensor>& bins, const at::Tensor& label,
                        const at::Tensor& confidence, int64_t rate) {
  check_histogram(hist, bins, hist.size(0), rate);
  check_kept(label, confidence);
  count_images(label.contiguous(), confidence.contiguous(), hist.size(0), rate, counter(hist, bins), true);
}

// ---- labels -----------------------------------------------------------------------------------------------------------------

at::Tensor pseudo_label(const at::Tensor& logits, const at::Tensor& thresholds_, const std::optional<at::Tensor>& flipped,
                        const std::optional<at::Tensor>& prior, at::IntArrayRef size, bool align_corners, bool probabilities) {
  const Maps maps = checked(logits, flipped, prior, size, align_corners, probabilities);
  const int64_t C = logits.size(1);
  TORCH_CHECK_VALUE(thresholds_.scalar_type() == at::kFloat && thresholds_.numel() == C, "thresholds: expected float32 [", C, "]");
  const at::Tensor thresholds = thresholds_.contiguous();
  const float* t = thresholds.const_data_ptr<float>();
  TORCH_CHECK_VALUE(std::all_of(t, t + C, [](float x) { return x > 0.f; }), "thresholds must be positive numbers");
  // The exact quotients p / t decide, but 19 divisions a pixel would take longer than reading the logits. p * (1 / t) is within
  // 2^-22 of the quotient (unless 1 / t overflows), so it names the winner unless the runner-up is as close as 2^-20.
  const float near = 1.f - 0x1p-20f;
  const bool exact_only = std::any_of(t, t + C, [](float x) { return x < 0x1p-100f; });
  std::vector<float> inverse(C);
  std::transform(t, t + C, inverse.begin(), [](float x) { return 1.f / x; });

  at::Tensor label = at::empty({logits.size(0), size[0], size[1]}, logits.options().dtype(at::kByte));
  uint8_t* y = label.mutable_data_ptr<uint8_t>();
  for_each_block(maps, size, true, [&](const float* v, const float* scale, int64_t first, int64_t n) {
    const auto p = [=](int64_t c, int64_t j) { return v[c * kBlock + j] * scale[j]; };
    float best[kBlock] = {}, second[kBlock] = {}, value[kBlock];
    int32_t index[kBlock] = {};
    for (int64_t j = 0; j < n; ++j) value[j] = p(0, j);
    for (int64_t c = 0; c < C; ++c) {
      const float factor = inverse[c];
      for (int64_t j = 0; j < n; ++j) {
        const float probability = p(c, j), ratio = probability * factor;
        const bool greater = ratio > best[j];
        const float lower = greater ? best[j] : ratio;
        second[j] = lower > second[j] ? lower : second[j];
        best[j] = greater ? ratio : best[j];
        value[j] = greater ? probability : value[j];
        index[j] = greater ? static_cast<int32_t>(c) : index[j];
      }
    }
    const auto unclear = [&](int64_t j) { return best[j] >= near && second[j] >= best[j] * near; };
    int32_t any = exact_only;
    for (int64_t j = 0; j < n; ++j) {
      any |= unclear(j);
      index[j] = value[j] / t[index[j]] >= 1.f ? index[j] : 255;
    }
    for (int64_t j = 0; j < n; ++j) y[first + j] = static_cast<uint8_t>(index[j]);
    for (int64_t j = 0; any && j < n; ++j) {
      if (!exact_only && !unclear(j)) continue;
      float top = p(0, j) / t[0];
      int64_t winner = 0;
      for (int64_t c = 1; c < C; ++c) {
        const float ratio = p(c, j) / t[c];
        if (ratio > top) top = ratio, winner = c;
      }
      y[first + j] = static_cast<uint8_t>(top >= 1.f ? winner : 255);
    }
  });
  return label;
}

}  // namespace
}  // namespace segadapt

TORCH_LIBRARY_IMPL(segadapt, CPU, m) {
  m.impl("upsample_argmax", segadapt::upsample_argmax);
  m.impl("confidence_histogram_", segadapt::confidence_histogram_);
  m.impl("count_confidences_", segadapt::count_confidences_);
  m.impl("pseudo_label", segadapt::pseudo_label);
}
