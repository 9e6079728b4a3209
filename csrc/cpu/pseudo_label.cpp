// Class-balanced pseudo-labels (Zou et al., ECCV 2018) and label maps, without ever writing H x W x C values.
// Images are walked row by row. Label maps take blocks of pixels that stay in the L1 cache, in plain loops that the
// compiler vectorises; probabilities read groups of 64 pixels, four lines of the cache from each class, and then work
// on strips of a vector's pixels, whose sum and winner stay in registers.
#include "pseudo_label.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "vec.h"

namespace segadapt {
namespace {

#define SEGADAPT_INLINE __attribute__((always_inline))  // a call for each strip, its registers saved, costs a tenth

constexpr int64_t kBlock = 256, kLanes = Vec<float>::lanes;  // pixels
constexpr int64_t kGroup = 64, kStrips = kGroup / kLanes;    // a class lies in pages of its own: one line from
constexpr int64_t kAhead = 128;                              // each at a time reads at two thirds of the speed
constexpr uint32_t kAllLanes = (1u << kLanes) - 1;

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

// Zeros that begin with a line of the cache: a vector that straddles two costs twice.
template <typename T>
class Lines {
 public:
  explicit Lines(int64_t size = 0) : lines_((size + kLine - 1) / kLine) {}
  T* data() { return lines_.data()->value; }
  const T* data() const { return lines_.data()->value; }

 private:
  static constexpr int64_t kLine = 64 / sizeof(T);
  struct alignas(64) Line {
    T value[kLine];
  };
  std::vector<Line> lines_;
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
      for (auto& buffer : buffer_) buffer = Lines<T>(classes * stride_ + kGroup);  // a group may read past its row
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

  // Stores columns begin .. begin + n (at most kGroup) of all classes to out [C][kGroup]; the rest of the lanes hold
  // finite numbers where the map does. top [kStrips]: the maxima over the classes of value - offset[c].
  void gather(int64_t begin, int64_t n, const float* offset, float* out, vf* top) {
    if (!in_place_) {
      const float *a = buffer_[0].data() + begin, *b = buffer_[1].data() + begin;
      const vf w0 = splat(rows_.w0[y_]), w1 = splat(rows_.w1[y_]);
      collect([=, stride = stride_](int64_t c, int64_t j)
                  SEGADAPT_INLINE { return fused(load(a + c * stride + j), w0, load(b + c * stride + j) * w1); },
              offset, out, top);
      return;
    }
    vf poison[4] = {};  // 0 * v is 0 for finite v alone
    const int64_t area = H_ * W_;
    const S* x = x_ + y_ * W_ + (mirror_ ? W_ - 1 - begin : begin);
    const auto checked = [&](int64_t j, vf v) SEGADAPT_INLINE {
      poison[j / kLanes % 4] = fused(v, vf{}, poison[j / kLanes % 4]);
      return v;
    };
    if (std::is_same_v<S, float> && n == kGroup && !mirror_) {
      collect([&, x, area](int64_t c, int64_t j)
                  SEGADAPT_INLINE { return checked(j, load(reinterpret_cast<const float*>(x) + c * area + j)); },
              offset, out, top);
    } else {
      collect(
          [&](int64_t c, int64_t j) {
            float lane[kLanes] = {};
            for (int64_t l = 0; l < std::min(kLanes, n - j); ++l) {
              lane[l] = static_cast<float>(x[c * area + (mirror_ ? -j - l : j + l)]);
            }
            return checked(j, load(lane));
          },
          offset, out, top);
    }
    for (const vf& p : poison) {
      if (mask_ge(p, vf{}) != kAllLanes) poison_ = std::numeric_limits<T>::quiet_NaN();
    }
  }

  // The same for any n pixels (at most kGroup) of the row, which begins with pixel begin, and without an offset. The
  // last strip is filled up with the last pixel.
  void gather(const int32_t* pixels, int64_t n, int64_t begin, float* out, vf* top) const {
    int32_t column[kGroup];
    const int64_t end = (n + kLanes - 1) / kLanes * kLanes;
    for (int64_t j = 0; j < end; ++j) column[j] = pixels[std::min(j, n - 1)] - static_cast<int32_t>(begin);
    const auto collect = [&](const auto& value) SEGADAPT_INLINE {
      for (int64_t j = 0; j < end; j += kLanes) {
        vf best = splat(-std::numeric_limits<float>::infinity());
        for (int64_t c = 0; c < classes_; ++c) {
          vf v;
          for (int64_t l = 0; l < kLanes; ++l) v[l] = value(c, column[j + l]);
          store(out + c * kGroup + j, v);
          best = vmax(v, best);
        }
        top[j / kLanes] = best;
      }
    };
    if (in_place_) {
      collect([x = x_ + y_ * W_, area = H_ * W_](int64_t c, int32_t i) { return static_cast<float>(x[c * area + i]); });
    } else {
      collect([a = buffer_[0].data(), b = buffer_[1].data(), w0 = rows_.w0[y_], w1 = rows_.w1[y_], stride = stride_](
                  int64_t c, int32_t i) { return fused(a[c * stride + i], w0, b[c * stride + i] * w1); });
    }
  }

