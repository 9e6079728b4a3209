// Class-balanced pseudo-labels (Zou et al., ECCV 2018) and label maps, without ever writing H x W x C values.
// Images are walked row by row; a row is cut into blocks of pixels that stay in the L1 cache. All loops over pixels are plain
// and branch-free, so that the compiler vectorises them for whatever CPU it builds for.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
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

// The first class of the largest value; false when a value is not finite and `check` asks for it.
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

void check_logits(const at::Tensor& logits, at::IntArrayRef size) {
  TORCH_CHECK_VALUE(logits.dim() == 4, "logits: expected [N, C, h, w], got ", logits.sizes());
  TORCH_CHECK_VALUE(logits.size(1) >= 1 && logits.size(1) <= 255, "logits: 1 to 255 classes, got ", logits.size(1));
  TORCH_CHECK_VALUE(size.size() == 2 && size[0] > 0 && size[1] > 0, "size: expected (height, width), got ", size);
  TORCH_CHECK_VALUE(logits.size(2) > 0 && logits.size(3) > 0, "logits: empty map ", logits.sizes());
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

}  // namespace
}  // namespace segadapt

TORCH_LIBRARY_IMPL(segadapt, CPU, m) {
  m.impl("upsample_argmax", segadapt::upsample_argmax);
}
