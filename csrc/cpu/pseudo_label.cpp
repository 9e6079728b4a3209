// Class-balanced pseudo-labels (Zou et al., ECCV 2018) and label maps, without ever writing H x W x C values.
// Images are walked row by row. Label maps take blocks of pixels that stay in the L1 cache, in plain loops that the
// compiler vectorises; probabilities take strips of 16 pixels, whose maximum, sum and winner stay in registers.
#include "pseudo_label.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "vec.h"

namespace segadapt {
namespace {

constexpr int64_t kBlock = 256, kLanes = Vec<float>::lanes;  // pixels

template <typename T>
inline T fma(T a, T b, T c) {
#if defined(__FMA__) || defined(__aarch64__)
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

inline vf vfma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  __m256 x[2], y[2], z[2];
  std::memcpy(x, &a, sizeof a);
  std::memcpy(y, &b, sizeof b);
  std::memcpy(z, &c, sizeof c);
  for (int half = 0; half < 2; ++half) x[half] = _mm256_fmadd_ps(x[half], y[half], z[half]);
  std::memcpy(&a, x, sizeof a);
  return a;
#else
  for (int64_t l = 0; l < kLanes; ++l) a[l] = fma(a[l], b[l], c[l]);
  return a;
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

// The first class of the largest value; false when `check` is set and one is not finite.
template <bool check, typename T, typename Value>
bool argmax_block(int64_t classes, int64_t n, const Value& value, uint8_t* label) {
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
  return !check || std::all_of(poison, poison + n, [](T p) { return p == T(0); });
}

// One image [C, h, w] seen at size H x W, a row at a time. Equal sizes are read in place; otherwise the two source rows
// around the current row are kept at full width, so that a row costs one vertical interpolation. S: stored type, T:
// arithmetic.
template <typename S, typename T>
class Upsampler {
 public:
  Upsampler(const S* x, int64_t classes, int64_t h, int64_t w, const Axis<T>& rows, const Axis<T>& columns, bool mirror)
      : x_(x),
        classes_(classes),
        h_(h),
        w_(w),
        H_(rows.i0.size()),
        W_(columns.i0.size()),
        stride_(((W_ + kLanes - 1) / kLanes | 1) * kLanes),
        rows_(rows),
        columns_(columns),
        mirror_(mirror),
        in_place_(h == H_ && w == W_) {
    if (!in_place_) {
      for (auto& buffer : buffer_) buffer.resize(classes * stride_ + kLanes);  // a strip may read past its row
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
    fill(0, top);
    fill(1, bottom);
  }

  // Stores columns begin .. begin + n (at most kLanes) of all classes to out [C][kLanes]; the rest of the lanes hold
  // finite numbers where the map does. Returns the maxima over the classes.
  vf gather(int64_t begin, int64_t n, float* out) const {
    vf top = splat(-std::numeric_limits<float>::infinity());
    const auto add = [&](int64_t c, vf v) {
      store(out + c * kLanes, v);
      top = vmax(v, top);
    };
    if (!in_place_) {
      const float *a = buffer_[0].data() + begin, *b = buffer_[1].data() + begin;
      const vf w0 = splat(rows_.w0[y_]), w1 = splat(rows_.w1[y_]);
      for (int64_t c = 0; c < classes_; ++c) add(c, vfma(load(a + c * stride_), w0, load(b + c * stride_) * w1));
      return top;
    }
    const S* x = x_ + y_ * W_ + (mirror_ ? W_ - 1 - begin : begin);
    const int64_t stride = H_ * W_;
    if constexpr (std::is_same_v<S, float>) {
      if (n == kLanes && !mirror_) {
        for (int64_t c = 0; c < classes_; ++c) add(c, load(x + c * stride));
        return top;
      }
    }
    float lane[kLanes] = {};
    for (int64_t c = 0; c < classes_; ++c) {
      for (int64_t j = 0; j < n; ++j) lane[j] = static_cast<float>(x[c * stride + (mirror_ ? -j : j)]);
      add(c, load(lane));
    }
    return top;
  }

  // The first class of the largest value for columns begin .. begin + n; false when one is not finite.
  bool argmax(int64_t begin, int64_t n, uint8_t* label) const {
    if (in_place_) {
      const S* x = x_ + y_ * W_ + begin;
      const int64_t stride = H_ * W_;
      return argmax_block<true, T>(
          classes_, n, [=](int64_t c, int64_t j) { return static_cast<T>(x[c * stride + j]); }, label);
    }
    const T *a = buffer_[0].data() + begin, *b = buffer_[1].data() + begin;
    const T w0 = rows_.w0[y_], w1 = rows_.w1[y_];
    const int64_t stride = stride_;
    return argmax_block<false, T>(
        classes_, n, [=](int64_t c, int64_t j) { return fma(a[c * stride + j], w0, b[c * stride + j] * w1); }, label);
  }

  bool finite() const { return poison_ == T(0); }  // of the source rows used so far; reading in place checks as it goes

 private:
  void fill(int slot, int32_t y) {
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
      T* out = buffer_[slot].data() + c * stride_;
      for (int64_t j = 0; j < W_; ++j) out[j] = fma(source[i0[j]], w0[j], source[i1[j]] * w1[j]);
      if (mirror_) std::reverse(out, out + W_);
    }
  }

  const S* x_;
  int64_t classes_, h_, w_, H_, W_, y_ = 0;
  int64_t stride_;  // of the classes in buffer_: an odd number of strips, as a power of two would put all classes of a
                    // pixel into the same set of the cache
  const Axis<T>&rows_, &columns_;
  bool mirror_, in_place_;
  std::vector<T> buffer_[2];
  int32_t held_[2] = {-1, -1};
  T poison_ = 0;
};

int64_t rows_per_task(int64_t rows, int64_t width) {
  return std::max<int64_t>(1, std::min<int64_t>(rows, (1 << 16) / std::max<int64_t>(1, width)));
}

// ---- label maps -----------------------------------------------------------------------------------------------------

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

// ---- probabilities --------------------------------------------------------------------------------------------------

// e^x for x <= 0 to about one unit in the last place (the polynomial of Cephes' expf); 0 where the result would be
// subnormal.
inline vf exp_negative(vf x) {
  const vf shifter =
      splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits
  const vf shifted = vfma(x, splat(1.44269504088896341f), shifter), n = shifted - shifter;
  const vf r = vfma(n, splat(2.12194440e-4f), vfma(n, splat(-0.693359375f), x));
  vf p = splat(1.9875691500e-4f);
  for (const float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = vfma(p, r, splat(next));
  }
  p = vfma(p, r * r, r) + 1.f;
  const vi exponent = reinterpret_cast<vi>(shifted) - reinterpret_cast<vi>(shifter) + 127;
  return x < splat(-87.f) ? vf{} : p * reinterpret_cast<vf>(exponent << 23);
}

struct Strip {  // 16 pixels: the probabilities of class c are load(value + c * kLanes) * scale
  const float* value;
  vf scale;

  vf operator()(int64_t c) const { return load(value + c * kLanes) * scale; }
};

// The class probabilities of one image, a strip at a time: softmax of the upsampled logits (or the given values), its
// mean with the mirrored image's, times the prior. Every pass computes them here, so every pass sees the same bits.
template <typename S>
class Probabilities {
 public:
  Probabilities(const Maps& maps, int64_t image, const Axis<float>& rows, const Axis<float>& columns)
      : C_(maps.logits.size(1)),
        W_(columns.i0.size()),
        area_(rows.i0.size() * W_),
        softmax_(!maps.probabilities),
        prior_(maps.prior ? maps.prior->const_data_ptr<float>() : nullptr),
        value_(C_ * kLanes),
        mirrored_(C_ * kLanes) {
    const int64_t h = maps.logits.size(2), w = maps.logits.size(3), offset = image * C_ * h * w;
    maps_.emplace_back(maps.logits.const_data_ptr<S>() + offset, C_, h, w, rows, columns, false);
    if (maps.flipped) maps_.emplace_back(maps.flipped->const_data_ptr<S>() + offset, C_, h, w, rows, columns, true);
  }

  void select_row(int64_t y) {
    y_ = y;
    for (auto& map : maps_) map.select_row(y);
  }

  Strip read(int64_t begin, int64_t n) {
    const Strip p = softmax(maps_[0], begin, n, value_.data());
    if (maps_.size() == 1 && !prior_) return p;
    const Strip q = maps_.size() == 2 ? softmax(maps_[1], begin, n, mirrored_.data()) : p;
    float lane[kLanes] = {};
    for (int64_t c = 0; c < C_; ++c) {
      vf v = p(c);
      if (maps_.size() == 2) v = (v + q(c)) * 0.5f;
      if (prior_) {
        std::copy_n(prior_ + c * area_ + y_ * W_ + begin, n, lane);
        v *= load(lane);
      }
      store(value_.data() + c * kLanes, v);
    }
    return {value_.data(), splat(1.f)};
  }

  bool finite() const { return finite_; }  // of everything read so far

 private:
  Strip softmax(const Upsampler<S, float>& map, int64_t begin, int64_t n, float* value) {
    const vf top = map.gather(begin, n, value);
    vf sum{};
    if (!softmax_) {
      for (int64_t c = 0; c < C_; ++c) sum += load(value + c * kLanes) * 0.f;
      finite_ &= mask_ge(sum, vf{}) == 0xffff;
      return {value, splat(1.f)};
    }
    for (int64_t c = 0; c < C_; ++c) {
      const vf e = exp_negative(load(value + c * kLanes) - top);
      store(value + c * kLanes, e);
      sum += e;
    }
    finite_ &= mask_ge(sum, splat(1.f)) == 0xffff;
    return {value, 1.f / sum};
  }

  int64_t C_, W_, area_, y_ = 0;
  bool softmax_, finite_ = true;
  const float* prior_;
  std::vector<Upsampler<S, float>> maps_;
  std::vector<float> value_, mirrored_;
};

// Calls visit(strip, offset of its first pixel in [N, H, W], number of pixels) for all strips of all images.
template <typename Visit>
void for_each_strip(const Maps& maps, at::IntArrayRef size, bool parallel, const Visit& visit) {
  const int64_t H = size[0], W = size[1], all = maps.logits.size(0) * H;
  const Axis<float> rows(maps.logits.size(2), H, maps.align_corners),
      columns(maps.logits.size(3), W, maps.align_corners);
  std::atomic<bool> finite{true};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, maps.logits.scalar_type(), "pseudo_label", [&] {
    at::parallel_for(0, all, parallel ? rows_per_task(all, W) : all, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t image = begin / H, stop = std::min(end, (image + 1) * H);
        Probabilities<scalar_t> source(maps, image, rows, columns);
        for (; begin < stop; ++begin) {
          source.select_row(begin - image * H);
          for (int64_t i = 0; i < W; i += kLanes) {
            const int64_t n = std::min(kLanes, W - i);
            visit(source.read(i, n), begin * W + i, n);
          }
        }
        if (!source.finite()) finite = false;
      }
    });
  });
  TORCH_CHECK_VALUE(finite, "logits hold NaN or infinite values");
}