  // What to prefetch while the group at begin is worked on: where class 0 lies kAhead columns later, and how many bytes
  // the classes are apart. Reading alone would not keep the memory busy. (0 apart where the map is not read in place.)
  std::pair<const char*, int64_t> ahead(int64_t begin) const {
    if (!in_place_ || mirror_) return {reinterpret_cast<const char*>(x_), 0};
    return {reinterpret_cast<const char*>(x_ + y_ * W_ + begin + kAhead), H_ * W_ * int64_t(sizeof(S))};
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
  template <typename Value>
  SEGADAPT_INLINE void collect(const Value& value, const float* offset, float* out, vf* top) const {
    vf best[kStrips];
    for (vf& v : best) v = splat(-std::numeric_limits<float>::infinity());
    for (int64_t c = 0, classes = classes_; c < classes; ++c) {
      const vf shift = splat(offset[c]);
      const auto strip = [&](auto k) SEGADAPT_INLINE {
        const vf v = value(c, k * kLanes);
        store(out + c * kGroup + k * kLanes, v);
        best[k] = vmax(v - shift, best[k]);
      };
      [&]<int64_t... k>(std::integer_sequence<int64_t, k...>) SEGADAPT_INLINE {
        (strip(std::integral_constant<int64_t, k>()), ...);
      }(std::make_integer_sequence<int64_t, kStrips>());
    }
    std::copy_n(best, kStrips, top);
  }

  void fill(int slot, int32_t y) {
    if (held_[slot] == y) return;
    held_[slot] = y;
    const int32_t *i0 = columns_.i0.data(), *i1 = columns_.i1.data();
    const T *w0 = columns_.w0.data(), *w1 = columns_.w1.data();
    std::vector<T> source(w_ + kLanes);
    T poison = 0;
    for (int64_t c = 0; c < classes_; ++c) {
      const S* x = x_ + (c * h_ + y) * w_;
      for (int64_t j = 0; j < w_; ++j) {
        source[j] = static_cast<T>(x[j]);
        poison = fused(source[j], T(0), poison);
      }
      T* out = buffer_[slot].data() + c * stride_;
      int64_t j = 0;
      if constexpr (std::is_same_v<T, float>) {  // kLanes neighbours need no more than kLanes source pixels
        for (; j + kLanes <= W_ && i1[j + kLanes - 1] - i0[j] < kLanes; j += kLanes) {
          const vf pixels = load(source.data() + i0[j]);
          const vf a = permuted(pixels, load_indices(i0 + j) - i0[j]);
          const vf b = permuted(pixels, load_indices(i1 + j) - i0[j]);
          store(out + j, fused(a, load(w0 + j), b * load(w1 + j)));
        }
      }
      for (; j < W_; ++j) out[j] = fused(source[i0[j]], w0[j], source[i1[j]] * w1[j]);
      if (mirror_) std::reverse(out, out + W_);
    }
    poison_ += poison;
  }

  const S* x_;
  int64_t classes_, h_, w_, H_, W_, y_ = 0;
  int64_t stride_;  // of the classes in buffer_: an odd number of strips, as a power of two would put all classes of a
                    // pixel into the same set of the cache
  const AxisTable<T>&rows_, &columns_;
  bool mirror_, in_place_;
  Lines<T> buffer_[2];
  int32_t held_[2] = {-1, -1};
  T poison_ = 0;
};

constexpr int64_t kTaskPixels = 1 << 15, kSmallTurn = 1 << 12;  // the logits of so few stay in the L2 cache

int64_t rows_per_task(int64_t rows, int64_t width) {
  return std::max<int64_t>(1, std::min<int64_t>(rows, kTaskPixels / std::max<int64_t>(1, width)));
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
// u = 2^-24 is the unit of rounding; exp_negative's relative error is below 2^-22 = 4 u.
//
// Confidence (softmax alone, no mirrored image, no prior). The winner has v_c = top, so e_c = 1 and p_c = 1 / sum to
// the bit: no e_c need be stored, no p_c computed. Another class with v_c - top < -2^-20 has e_c < (1 - 2^-20 + 2^-41)
// (1 + 2^-22) < 1 - 2^-21, so that e_c / sum rounds to less than 1 / sum. Hence: when one class alone lies within
// 2^-20 of top, it wins. Otherwise (ties, too) the exact path. (A float below the rounded top - 2^-20 is not above the
// true one.)
constexpr float kClose = -0x1p-20f;

// A rough exponential is within kRough = 2^-17 of e^x (see rough_exp), for every x of weight: where it is not, both are
// below 2^-125. The rough p_c is then within 2 kRough + 2^-21 + (2 C + 12) u of the exact one: one kRough for e_c, one
// for the sum, exp_negative's error twice, C u for each of the two sums. The mean with the mirrored image's keeps that
// bound, as both terms are positive; mean, prior, the factor 1 / t_c and the exact division add 4 u.
//
// Confidences inside one bin (the second pass). Two floats whose quotient is within error of 1 are less than 2^24 error
// units apart: only a rough confidence in the bin, or so near to it, can have its exact value there. Of softmaxes alone
// a quick confidence is enough, with kQuick as error.
//
// Labels with a mirrored image or a prior.
// |rough / exact - 1| < error for the quotients p_c / t_c that matter: where neither 1 / t_c nor a quotient leaves the
// range of normal numbers, which is why thresholds outside 2^-100 .. 2^100 and quotients above 2^100 take the exact
// path. With best and second the two largest rough quotients:
//   best >= 1 + 2 error           the exact maximum is at least 1;
//   best <= 1 - 2 error           it is below 1: the label is 255, whoever wins;
//   second <= best (1 - 4 error)  the winner is the exact winner, alone.
// (Twice the bounds, which covers the rounding of the comparisons themselves.)
constexpr float kRough = 0x1p-17f, kSmallestThreshold = 0x1p-100f, kLargestThreshold = 0x1p100f,
                kLargestQuotient = 0x1p100f;

// Labels of a softmax alone. The largest quotient belongs to the largest v_c - ln t_c, and is e^that / sum e^v_c. With
// l_c = ln t_c rounded, B = max_c (v_c - l_c) and T = sum_c e^(v_c - B), it is 1 / T: at least 1 where T <= 1. Relative
// errors, with M = max |l_c|:
//   B for the true maximum                  (|B| + M) u;
//   T's arguments, v_c - B and their product with log2(e): |v_c - B| 2.25 u of a term. Where v_c < B that is less than
//   u of T for each class, elsewhere v_c - B <= M: (C + 2.25 M) u;
//   T's exponentials 2.7e-6 < 46 u (without the arguments' error), its sum C u;
//   the exact quotient: v_c - top M u (where the quotient is near 1, p_c >= t_c: v_c - top >= -M), e_c 4 u, its sum C
//   u, reciprocal, product and division 3 u.
// Together less than (|B| + 5 M + 3 C + 56) u. For |B| <= kLargestBest = 64 and with twice that as margin:
//   T <= 1 - margin  the exact maximum is at least 1;
//   T >= 1 + margin  it is below 1: the label is 255.
// A class whose exact quotient may equal the winner's has v_c - B >= l_c - 2 margin: one alone is the winner.
// With quick exponentials, which are within 3.1 %, T is within 3.1 %, too. As margin < 2e-4, what is at least 1.036 or
// at most 0.964 then needs no better ones.
constexpr float kLargestBest = 64.f, kQuick = 0.036f;

// Labels from the largest probability p_a and its class a alone, which an earlier pass has found. A quotient p / t of
// floats rounds to 1 or more exactly where p >= t: the float before t is at most t (1 - u), and 1 - u is a float. So
// where p_c < t_c for all other classes, the label is a if p_a >= t_a, else 255. With m the smallest of those t_c, that
// is certain
//   where p_a < m, as p_c <= p_a;
//   for softmaxes without a prior where 1 - p_a < m, too, but for rounding. Rounded additions of e >= 0 give at least
//   what they would with all but e_a and e_c at 0: sum >= (e_a + e_c) (1 - u). Hence p_a + p_c <= (1 + u)^2 / (1 - u) +
//   2^-149 < 1 + 3.1 u, and 1 + 4.2 u for the mean with the mirrored image's. Computing 1 - m + 8 u adds 1.5 u where m
//   <= 2 (for larger m every p_c is below m), so p_a > 1 - m + 8 u is enough.
constexpr float kSumMargin = 0x1p-21f;

inline float label_margin(int64_t classes, float largest_log) {
  return 2 * (kLargestBest + 5 * largest_log + static_cast<float>(3 * classes + 56)) * 0x1p-24f;
}

inline float rough_error(int64_t classes) {
  return 2 * kRough + 0x1p-21f + static_cast<float>(2 * classes + 16) * 0x1p-24f;
}

// e^x for x <= 70 through 2^z = 2^floor(z) 2^f with a polynomial of degree four for f in [0, 1], whose relative error
// is 2.7e-6 with rounding. Rounding z adds at most 2^-18 ln 2 = 2.7e-6 down to z = -128, the rounded log2(e) 1.2e-6:
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

// e^x to within 3.1 % for x <= 70, through 2^z = 2^floor(z) 2^f and 2^f < 1 + f < 1.062 2^f: the bits of a float grow
// evenly with z between powers of two. They start 366,000 lower, which centres the error. Where that leaves the normal
// numbers, at z = -126, the result is below 2^-126, as e^x is.
inline vf quick_exp(vf x) {
  constexpr float scale = 0x1p23f * 1.44269504f, one = 127 * 0x1p23f - 366000.f;
  return from_bits(__builtin_convertvector(vmax(fused(x, splat(scale), splat(one)), vf{}), vi));
}

// The two largest values of a strip's pixels, and the class of the largest. Values are positive.
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

// Which classes of a strip's pixels have values of at least bound + margin[c]: 256 and the class's index, added up, so
// that the low byte is the index where there is one such class. ahead, stride: what to prefetch, see Upsampler::ahead.
__attribute__((noinline)) vi near_classes(const float* value, int64_t classes, vf bound, const float* margin,
                                          const char* ahead, int64_t stride) {
  vi near{}, tag = vi{} + 256;
  for (int64_t c = 0; c < classes; ++c, tag += 1, ahead += stride) {
    __builtin_prefetch(ahead);
    near += (load(value + c * kGroup) >= bound + margin[c]) & tag;
  }
  return near;
}
inline uint32_t several(vi near) { return mask_ge(__builtin_convertvector(near, vf), splat(512.f)); }

// The sum of exp(value - top), in the classes' order. (These two are not inlined: among all else of a strip the
// compiler would run out of registers in these loops, where the time goes.)
template <vf (*exp)(vf)>
__attribute__((noinline)) vf sum_exponentials(const float* value, int64_t classes, vf top, const char* ahead,
                                              int64_t stride) {
  vf sum{};
  for (int64_t c = 0; c < classes; ++c, ahead += stride) {
    __builtin_prefetch(ahead);
    sum += exp(load(value + c * kGroup) - top);
  }
  return sum;
}

struct Strip {  // kLanes pixels: the probabilities of class c are load(value + c * kGroup) * scale
  const float* value;
  vf scale;

  vf operator()(int64_t c) const { return load(value + c * kGroup) * scale; }
};

// Stores n of kLanes values; a call of memcpy for each strip would cost as much as a class does.
template <typename V, typename T>
inline void store_strip(T* out, const V& values, int64_t n) {
  static_assert(sizeof(V) == kLanes * sizeof(T));
  if (n == kLanes) {
    std::memcpy(out, &values, sizeof values);
  } else {
    std::memcpy(out, &values, n * sizeof(T));
  }
}

// What labels are chosen by.
struct Thresholds {
  const float* t;
  std::vector<float> inverse, log, near;  // 1 / t, ln t and ln t - 2 margin
  float margin = 0.f;                     // label_margin
  float certain, possible, alone;         // bounds of best_quotients; see rough_error
  bool rough;                             // whether these are of use for the thresholds

  Thresholds(const at::Tensor& tensor, bool probabilities)
      : t(tensor.const_data_ptr<float>()), inverse(tensor.numel()), log(tensor.numel(), 0.f), near(tensor.numel()) {
    const int64_t C = tensor.numel();
    TORCH_CHECK_VALUE(std::all_of(t, t + C, [](float x) { return x > 0.f; }), "thresholds must be positive numbers");
    std::transform(t, t + C, inverse.begin(), [](float x) { return 1.f / x; });
    const float error = rough_error(C);
    certain = 1.f + 2 * error, possible = 1.f - 2 * error, alone = 1.f - 4 * error;
    rough = !probabilities &&
            std::all_of(t, t + C, [](float x) { return x >= kSmallestThreshold && x <= kLargestThreshold; });
    if (!rough) return;
    std::transform(t, t + C, log.begin(), [](float x) { return static_cast<float>(std::log(static_cast<double>(x))); });
    float largest = 0.f;
    for (const float l : log) largest = std::max(largest, std::abs(l));
    margin = label_margin(C, largest);
    std::transform(log.begin(), log.end(), near.begin(), [&](float l) { return l - 2 * margin; });
  }

  // Bits of the pixels that are neither certainly labelled nor certainly not.
  uint32_t unclear(const Best& best) const {
    const uint32_t maybe = mask_ge(best.value, splat(possible));
    const uint32_t yes = mask_ge(best.value, splat(certain)) & ~mask_ge(best.value, splat(kLargestQuotient)) &
                         ~mask_ge(best.second, best.value * alone);
    return maybe & ~yes;
  }
};

// The class probabilities of one image: softmax of the upsampled logits (or the given values), its mean with the
// mirrored image's, times the prior. Every pass computes them here, so every pass sees the same bits. gather() reads a
// group of pixels, select() one of its strips, for which confidence(), label() and best_quotients() may tell enough;
// exact() always does.
template <typename S>
class Probabilities {
 public:
  // offset: of each class, taken from its values before the largest is found; for label() ln t, otherwise 0.
  Probabilities(const Maps& maps, int64_t image, const AxisTable<float>& rows, const AxisTable<float>& columns,
                const float* offset)
      : C_(maps.logits.size(1)),
        W_(columns.i0.size()),
        area_(rows.i0.size() * W_),
        softmax_(!maps.probabilities),
        offset_(offset),
        prior_(maps.prior ? maps.prior->const_data_ptr<float>() : nullptr),
        close_(C_, kClose),
        ones_(C_, 1.f) {
    const int64_t h = maps.logits.size(2), w = maps.logits.size(3), start = image * C_ * h * w;
    add_source(maps.logits, start, h, w, rows, columns, false);
    if (maps.flipped) add_source(*maps.flipped, start, h, w, rows, columns, true);
  }

  bool plain() const { return softmax_ && sources_.size() == 1 && !prior_; }

  void select_row(int64_t y) {
    y_ = y;
    for (auto& source : sources_) source.map.select_row(y);
  }

  void gather(int64_t begin, int64_t n) {
    begin_ = begin;
    for (auto& source : sources_) source.map.gather(begin, n, offset_, source.value.data(), source.top);
    std::tie(ahead_, ahead_stride_) = sources_[0].map.ahead(begin);
  }

  void select(int64_t strip, int64_t n) { strip_ = strip, n_ = n; }

  // Of plain() strips: the class of each pixel. Bits of the pixels for which that is not certain.
  uint32_t winner(vi& index) const {
    const vi near = find_near(close_.data());
    index = near & 255;
    return several(near);
  }

  // Of plain() strips: the confidence of each pixel, or what that is within kQuick of.
  vf confidence() const { return 1.f / sum<exp_negative<vf>>(); }
  vf quick_confidence() const { return 1.f / sum<quick_exp>(); }

  // Of plain() ones: the confidences of n pixels of the selected row, which begins with pixel begin.
  void confidences(const int32_t* pixels, int64_t n, int64_t begin, float* out) {
    for (int64_t i = 0; i < n; i += kGroup) {
      const int64_t group = std::min(kGroup, n - i);
      sources_[0].map.gather(pixels + i, group, begin, sources_[0].value.data(), sources_[0].top);
      for (int64_t j = 0; j < group; j += kLanes) {
        const int64_t strip = std::min(kLanes, group - j);
        select(j / kLanes, strip);
        store_strip(out + i + j, confidence(), strip);
      }
    }
  }

  // Of softmaxes: the class of each pixel and its rough confidence. Bits of the pixels for which these are not certain.
  uint32_t rough_confidence(vf& confidence, vi& index) {
    const Best best = best_quotients(ones_.data());
    confidence = best.value, index = best.index;
    return mask_ge(best.second, best.value * (1.f - 4 * rough_error(C_))) |
           ~mask_ge(best.value, splat(kSmallestThreshold));
  }

  // Of plain() strips: bits of the pixels whose label is not certain.
  uint32_t label(const Thresholds& thresholds, vi& label) const {
    const vf best = sources_[0].top[strip_];
    const uint32_t bounded = mask_ge(splat(kLargestBest), vmax(best, -best));
    vf total = sum<quick_exp>();
    uint32_t none = bounded & mask_ge(total, splat(1.f + kQuick));
    label = vi{} + 255;
    if (none == kAllLanes) return 0;
    const vi near = find_near(thresholds.near.data());
    const uint32_t one = bounded & ~several(near);
    uint32_t some = one & mask_ge(splat(1.f - kQuick), total);
    if ((none | some) != kAllLanes) {
      total = sum<rough_exp>();
      none = bounded & mask_ge(total, splat(1.f + thresholds.margin));
      some = one & mask_ge(splat(1.f - thresholds.margin), total);
    }
    label = total <= splat(1.f) ? near & 255 : label;
    return kAllLanes & ~(none | some);
  }

  // The largest quotients p / t, to within rough_error; inverse: 1 / t. Of softmaxes only.
  Best best_quotients(const float* inverse) {
    vf scale[2] = {};
    for (size_t k = 0; k < sources_.size(); ++k) {
      Source& source = sources_[k];
      const vf top = largest(source);
      vf sum{};
      for (int64_t c = 0; c < C_; ++c) {
        const vf e = rough_exp(load(values(source) + c * kGroup) - top);
        store(source.rough.data() + c * kLanes, e);
        sum += e;
      }
      scale[k] = 1.f / (sum * static_cast<float>(sources_.size()));
    }
    Best best;
    for (int64_t c = 0; c < C_; ++c) {
      vf p = load(sources_[0].rough.data() + c * kLanes) * scale[0];
      if (sources_.size() == 2) p = fused(load(sources_[1].rough.data() + c * kLanes), scale[1], p);
      best.add(c, with_prior(c, p) * inverse[c]);
    }
    return best;
  }

  // Overwrites what gather() has read of the strip.
  Strip exact() {
    const Strip p = exact_softmax(sources_[0]);
    if (sources_.size() == 1 && !prior_) return p;
    const Strip q = sources_.size() == 2 ? exact_softmax(sources_[1]) : p;
    for (int64_t c = 0; c < C_; ++c) {
      vf v = p(c);
      if (sources_.size() == 2) v = (v + q(c)) * 0.5f;
      store(values(sources_[0]) + c * kGroup, with_prior(c, v));
    }
    return {values(sources_[0]), splat(1.f)};
  }

  bool finite() const {  // everything read so far
    return poison_ == 0.f &&
           std::all_of(sources_.begin(), sources_.end(), [](const Source& source) { return source.map.finite(); });
  }

 private:
  struct Source {  // the image or the mirrored one: its map, the present group and what it takes to compute a strip
    Upsampler<S, float> map;
    Lines<float> value, rough;
    vf top[kStrips];
  };

  void add_source(const at::Tensor& x, int64_t start, int64_t h, int64_t w, const AxisTable<float>& rows,
                  const AxisTable<float>& columns, bool mirror) {
    sources_.push_back({{x.const_data_ptr<S>() + start, C_, h, w, rows, columns, mirror},
                        Lines<float>(C_ * kGroup),
                        Lines<float>(C_ * kLanes),
                        {}});
  }

  // Of the selected strip of a softmax alone: the classes whose values are at least top + margin[c].
  vi find_near(const float* margin) const {
    return near_classes(values(sources_[0]), C_, sources_[0].top[strip_], margin, ahead(), ahead_stride_);
  }

  // The same: the sum of exp(value - top).
  template <vf (*exp)(vf)>
  vf sum() const {
    return sum_exponentials<exp>(values(sources_[0]), C_, sources_[0].top[strip_], ahead(), ahead_stride_);
  }

  const char* ahead() const { return ahead_ + strip_ * kLanes * int64_t(sizeof(S)); }
  float* values(Source& source) const { return source.value.data() + strip_ * kLanes; }
  const float* values(const Source& source) const { return source.value.data() + strip_ * kLanes; }

  vf largest(const Source& source) const {
    vf top = load(values(source));
    for (int64_t c = 1; c < C_; ++c) top = vmax(load(values(source) + c * kGroup), top);
    return top;
  }

  Strip exact_softmax(Source& source) const {
    float* value = values(source);
    if (!softmax_) return {value, splat(1.f)};
    const vf top = largest(source);
    vf sum{};
    for (int64_t c = 0; c < C_; ++c) {
      const vf e = exp_negative(load(value + c * kGroup) - top);
      store(value + c * kGroup, e);
      sum += e;
    }
    return {value, 1.f / sum};
  }

  vf with_prior(int64_t c, vf p) {
    if (!prior_) return p;
    float lane[kLanes] = {};
    std::copy_n(prior_ + c * area_ + y_ * W_ + begin_ + strip_ * kLanes, n_, lane);
    const vf factor = load(lane);
    if (mask_ge(factor * 0.f, vf{}) != kAllLanes) poison_ = std::numeric_limits<float>::quiet_NaN();
    return p * factor;
  }

  int64_t C_, W_, area_, y_ = 0, begin_ = 0, strip_ = 0, n_ = 0;
  bool softmax_;
  float poison_ = 0.f;
  const float *offset_, *prior_;
  const char* ahead_ = nullptr;  // see Upsampler::ahead
  int64_t ahead_stride_ = 0;
  std::vector<float> close_, ones_;  // of each class
  std::vector<Source> sources_;
};

// Where the rows' turns begin, and where the last one ends. A turn is what one thread takes at a time: enlarged maps'
// rows between the same two source rows, so that the source stays in the L1 cache while groups of columns are walked
// through all of them; otherwise as many as make up so many pixels.
std::vector<int64_t> make_turns(const AxisTable<float>& rows, int64_t W, bool in_place, int64_t pixels) {
  const int64_t H = rows.i0.size(), most = std::max<int64_t>(1, (in_place ? pixels : kTaskPixels) / W);
  std::vector<int64_t> turns{0};
  for (int64_t y = 1; y < H; ++y) {
    const bool same = in_place || (rows.i0[y] == rows.i0[y - 1] && rows.i1[y] == rows.i1[y - 1]);
    if (!same || y - turns.back() == most) turns.push_back(y);
  }
  turns.push_back(H);
  return turns;
}

// For each image and block of its rows (a turn for each thread), one after the other: visit(probabilities with a strip
// selected, offset of its first pixel in the block, number of pixels) for all strips, in several threads where
// parallel; then finish(image, first row, number of rows, for_each_turn), where for_each_turn(f) calls f(probabilities,
// first row, end) as the strips were visited. turn: pixels of maps that are read in place. offset: see Probabilities.
// start: called before all of it with the most pixels of a block. done(offset of the first pixel in the block, number
// of pixels): whether a group needs no visit, nor its logits.
template <typename Start, typename Done, typename Visit, typename Finish>
void for_each_strip(const Maps& maps, at::IntArrayRef size, bool parallel, int64_t turn, const float* offset,
                    const Start& start, const Done& done, const Visit& visit, const Finish& finish) {
  const int64_t H = size[0], W = size[1], threads = parallel ? at::get_num_threads() : 1;
  const AxisTable<float> rows(maps.logits.size(2), H, maps.align_corners),
      columns(maps.logits.size(3), W, maps.align_corners);
  const bool in_place = maps.logits.size(2) == H && maps.logits.size(3) == W;
  const std::vector<int64_t> turns = make_turns(rows, W, in_place, turn);
  const int64_t count = turns.size() - 1, groups = (W + kGroup - 1) / kGroup;
  int64_t most = 0;
  for (int64_t k = 0; k < count; k += threads) most = std::max(most, turns[std::min(k + threads, count)] - turns[k]);
  start(most * W);
  bool finite = true;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, maps.logits.scalar_type(), "pseudo_label", [&] {
    for (int64_t image = 0; image < maps.logits.size(0); ++image) {
      std::vector<Probabilities<scalar_t>> sources;
      for (int64_t k = 0; k < threads; ++k) sources.emplace_back(maps, image, rows, columns, offset);
      for (int64_t first = 0; first < count; first += threads) {
        const int64_t last = std::min(first + threads, count), block = turns[first];
        const auto for_each_turn = [&](const auto& f) {
          at::parallel_for(first, last, 1, [&](int64_t k, int64_t end) {
            for (; k < end; ++k) f(sources[k - first], turns[k], turns[k + 1]);
          });
        };
        for_each_turn([&](auto& source, int64_t begin, int64_t end) {
          const int64_t height = end - begin;
          std::vector<char> skipped(groups * height);  // row by row, as the pixels lie
          for (int64_t k = 0; k < groups * height; ++k) {
            const int64_t i = k % groups * kGroup;
            skipped[k] = done((begin + k / groups - block) * W + i, std::min(kGroup, W - i));
          }
          for (int64_t k = 0; k < groups * height; ++k) {
            const int64_t y = begin + (in_place ? k / groups : k % height);
            const int64_t group = in_place ? k % groups : k / height, i = group * kGroup;
            if (skipped[(y - begin) * groups + group]) continue;
            const int64_t pixel = (y - block) * W + i, pixels = std::min(kGroup, W - i);
            source.select_row(y);
            source.gather(i, pixels);
            for (int64_t j = 0; j < pixels; j += kLanes) {
              const int64_t n = std::min(kLanes, pixels - j);
              source.select(j / kLanes, n);
              visit(source, pixel + j, n);
            }
          }
        });
        finish(image, block, turns[last] - block, for_each_turn);
      }
      for (const auto& source : sources) finite &= source.finite();
    }
  });
  TORCH_CHECK_VALUE(finite, "logits (or the prior) hold NaN or infinite values");
}

inline void store_labels(uint8_t* out, vi index, int64_t n) { store_strip(out, to_bytes(index), n); }

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

