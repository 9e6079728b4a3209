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
constexpr uint32_t kAllLanes = 0xffff;
constexpr int64_t kAhead = 256;  // pixels to prefetch: the classes of a strip lie in as many pages, one line in each

// The bilinear weights of a whole axis.
template <typename T>
struct AxisTable {
  std::vector<int32_t> i0, i1;
  std::vector<T> w0, w1;

  AxisTable(int64_t in, int64_t out, bool align_corners) : i0(out), i1(out), w0(out), w1(out) {
    const Axis<T> axis(in, out, align_corners);
    for (int64_t i = 0; i < out; ++i) axis.locate(i, i0[i], i1[i], w0[i], w1[i]);
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
      if (check) poison[j] = fused(v, T(0), poison[j]);
    }
  }
  for (int64_t j = 0; j < n; ++j) label[j] = static_cast<uint8_t>(index[j]);
  return !check || std::all_of(poison, poison + n, [](T p) { return p == T(0); });
}

inline vi load_indices(const int32_t* p) {
  vi v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// One image [C, h, w] seen at size H x W, a row at a time. Equal sizes are read in place; otherwise the two source rows
// around the current row are kept at full width, so that a row costs one vertical interpolation. S: stored type, T:
// arithmetic.
template <typename S, typename T>
class Upsampler {
 public:
  Upsampler(const S* x, int64_t classes, int64_t h, int64_t w, const AxisTable<T>& rows, const AxisTable<T>& columns,
            bool mirror)
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
  vf gather(int64_t begin, int64_t n, float* out) {
    vf top = splat(-std::numeric_limits<float>::infinity());
    const auto add = [&](int64_t c, vf v) {
      store(out + c * kLanes, v);
      top = vmax(v, top);
    };
    if (!in_place_) {
      const float *a = buffer_[0].data() + begin, *b = buffer_[1].data() + begin;
      const vf w0 = splat(rows_.w0[y_]), w1 = splat(rows_.w1[y_]);
      for (int64_t c = 0; c < classes_; ++c) add(c, fused(load(a + c * stride_), w0, load(b + c * stride_) * w1));
      return top;
    }
    vf poison{};  // 0 * v is 0 for finite v alone
    for (int64_t c = 0; c < classes_; ++c) {
      const vf v = in_place(c, begin, n);
      poison = fused(v, vf{}, poison);
      add(c, v);
    }
    if (mask_ge(poison, vf{}) != kAllLanes) poison_ = std::numeric_limits<T>::quiet_NaN();
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
        classes_, n, [=](int64_t c, int64_t j) { return fused(a[c * stride + j], w0, b[c * stride + j] * w1); }, label);
  }

  bool finite() const {
    return poison_ == T(0);
  }  // what was read so far, but for argmax in place, which says so itself

 private:
  vf in_place(int64_t c, int64_t begin, int64_t n) const {
    const S* x = x_ + (c * H_ + y_) * W_ + (mirror_ ? W_ - 1 - begin : begin);
    __builtin_prefetch(x + (mirror_ ? -kAhead : kAhead));
    if constexpr (std::is_same_v<S, float>) {
      if (n == kLanes && !mirror_) return load(x);
    }
    float lane[kLanes] = {};
    for (int64_t j = 0; j < n; ++j) lane[j] = static_cast<float>(x[mirror_ ? -j : j]);
    return load(lane);
  }

  void fill(int slot, int32_t y) {
    if (held_[slot] == y) return;
    held_[slot] = y;
    const int32_t *i0 = columns_.i0.data(), *i1 = columns_.i1.data();
    const T *w0 = columns_.w0.data(), *w1 = columns_.w1.data();
    std::vector<T> source(w_ + kLanes);
    for (int64_t c = 0; c < classes_; ++c) {
      const S* x = x_ + (c * h_ + y) * w_;
      for (int64_t j = 0; j < w_; ++j) {
        source[j] = static_cast<T>(x[j]);
        poison_ = fused(source[j], T(0), poison_);
      }
      T* out = buffer_[slot].data() + c * stride_;
      int64_t j = 0;
#if defined(__AVX512F__)
      if constexpr (std::is_same_v<T, float>) {  // sixteen neighbours need no more than sixteen source pixels
        for (; j + kLanes <= W_ && i1[j + kLanes - 1] - i0[j] < kLanes; j += kLanes) {
          const __m512 pixels = (__m512)load(source.data() + i0[j]);
          const vf a = (vf)_mm512_permutexvar_ps((__m512i)(load_indices(i0 + j) - i0[j]), pixels);
          const vf b = (vf)_mm512_permutexvar_ps((__m512i)(load_indices(i1 + j) - i0[j]), pixels);
          store(out + j, fused(a, load(w0 + j), b * load(w1 + j)));
        }
      }
#endif
      for (; j < W_; ++j) out[j] = fused(source[i0[j]], w0[j], source[i1[j]] * w1[j]);
      if (mirror_) std::reverse(out, out + W_);
    }
  }

  const S* x_;
  int64_t classes_, h_, w_, H_, W_, y_ = 0;
  int64_t stride_;  // of the classes in buffer_: an odd number of strips, as a power of two would put all classes of a
                    // pixel into the same set of the cache
  const AxisTable<T>&rows_, &columns_;
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
  const AxisTable<T> rows(h, H, align_corners), columns(w, W, align_corners);
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

// Few exponentials. What must come out, to the last bit, are the exact values: e_c = exp_negative(v_c - top), their sum
// in the classes' order, p_c = e_c * (1 / sum), the mean with the mirrored image's, the product with the prior, the
// division by t_c. What can be told from less is told from less; a strip where it cannot takes the exact path.
// u = 2^-24 is the unit of rounding; exp_negative's relative error is below 2^-22.
//
// Confidence (softmax alone, no mirrored image, no prior). The winner has v_c = top, so e_c = 1 and p_c = 1 / sum to
// the bit: no e_c need be stored, no p_c computed. Another class with v_c - top < -2^-20 has e_c < (1 - 2^-20 + 2^-41)
// (1 + 2^-22) < 1 - 2^-21, so that e_c / sum rounds to less than 1 / sum. Hence: when one class alone lies within
// 2^-20 of top, it wins. Otherwise (ties, too) the exact path.
constexpr float kClose = -0x1p-20f;

// Labels. A rough exponential is within kRough = 2^-17 of e^x (see rough_exp), for every x of weight: where it is not,
// both are below 2^-125. The rough p_c is then within 2 kRough + 2^-21 + (2 C + 12) u of the exact one: one kRough for
// e_c, one for the sum, exp_negative's error twice, C u for each of the two sums. The mean with the mirrored image's
// keeps that bound, as both terms are positive; mean, prior, the factor 1 / t_c and the exact division add 4 u.
// So |rough / exact - 1| < error for the quotients p_c / t_c that matter: where neither 1 / t_c nor a quotient leaves
// the range of normal numbers, which is why thresholds below 2^-100 and quotients above 2^100 take the exact path.
// With best and second the two largest rough quotients:
//   best >= 1 + 2 error           the exact maximum is at least 1;
//   best <= 1 - 2 error           it is below 1: the label is 255, whoever wins;
//   second <= best (1 - 4 error)  the winner is the exact winner, alone.
// (Twice the bounds, which covers the rounding of the comparisons themselves.)
constexpr float kRough = 0x1p-17f, kSmallestThreshold = 0x1p-100f, kLargestQuotient = 0x1p100f;

inline float rough_error(int64_t classes) {
  return 2 * kRough + 0x1p-21f + static_cast<float>(2 * classes + 16) * 0x1p-24f;
}

// e^x for x <= 0 through 2^z = 2^floor(z) 2^f with a polynomial of degree four for f in [0, 1], whose relative error is
// 2.7e-6 with rounding. Rounding z adds at most 2^-18 ln 2 = 2.7e-6 down to z = -128, the rounded log2(e) 1.2e-6:
// together 6.6e-6 < 2^-17. Below z = -126 the result is at most 2^-126, as e^x is.
inline vf rough_exp(vf x) {
  const vf z = x * 1.44269504088896341f;
#if defined(__AVX512DQ__)
  const vf f = (vf)_mm512_reduce_ps((__m512)z, 0x09);  // z - floor(z)
#else
  const vf bounded = vmax(z, splat(-126.f)), whole = floor_of(bounded), f = bounded - whole;
#endif
  vf p = fused(f, splat(0.013534167f), splat(0.052011460f));
  p = fused(p, f, splat(0.24144275f));
  p = fused(p, f, splat(0.69300383f));
  p = fused(p, f, splat(1.0000026f));
#if defined(__AVX512DQ__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)z);  // p 2^floor(z)
#else
  return p * from_bits((__builtin_convertvector(whole, vi) + 127) << 23);
#endif
}

// The two largest values of 16 pixels, and the class of the largest. Values are positive.
struct Best {
  vf value{}, second{};
  vi index{};

  void add(int64_t c, vf v) {
    const vi greater = v > value;
    second = vmax(second, vmin(v, value));
    value = vmax(v, value);
    index = greater ? vi{} + static_cast<int32_t>(c) : index;
  }
};

struct Strip {  // 16 pixels: the probabilities of class c are load(value + c * kLanes) * scale
  const float* value;
  vf scale;

  vf operator()(int64_t c) const { return load(value + c * kLanes) * scale; }
};

// The class probabilities of one image, a strip at a time: softmax of the upsampled logits (or the given values), its
// mean with the mirrored image's, times the prior. Every pass computes them here, so every pass sees the same bits.
// gather() reads a strip; then confidence(), if plain(), or best_quotients() may tell enough; exact() always does.
template <typename S>
class Probabilities {
 public:
  Probabilities(const Maps& maps, int64_t image, const AxisTable<float>& rows, const AxisTable<float>& columns)
      : C_(maps.logits.size(1)),
        W_(columns.i0.size()),
        area_(rows.i0.size() * W_),
        softmax_(!maps.probabilities),
        prior_(maps.prior ? maps.prior->const_data_ptr<float>() : nullptr) {
    const int64_t h = maps.logits.size(2), w = maps.logits.size(3), offset = image * C_ * h * w;
    add_source(maps.logits, offset, h, w, rows, columns, false);
    if (maps.flipped) add_source(*maps.flipped, offset, h, w, rows, columns, true);
  }

  bool softmax() const { return softmax_; }
  bool plain() const { return softmax_ && sources_.size() == 1 && !prior_; }

  void select_row(int64_t y) {
    y_ = y;
    for (auto& source : sources_) source.map.select_row(y);
  }

  void gather(int64_t begin, int64_t n) {
    begin_ = begin, n_ = n;
    for (auto& source : sources_) source.top = source.map.gather(begin, n, source.value.data());
  }

  // Of plain() strips: the confidence of each pixel and its class. Bits of the pixels for which that is not certain.
  uint32_t confidence(vf& confidence, vi& index) const {
    const Source& source = sources_[0];
    vf sum{};
    vi close{};
    for (int64_t c = 0; c < C_; ++c) {
      const vf x = load(source.value.data() + c * kLanes) - source.top;
      const vi near_top = x >= splat(kClose);
      index = near_top ? vi{} + static_cast<int32_t>(c) : index;
      close -= near_top;  // true is -1
      sum += exp_negative(x);
    }
    confidence = 1.f / sum;
    return mask_ge(__builtin_convertvector(close, vf), splat(2.f));
  }

  // The largest quotients p / t, to within rough_error; inverse: 1 / t. Of softmaxes only.
  Best best_quotients(const float* inverse) {
    Best best;
    if (plain()) {
      const Source& source = sources_[0];
      vf sum{};
      for (int64_t c = 0; c < C_; ++c) {
        const vf e = rough_exp(load(source.value.data() + c * kLanes) - source.top);
        sum += e;
        best.add(c, e * inverse[c]);
      }
      const vf scale = 1.f / sum;
      best.value *= scale, best.second *= scale;
      return best;
    }
    vf scale[2] = {};
    for (size_t k = 0; k < sources_.size(); ++k) {
      Source& source = sources_[k];
      vf sum{};
      for (int64_t c = 0; c < C_; ++c) {
        const vf e = rough_exp(load(source.value.data() + c * kLanes) - source.top);
        store(source.rough.data() + c * kLanes, e);
        sum += e;
      }
      scale[k] = 1.f / (sum * static_cast<float>(sources_.size()));
    }
    for (int64_t c = 0; c < C_; ++c) {
      vf p = load(sources_[0].rough.data() + c * kLanes) * scale[0];
      if (sources_.size() == 2) p = fused(load(sources_[1].rough.data() + c * kLanes), scale[1], p);
      best.add(c, with_prior(c, p) * inverse[c]);
    }
    return best;
  }

  // Overwrites what gather() has read.
  Strip exact() {
    const Strip p = exact_softmax(sources_[0]);
    if (sources_.size() == 1 && !prior_) return p;
    const Strip q = sources_.size() == 2 ? exact_softmax(sources_[1]) : p;
    for (int64_t c = 0; c < C_; ++c) {
      vf v = p(c);
      if (sources_.size() == 2) v = (v + q(c)) * 0.5f;
      store(sources_[0].value.data() + c * kLanes, with_prior(c, v));
    }
    return {sources_[0].value.data(), splat(1.f)};
  }

  bool finite() const {  // everything read so far
    return poison_ == 0.f &&
           std::all_of(sources_.begin(), sources_.end(), [](const Source& source) { return source.map.finite(); });
  }

 private:
  struct Source {  // the image or the mirrored one: its map, the present strip and what it takes to compute it
    Upsampler<S, float> map;
    std::vector<float> value, rough;
    vf top;
  };

  void add_source(const at::Tensor& x, int64_t offset, int64_t h, int64_t w, const AxisTable<float>& rows,
                  const AxisTable<float>& columns, bool mirror) {
    const std::vector<float> strip(C_ * kLanes);
    sources_.push_back({{x.const_data_ptr<S>() + offset, C_, h, w, rows, columns, mirror}, strip, strip, vf{}});
  }

  Strip exact_softmax(Source& source) const {
    float* value = source.value.data();
    if (!softmax_) return {value, splat(1.f)};
    vf sum{};
    for (int64_t c = 0; c < C_; ++c) {
      const vf e = exp_negative(load(value + c * kLanes) - source.top);
      store(value + c * kLanes, e);
      sum += e;
    }
    return {value, 1.f / sum};
  }

  vf with_prior(int64_t c, vf p) {
    if (!prior_) return p;
    float lane[kLanes] = {};
    std::copy_n(prior_ + c * area_ + y_ * W_ + begin_, n_, lane);
    const vf factor = load(lane);
    if (mask_ge(factor * 0.f, vf{}) != kAllLanes) poison_ = std::numeric_limits<float>::quiet_NaN();
    return p * factor;
  }

  int64_t C_, W_, area_, y_ = 0, begin_ = 0, n_ = 0;
  bool softmax_;
  float poison_ = 0.f;
  const float* prior_;
  std::vector<Source> sources_;
};

// Calls visit(probabilities with a strip gathered, offset of its first pixel in [N, H, W], number of pixels) for all
// strips of all images.
template <typename Visit>
void for_each_strip(const Maps& maps, at::IntArrayRef size, bool parallel, const Visit& visit) {
  const int64_t H = size[0], W = size[1], all = maps.logits.size(0) * H;
  const AxisTable<float> rows(maps.logits.size(2), H, maps.align_corners),
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
            source.gather(i, n);
            visit(source, begin * W + i, n);
          }
        }
        if (!source.finite()) finite = false;
      }
    });
  });
  TORCH_CHECK_VALUE(finite, "logits (or the prior) hold NaN or infinite values");
}