void store_labels(uint8_t* out, vi index, int64_t n) {
  using bytes = uint8_t __attribute__((vector_size(kLanes)));
  const bytes narrow = __builtin_convertvector(index, bytes);
  std::memcpy(out, &narrow, n);
}

// ---- thresholds -----------------------------------------------------------------------------------------------------

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

// Every rate-th pixel of each class in raster order. Neighbours mostly have one class, so work goes by runs of equal
// labels.
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

void count_images(const at::Tensor& label, const at::Tensor& confidence, int64_t classes, int64_t rate,
                  const Counter& count, bool sample) {
  const int64_t area = label.size(1) * label.size(2);
  for (int64_t i = 0; i < label.size(0); ++i) {
    count_image(label.const_data_ptr<uint8_t>() + i * area, confidence.const_data_ptr<float>() + i * area, area,
                classes, rate, count, sample);
  }
}

std::tuple<at::Tensor, at::Tensor> confidence_histogram_(at::Tensor& hist, const std::optional<at::Tensor>& bins,
                                                         const at::Tensor& logits,
                                                         const std::optional<at::Tensor>& flipped,
                                                         const std::optional<at::Tensor>& prior, at::IntArrayRef size,
                                                         bool align_corners, bool probabilities, int64_t rate,
                                                         bool own) {
  const Maps maps = checked(logits, flipped, prior, size, align_corners, probabilities);
  const int64_t C = logits.size(1), area = size[0] * size[1];
  check_histogram(hist, bins, C, rate);
  const Counter count = counter(hist, bins);
  at::Tensor label = at::empty({logits.size(0), size[0], size[1]}, logits.options().dtype(at::kByte));
  at::Tensor confidence = at::empty(label.sizes(), logits.options().dtype(at::kFloat));
  uint8_t* y = label.mutable_data_ptr<uint8_t>();
  float* top = confidence.mutable_data_ptr<float>();
  // Counters are shared: a class's own probabilities are counted by one thread, everything else after the parallel
  // part.
  for_each_strip(maps, size, !own, [&](const Strip& p, int64_t first, int64_t n) {
    vf best = p(0);
    vi index{};
    for (int64_t c = 1; c < C; ++c) {
      const vf v = p(c);
      const vi greater = v > best;
      best = greater ? v : best;
      index = greater ? vi{} + static_cast<int32_t>(c) : index;
    }
    store_labels(y + first, index, n);
    std::memcpy(top + first, &best, n * sizeof(float));
    if (!own) return;
    for (int64_t j = (rate - first % area % rate) % rate; j < n; j += rate) {
      for (int64_t c = 0; c < C; ++c) count(c, p(c)[j]);
    }
  });
  count_images(label, confidence, C, rate, count, !own);
  return {label, confidence};
}