  void add_pixels(int64_t c, int64_t pixels) const {
    if (!bins) hist[c * width + kPixels] += pixels;
  }

  // Of all pixels, sampled or not: those whose confidence no bin holds.
  void add_invalid(const uint8_t* label, const float* confidence, int64_t pixels) const {
    for (int64_t i = 0; i < pixels && !bins; ++i) {
      if (!is_countable(confidence[i])) ++hist[label[i] * width + kInvalid];
    }
  }

  // Whether a confidence that is known to within error (see "Confidences inside one bin") may be in the class's bin.
  bool may_hold(int64_t c, float confidence, float error) const {
    const int32_t units = 2 + static_cast<int32_t>(0x1p24f * error), size = 1 << kBinBits;
    const int32_t distance = as_bits(confidence) - static_cast<int32_t>(bins[c]) * size;
    return distance >= -units && distance < size + units;
  }
};

Counter counter(at::Tensor& hist, const std::optional<at::Tensor>& bins) {
  return {hist.mutable_data_ptr<int64_t>(), hist.size(1), bins ? bins->const_data_ptr<int64_t>() : nullptr};
}

// Where the run of equal labels that begins at i ends. Neighbours mostly have one class, so work goes by such runs.
inline int64_t end_of_run(const uint8_t* label, int64_t i, int64_t pixels) {
  const uint64_t eight = label[i] * 0x0101010101010101u;
  int64_t stop = i + 1;
  for (; stop + 8 <= pixels; stop += 8) {
    uint64_t differs;
    std::memcpy(&differs, label + stop, 8);
    differs ^= eight;
    if (differs && std::endian::native == std::endian::little) return stop + std::countr_zero(differs) / 8;
    if (differs) break;
  }
  while (stop < pixels && label[stop] == label[i]) ++stop;
  return stop;
}

// Every rate-th pixel of each class of an image in raster order, a piece after the other.
class Sampler {
 public:
  Sampler(int64_t classes, int64_t rate) : rate_(rate), skip_(classes) {}