void store_labels(uint8_t* out, vi index, int64_t n) {
  using bytes = uint8_t __attribute__((vector_size(kLanes)));
  const bytes narrow = __builtin_convertvector(index, bytes);
  std::memcpy(out, &narrow, n);
}

// ---- thresholds -----------------------------------------------------------------------------------------------------

// Adds confidences to the coarse histogram [C, kBins + 2] or, where bins is given, those in bin bins[c] to the fine one
// [C, 2^kBinBits].
struct Counter {
  int64_t *hist, width;
  const int64_t* bins;

  void operator()(int64_t c, float confidence) const {
    const int64_t cell = cell_of(confidence, bins ? bins + c : nullptr);
    if (cell >= 0) ++hist[c * width + cell];
  }
};

Counter counter(at::Tensor& hist, const std::optional<at::Tensor>& bins) {
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

// All pixels of each class whose confidence no bin holds.
void count_invalid(const at::Tensor& label, const at::Tensor& confidence, const Counter& count) {
  const uint8_t* y = label.const_data_ptr<uint8_t>();
  const float* p = confidence.const_data_ptr<float>();
  for (int64_t i = 0; i < label.numel(); ++i) {
    if (!is_countable(p[i])) ++count.hist[y[i] * count.width + kInvalid];
  }
}

Best largest(const Strip& p, int64_t classes) {
  Best best{p(0)};
  for (int64_t c = 1; c < classes; ++c) best.add(c, p(c));
  return best;
}

std::tuple<at::Tensor, at::Tensor> confidence_histogram_(at::Tensor& hist, const std::optional<at::Tensor>& bins,
                                                         const at::Tensor& logits,
                                                         const std::optional<at::Tensor>& flipped,
                                                         const std::optional<at::Tensor>& prior, at::IntArrayRef size,
                                                         bool align_corners, bool probabilities, int64_t rate,
                                                         bool own) {
  const Maps maps = checked(logits, flipped, prior, size, align_corners, probabilities);
  const int64_t C = logits.size(1), area = size[0] * size[1];
  check_histogram(hist, bins, logits, rate);
  const Counter count = counter(hist, bins);
  at::Tensor label = at::empty({logits.size(0), size[0], size[1]}, logits.options().dtype(at::kByte));
  at::Tensor confidence = at::empty(label.sizes(), logits.options().dtype(at::kFloat));
  uint8_t* y = label.mutable_data_ptr<uint8_t>();
  float* top = confidence.mutable_data_ptr<float>();
  std::atomic<bool> countable{true};
  // Counters are shared: a class's own probabilities are counted by one thread, everything else after the parallel
  // part.
  for_each_strip(maps, size, !own, [&](auto& source, int64_t first, int64_t n) {
    vf best{};
    vi index{};
    const uint32_t lanes = kAllLanes >> (kLanes - n);
    if (own || !source.plain() || (source.confidence(best, index) & lanes)) {
      const Strip p = source.exact();
      const Best found = largest(p, C);
      best = found.value, index = found.index;
      if (mask_ge(best, splat(kCountableEnd)) & lanes) countable = false;
      for (int64_t j = own ? (rate - first % area % rate) % rate : n; j < n; j += rate) {
        for (int64_t c = 0; c < C; ++c) count(c, p(c)[j]);
      }
    }
    store_labels(y + first, index, n);
    std::memcpy(top + first, &best, n * sizeof(float));
  });
  if (!bins && !countable) count_invalid(label, confidence, count);
  count_images(label, confidence, C, rate, count, !own);
  return {label, confidence};
}

// ---- labels ---------------------------------------------------------------------------------------------------------

struct Thresholds {
  const float* t;
  std::vector<float> inverse;
  float certain, possible, alone;  // bounds of best_quotients; see rough_error
  bool rough;                      // whether it is of use for these thresholds

  Thresholds(const at::Tensor& tensor, bool probabilities)
      : t(tensor.const_data_ptr<float>()), inverse(tensor.numel()) {
    const int64_t C = tensor.numel();
    TORCH_CHECK_VALUE(std::all_of(t, t + C, [](float x) { return x > 0.f; }), "thresholds must be positive numbers");
    std::transform(t, t + C, inverse.begin(), [](float x) { return 1.f / x; });
    const float error = rough_error(C);
    certain = 1.f + 2 * error, possible = 1.f - 2 * error, alone = 1.f - 4 * error;
    rough = !probabilities && std::all_of(t, t + C, [](float x) { return x >= kSmallestThreshold; });
  }

  // Bits of the pixels that are neither certainly labelled nor certainly not.
  uint32_t unclear(const Best& best) const {
    const uint32_t maybe = mask_ge(best.value, splat(possible));
    const uint32_t yes = mask_ge(best.value, splat(certain)) & ~mask_ge(best.value, splat(kLargestQuotient)) &
                         ~mask_ge(best.second, best.value * alone);
    return maybe & ~yes;
  }
};

// The first class of the largest quotient, by IEEE divisions; 255 where that is below 1.
uint8_t exact_label(const Strip& p, const float* t, int64_t classes, int64_t j) {
  float top = p(0)[j] / t[0];
  int64_t winner = 0;
  for (int64_t c = 1; c < classes; ++c) {
    const float ratio = p(c)[j] / t[c];
    if (ratio > top) top = ratio, winner = c;
  }
  return static_cast<uint8_t>(top >= 1.f ? winner : 255);
}

// The same for a strip. p * (1 / t) is within 2^-22 of the quotient (unless 1 / t overflows), so it names the winner
// unless the runner-up is as close as 2^-20; 19 divisions a pixel would take longer than reading the logits.
void exact_labels(const Strip& p, const Thresholds& thresholds, int64_t classes, int64_t n, uint8_t* label) {
  const float near = 1.f - 0x1p-20f;
  const float* t = thresholds.t;
  Best best;
  vf value{}, threshold = splat(1.f);
  for (int64_t c = 0; c < classes; ++c) {
    const vf v = p(c), ratio = v * thresholds.inverse[c];
    const vi greater = ratio > best.value;
    value = greater ? v : value;
    threshold = greater ? splat(t[c]) : threshold;
    best.add(c, ratio);
  }
  store_labels(label, value / threshold >= splat(1.f) ? best.index : vi{} + 255, n);
  const bool overflows = std::any_of(t, t + classes, [](float x) { return x < kSmallestThreshold; });
  const uint32_t unclear = mask_ge(best.value, splat(near)) &
                           (mask_ge(best.second, best.value * near) | mask_ge(best.value, splat(kLargestQuotient)));
  for (int64_t j = 0; j < n; ++j) {
    if (overflows || (unclear >> j & 1)) label[j] = exact_label(p, t, classes, j);
  }
}

at::Tensor pseudo_label(const at::Tensor& logits, const at::Tensor& thresholds_,
                        const std::optional<at::Tensor>& flipped, const std::optional<at::Tensor>& prior,
                        at::IntArrayRef size, bool align_corners, bool probabilities) {
  const Maps maps = checked(logits, flipped, prior, size, align_corners, probabilities);
  const int64_t C = logits.size(1);
  check_thresholds(thresholds_, logits);
  const at::Tensor values = thresholds_.contiguous();
  const Thresholds thresholds(values, probabilities);
  at::Tensor label = at::empty({logits.size(0), size[0], size[1]}, logits.options().dtype(at::kByte));
  uint8_t* y = label.mutable_data_ptr<uint8_t>();
  for_each_strip(maps, size, true, [&](auto& source, int64_t first, int64_t n) {
    if (thresholds.rough) {
      const Best best = source.best_quotients(thresholds.inverse.data());
      if (!(thresholds.unclear(best) & kAllLanes >> (kLanes - n))) {
        store_labels(y + first, best.value >= splat(1.f) ? best.index : vi{} + 255, n);
        return;
      }
    }
    exact_labels(source.exact(), thresholds, C, n, y + first);
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