// ---- labels ---------------------------------------------------------------------------------------------------------

at::Tensor pseudo_label(const at::Tensor& logits, const at::Tensor& thresholds_,
                        const std::optional<at::Tensor>& flipped, const std::optional<at::Tensor>& prior,
                        at::IntArrayRef size, bool align_corners, bool probabilities) {
  const Maps maps = checked(logits, flipped, prior, size, align_corners, probabilities);
  const int64_t C = logits.size(1);
  TORCH_CHECK_VALUE(thresholds_.scalar_type() == at::kFloat && thresholds_.numel() == C,
                    "thresholds: expected float32 [", C, "]");
  const at::Tensor thresholds = thresholds_.contiguous();
  const float* t = thresholds.const_data_ptr<float>();
  TORCH_CHECK_VALUE(std::all_of(t, t + C, [](float x) { return x > 0.f; }), "thresholds must be positive numbers");
  // The exact quotients p / t decide, but 19 divisions a pixel would take longer than reading the logits. p * (1 / t)
  // is within 2^-22 of the quotient (unless 1 / t overflows), so it names the winner unless the runner-up is as close
  // as 2^-20.
  const float near = 1.f - 0x1p-20f;
  const bool exact_only = std::any_of(t, t + C, [](float x) { return x < 0x1p-100f; });
  std::vector<float> inverse(C);
  std::transform(t, t + C, inverse.begin(), [](float x) { return 1.f / x; });

  at::Tensor label = at::empty({logits.size(0), size[0], size[1]}, logits.options().dtype(at::kByte));
  uint8_t* y = label.mutable_data_ptr<uint8_t>();
  for_each_strip(maps, size, true, [&](const Strip& p, int64_t first, int64_t n) {
    vf best{}, second{}, value{}, threshold = splat(1.f);
    vi index{};
    for (int64_t c = 0; c < C; ++c) {
      const vf v = p(c), ratio = v * inverse[c];
      const vi greater = ratio > best;
      second = vmax(second, greater ? best : ratio);
      best = greater ? ratio : best;
      value = greater ? v : value;
      threshold = greater ? splat(t[c]) : threshold;
      index = greater ? vi{} + static_cast<int32_t>(c) : index;
    }
    store_labels(y + first, value / threshold >= splat(1.f) ? index : vi{} + 255, n);
    uint32_t unclear = exact_only ? 0xffff : mask_ge(best, splat(near)) & mask_ge(second, best * near);
    for (int64_t j = 0; unclear && j < n; ++j, unclear >>= 1) {
      if (!(unclear & 1)) continue;
      float top = p(0)[j] / t[0];
      int64_t winner = 0;
      for (int64_t c = 1; c < C; ++c) {
        const float ratio = p(c)[j] / t[c];
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
  m.impl("pseudo_label", segadapt::pseudo_label);
}