  void start_image() { std::fill(skip_.begin(), skip_.end(), 0); }

  // visit(class, pixel) for each sample among the next pixels, which are counted.
  template <typename Visit>
  void walk(const uint8_t* label, int64_t pixels, const Counter& count, const Visit& visit) {
    for (int64_t i = 0, stop; i < pixels; i = stop) {
      const uint8_t c = label[i];
      stop = end_of_run(label, i, pixels);
      count.add_pixels(c, stop - i);
      if (c >= skip_.size()) continue;
      int64_t next = i + skip_[c];
      for (; next < stop; next += rate_) visit(c, next);
      skip_[c] = next - stop;
    }
  }

 private:
  int64_t rate_;
  std::vector<int64_t> skip_;  // pixels of the class to pass over before the next sample
};

Best largest(const Strip& p, int64_t classes) {
  Best best{p(0)};
  for (int64_t c = 1; c < classes; ++c) best.add(c, p(c));
  return best;
}

// Counts the samples of softmaxes alone. Needs the classes of all pixels, but the confidences of the samples only, and
// where bins are given only of those whose quick confidence may be inside.
void count_samples(const Maps& maps, at::IntArrayRef size, const Counter& count, int64_t rate) {
  const int64_t C = maps.logits.size(1), W = size[1];
  const std::vector<float> zeros(C, 0.f);
  std::vector<uint8_t> label;  // of a block's pixels
  std::vector<float> quick, confidence;
  std::vector<int32_t> samples;
  Sampler sampler(C, rate);
  for_each_strip(
      maps, size, true, kSmallTurn, zeros.data(),
      [&](int64_t pixels) {
        label.resize(pixels), confidence.resize(pixels), samples.reserve(pixels);
        if (count.bins) quick.resize(pixels);
      },
      [](int64_t, int64_t) { return false; },
      [&](auto& source, int64_t first, int64_t n) SEGADAPT_INLINE {
        if (count.bins) store_strip(quick.data() + first, source.quick_confidence(), n);
        vi index;
        if (source.winner(index) & (kAllLanes >> (kLanes - n))) index = largest(source.exact(), C).index;
        store_labels(label.data() + first, index, n);
      },
      [&](int64_t, int64_t row, int64_t rows, const auto& for_each_turn) {
        if (row == 0) sampler.start_image();
        samples.clear();
        sampler.walk(label.data(), rows * W, count, [&](int64_t c, int64_t i) {
          if (!count.bins || count.may_hold(c, quick[i], kQuick)) samples.push_back(static_cast<int32_t>(i));
        });
        for_each_turn([&](auto& source, int64_t y, int64_t end) {
          for (; y < end; ++y) {
            const int64_t begin = (y - row) * W;
            const auto place = [&](int64_t pixel) {
              return std::lower_bound(samples.begin(), samples.end(), pixel) - samples.begin();
            };
            const int64_t first = place(begin), last = place(begin + W);
            source.select_row(y);
            source.confidences(samples.data() + first, last - first, begin, confidence.data() + first);
          }
        });
        for (size_t i = 0; i < samples.size(); ++i) count(label[samples[i]], confidence[i]);
      });
}

std::tuple<at::Tensor, at::Tensor> confidence_histogram_(at::Tensor& hist, const std::optional<at::Tensor>& bins,
                                                         const at::Tensor& logits,
                                                         const std::optional<at::Tensor>& flipped,
                                                         const std::optional<at::Tensor>& prior, at::IntArrayRef size,
                                                         bool align_corners, bool probabilities, int64_t rate, bool own,
                                                         bool return_maps) {
  const Maps maps = checked(logits, flipped, prior, size, align_corners, probabilities);
  const int64_t C = logits.size(1), N = logits.size(0), H = size[0], W = size[1];
  check_histogram(hist, bins, C, logits.device(), rate);
  const Counter count = counter(hist, bins);
  const bool plain = !probabilities && !flipped && !prior, rough = bins && !own && !return_maps && !probabilities;
  if (plain && !own && !return_maps && (bins || rate > 1)) {
    count_samples(maps, size, count, rate);
    return {at::empty({0}, logits.options().dtype(at::kByte)), at::empty({0}, logits.options().dtype(at::kFloat))};
  }
  const float error = rough_error(C);
  // What is not returned need not be kept beyond a block, and stays in the cache.
  at::Tensor label, confidence;
  uint8_t* y = nullptr;
  float* top = nullptr;
  const auto make_maps = [&](at::IntArrayRef shape) {
    label = at::empty(shape, logits.options().dtype(at::kByte));
    confidence = at::empty(shape, logits.options().dtype(at::kFloat));
    y = label.mutable_data_ptr<uint8_t>(), top = confidence.mutable_data_ptr<float>();
  };
  Sampler sampler(C, rate);
  const std::vector<float> zeros(C, 0.f);
  std::atomic<bool> countable{true};
  int64_t before = 0;  // pixels of the image, in the blocks so far
  // Counters are shared: a class's own probabilities are counted by one thread, everything else after a block.
  for_each_strip(
      maps, size, !own, kTaskPixels, zeros.data(),
      [&](int64_t pixels) { return_maps ? make_maps({N, H, W}) : make_maps({pixels}); },
      [](int64_t, int64_t) { return false; },
      [&](auto& source, int64_t first, int64_t n) SEGADAPT_INLINE {
        vf best{};
        vi index{};
        const uint32_t lanes = kAllLanes >> (kLanes - n);
        bool certain = false;
        if (plain && !own) {
          certain = !(source.winner(index) & lanes);
          best = source.confidence();
        } else if (rough) {
          certain = !(source.rough_confidence(best, index) & lanes);
          for (int64_t l = 0; l < n; ++l) certain = certain && !count.may_hold(index[l], best[l], error);
        }
        if (!certain) {
          const Strip p = source.exact();
          const Best found = largest(p, C);
          best = found.value, index = found.index;
          if (mask_ge(best, splat(kCountableEnd)) & lanes) countable = false;
          for (int64_t j = own ? (rate - (before + first) % rate) % rate : n; j < n; j += rate) {
            for (int64_t c = 0; c < C; ++c) count(c, p(c)[j]);
          }
        }
        store_labels(y + first, index, n);
        store_strip(top + first, best, n);
      },
      [&](int64_t, int64_t row, int64_t rows, const auto&) {
        if (row == 0) sampler.start_image();
        before = row + rows < H ? (row + rows) * W : 0;
        if (!countable) count.add_invalid(y, top, rows * W);
        sampler.walk(y, rows * W, count, [&](int64_t c, int64_t i) {
          if (!own) count(c, top[i]);
        });
        countable = true;
        if (return_maps) y += rows * W, top += rows * W;
      });
  if (!return_maps) make_maps({0});
  return {label, confidence};
}

void refine_from_maps_(at::Tensor& fine, const at::Tensor& bins, const at::Tensor& label, const at::Tensor& confidence,
                       int64_t rate) {
  check_histogram(fine, bins, fine.size(0), label.device(), rate);
  const Known known = checked(label, confidence, label.device());
  const Counter count = counter(fine, bins);
  Sampler sampler(fine.size(0), rate);
  const int64_t area = label.size(1) * label.size(2);
  for (int64_t n = 0; n < label.size(0); ++n) {
    sampler.start_image();
    const float* confidence = known.confidence.const_data_ptr<float>() + n * area;
    sampler.walk(known.label.const_data_ptr<uint8_t>() + n * area, area, count,
                 [&](int64_t c, int64_t i) { count(c, confidence[i]); });
  }
}

// ---- labels ---------------------------------------------------------------------------------------------------------

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

// Labels of the pixels for which the largest probability tells; see kSumMargin.
class KnownLabels {
 public:
  KnownLabels(const Known& known, const Thresholds& thresholds, int64_t classes, bool sum_to_one)
      : label_(known.label.const_data_ptr<uint8_t>()), confidence_(known.confidence.const_data_ptr<float>()) {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    for (int64_t a = 0; a < classes; ++a) {
      float others = infinity;
      for (int64_t c = 0; c < classes; ++c) others = c == a ? others : std::min(others, thresholds.t[c]);
      limits_[a] = {others, sum_to_one ? (1.f - others) + kSumMargin : infinity, thresholds.t[a]};
    }
  }

  // Writes the labels of n pixels; false where one of them does not tell.
  bool operator()(int64_t first, int64_t n, uint8_t* out) const {
    const uint8_t* label = label_ + first;
    const float* confidence = confidence_ + first;
    int32_t open = 0;
    for (int64_t i = 0, stop; i < n; i = stop) {
      stop = end_of_run(label, i, n);
      const uint8_t a = label[i];
      const Limits limit = limits_[a];
      for (int64_t j = i; j < stop; ++j) {
        const float p = confidence[j];
        open |= !(p < limit.below) & !(p > limit.above);
        out[j] = p >= limit.threshold ? a : 255;
      }
    }
    return !open;
  }

  void advance(int64_t pixels) { label_ += pixels, confidence_ += pixels; }

 private:
  struct Limits {  // certain below the one and above the other; by default nowhere
    float below = -std::numeric_limits<float>::infinity(), above = std::numeric_limits<float>::infinity(),
          threshold = 1.f;
  };

  const uint8_t* label_;
  const float* confidence_;
  std::array<Limits, 256> limits_;  // of each label, and of those that are no class
};

at::Tensor pseudo_label(const at::Tensor& logits, const at::Tensor& thresholds_,
                        const std::optional<at::Tensor>& flipped, const std::optional<at::Tensor>& prior,
                        const std::optional<at::Tensor>& known_label, const std::optional<at::Tensor>& known_confidence,
                        at::IntArrayRef size, bool align_corners, bool probabilities) {
  const Maps maps = checked(logits, flipped, prior, size, align_corners, probabilities);
  const std::optional<Known> known = checked(known_label, known_confidence, logits, size);
  const int64_t C = logits.size(1);
  check_thresholds(thresholds_, logits);
  const at::Tensor values = thresholds_.contiguous();
  const Thresholds thresholds(values, probabilities);
  at::Tensor label = at::empty({logits.size(0), size[0], size[1]}, logits.options().dtype(at::kByte));
  uint8_t* y = label.mutable_data_ptr<uint8_t>();
  std::optional<KnownLabels> known_labels;
  if (known) known_labels.emplace(*known, thresholds, C, !probabilities && !prior);
  for_each_strip(
      maps, size, true, kTaskPixels, thresholds.log.data(), [](int64_t) {},
      [&](int64_t first, int64_t n) { return known_labels && (*known_labels)(first, n, y + first); },
      [&](auto& source, int64_t first, int64_t n) SEGADAPT_INLINE {
        const uint32_t lanes = kAllLanes >> (kLanes - n);
        if (thresholds.rough && source.plain()) {
          vi found;
          if (!(source.label(thresholds, found) & lanes)) return store_labels(y + first, found, n);
        } else if (thresholds.rough) {
          const Best best = source.best_quotients(thresholds.inverse.data());
          if (!(thresholds.unclear(best) & lanes)) {
            return store_labels(y + first, best.value >= splat(1.f) ? best.index : vi{} + 255, n);
          }
        }
        exact_labels(source.exact(), thresholds, C, n, y + first);
      },
      [&](int64_t, int64_t, int64_t rows, const auto&) {
        y += rows * size[1];
        if (known_labels) known_labels->advance(rows * size[1]);
      });
  return label;
}

}  // namespace
}  // namespace segadapt

TORCH_LIBRARY_IMPL(segadapt, CPU, m) {
  m.impl("upsample_argmax", segadapt::upsample_argmax);
  m.impl("confidence_histogram_", segadapt::confidence_histogram_);
  m.impl("refine_from_maps_", segadapt::refine_from_maps_);
  m.impl("pseudo_label", segadapt::pseudo_label);
}
