// Class-balanced pseudo-labels (Zou et al., ECCV 2018) and label maps: one thread a pixel, which reads its logits again
// for each of the softmax's steps (maximum, sum, result) instead of storing them. All rounding steps are spelled out
// (_rn), so that every kernel sees the same bits, whatever the compiler would fuse.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>

#include "pseudo_label.h"

namespace segadapt {
namespace {

constexpr int kThreads = 256, kChunk = 1024, kWarps = kChunk / 32;
constexpr uint8_t kIgnore = 255;

unsigned int blocks_for(int64_t items) {
  return static_cast<unsigned int>(std::min<int64_t>((items + kThreads - 1) / kThreads, 1 << 20));
}

__device__ int64_t first_item() { return blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; }
__device__ int64_t item_step() { return gridDim.x * static_cast<int64_t>(blockDim.x); }

__device__ float mul(float a, float b) { return __fmul_rn(a, b); }
__device__ double mul(double a, double b) { return __dmul_rn(a, b); }
__device__ float fma_(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ double fma_(double a, double b, double c) { return __fma_rn(a, b, c); }

template <typename T>
struct Axis {  // the bilinear weights of one axis, in the arithmetic of the CPU kernel
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

  __device__ void locate(int64_t i, int64_t& i0, int64_t& i1, T& w0, T& w1) const {
    T x = in == out ? T(i) : align_corners ? mul(scale, T(i)) : fma_(scale, T(i) + T(0.5), T(-0.5));
    if (x < T(0)) x = T(0);
    i0 = static_cast<int64_t>(x);
    if (i0 > in - 1) i0 = in - 1;
    i1 = i0 + 1 < in ? i0 + 1 : in - 1;
    w1 = x - T(i0);
    w1 = w1 < T(0) ? T(0) : w1 > T(1) ? T(1) : w1;
    w0 = T(1) - w1;
  }
};

template <typename S, typename T>
struct Map {  // logits [N, C, h, w] seen at size H x W. S: stored type, T: arithmetic
  const S* x;
  int64_t classes;
  Axis<T> rows, columns;
  bool mirror;

  struct Pixel {
    const S* image;
    int64_t area, corner[4];
    T top, bottom, left, right;
    bool in_place;

    __device__ T operator()(int64_t c) const {
      const S* map = image + c * area;
      const T a = static_cast<T>(map[corner[0]]);
      if (in_place) return a;
      const T b = static_cast<T>(map[corner[1]]), d = static_cast<T>(map[corner[2]]),
              e = static_cast<T>(map[corner[3]]);
      return fma_(fma_(a, left, mul(b, right)), top, mul(fma_(d, left, mul(e, right)), bottom));
    }
  };

  __device__ Pixel pixel(int64_t image, int64_t y, int64_t column) const {
    Pixel p;
    p.area = rows.in * columns.in;
    p.image = x + image * classes * p.area;
    p.in_place = rows.in == rows.out && columns.in == columns.out;
    int64_t y0, y1, x0, x1;
    rows.locate(y, y0, y1, p.top, p.bottom);
    columns.locate(mirror ? columns.out - 1 - column : column, x0, x1, p.left, p.right);
    p.corner[0] = y0 * columns.in + x0;
    p.corner[1] = y0 * columns.in + x1;
    p.corner[2] = y1 * columns.in + x0;
    p.corner[3] = y1 * columns.in + x1;
    return p;
  }
};

// ---- label maps -----------------------------------------------------------------------------------------------------

template <typename S, typename T>
__global__ void upsample_argmax_kernel(Map<S, T> map, int64_t pixels, uint8_t* label) {
  const int64_t H = map.rows.out, W = map.columns.out;
  for (int64_t i = first_item(); i < pixels; i += item_step()) {
    const auto value = map.pixel(i / (H * W), i / W % H, i % W);
    T best = value(0);
    int64_t index = 0;
    for (int64_t c = 1; c < map.classes; ++c) {
      const T v = value(c);
      if (v > best) best = v, index = c;
    }
    label[i] = static_cast<uint8_t>(index);
  }
}

template <typename S, typename T>
void upsample_argmax_images(const at::Tensor& logits, bool align_corners, at::Tensor& label) {
  const Map<S, T> map{logits.const_data_ptr<S>(), logits.size(1), Axis<T>(logits.size(2), label.size(1), align_corners),
                      Axis<T>(logits.size(3), label.size(2), align_corners), false};
  upsample_argmax_kernel<<<blocks_for(label.numel()), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      map, label.numel(), label.mutable_data_ptr<uint8_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor upsample_argmax(const at::Tensor& logits_, at::IntArrayRef size, bool align_corners) {
  check_logits(logits_, size);
  const c10::cuda::CUDAGuard guard(logits_.device());
  const at::Tensor logits = logits_.contiguous();
  at::Tensor label = at::empty({logits.size(0), size[0], size[1]}, logits.options().dtype(at::kByte));
  if (label.numel() == 0) return label;
  if (logits.scalar_type() == at::kDouble) {
    upsample_argmax_images<double, double>(logits, align_corners, label);
  } else {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits.scalar_type(), "upsample_argmax",
                                    [&] { upsample_argmax_images<scalar_t, float>(logits, align_corners, label); });
  }
  return label;
}

// ---- probabilities --------------------------------------------------------------------------------------------------

template <typename S>
struct Source {
  Map<S, float> straight, mirrored;
  const float* prior;
  bool softmax, flipped;

  Source(const Maps& maps, at::IntArrayRef size)
      : straight(map(maps.logits, maps, size, false)),
        mirrored(map(maps.flipped.value_or(maps.logits), maps, size, true)),
        prior(maps.prior ? maps.prior->const_data_ptr<float>() : nullptr),
        softmax(!maps.probabilities),
        flipped(maps.flipped.has_value()) {}

  static Map<S, float> map(const at::Tensor& x, const Maps& maps, at::IntArrayRef size, bool mirror) {
    return {x.const_data_ptr<S>(), x.size(1), Axis<float>(x.size(2), size[0], maps.align_corners),
            Axis<float>(x.size(3), size[1], maps.align_corners), mirror};
  }

  struct Softmax {  // one pixel of one map
    typename Map<S, float>::Pixel value;
    float top, inverse;
    bool softmax;

    __device__ Softmax(const Map<S, float>& map, int64_t image, int64_t y, int64_t x, bool softmax)
        : value(map.pixel(image, y, x)), top(0.f), inverse(1.f), softmax(softmax) {
      if (!softmax) return;
      top = value(0);
      for (int64_t c = 1; c < map.classes; ++c) top = fmaxf(top, value(c));
      float sum = 0.f;
      for (int64_t c = 0; c < map.classes; ++c) sum = __fadd_rn(sum, expf(__fsub_rn(value(c), top)));
      inverse = __fdiv_rn(1.f, sum);
    }

    __device__ float operator()(int64_t c) const {
      const float v = value(c);
      return softmax ? mul(expf(__fsub_rn(v, top)), inverse) : v;
    }
  };

  struct Pixel {
    Softmax straight, mirrored;
    const float* prior;
    int64_t area;
    bool flipped;

    __device__ float operator()(int64_t c) const {
      float p = straight(c);
      if (flipped) p = mul(__fadd_rn(p, mirrored(c)), 0.5f);
      return prior ? mul(p, prior[c * area]) : p;
    }
  };

  __device__ Pixel pixel(int64_t i) const {
    const int64_t H = straight.rows.out, W = straight.columns.out, area = H * W;
    const int64_t image = i / area, y = i / W % H, x = i % W;
    return {Softmax(straight, image, y, x, softmax), Softmax(mirrored, image, y, x, softmax && flipped),
            prior ? prior + i % area : nullptr, area, flipped};
  }
};

// ---- thresholds -----------------------------------------------------------------------------------------------------

__device__ void count(int64_t* hist, const int64_t* bins, int64_t c, float confidence) {
  const int32_t bits = confidence > 0.f ? __float_as_int(confidence) : confidence <= 0.f ? 0 : kInvalid << kBinBits;
  const int32_t bin = min(bits >> kBinBits, kInvalid);
  if (bins && bin != bins[c]) return;
  const int64_t cell = bins ? (c << kBinBits) + (bits & ((1 << kBinBits) - 1)) : c * (kBins + 2) + bin;
  atomicAdd(reinterpret_cast<unsigned long long*>(hist) + cell, 1ull);
}

template <typename S>
__global__ void confidence_kernel(Source<S> source, int64_t pixels, uint8_t* label, float* confidence, int64_t rate,
                                  bool own, int64_t* hist, const int64_t* bins) {
  const int64_t area = source.straight.rows.out * source.straight.columns.out;
  for (int64_t i = first_item(); i < pixels; i += item_step()) {
    const auto p = source.pixel(i);
    float best = p(0);
    int64_t index = 0;
    bool valid = best == best;
    for (int64_t c = 1; c < source.straight.classes; ++c) {
      const float v = p(c);
      valid &= v == v;
      if (v > best) best = v, index = c;
    }
    label[i] = static_cast<uint8_t>(index);
    confidence[i] = valid ? best : __int_as_float(0x7fffffff);
    if (own && i % area % rate == 0) {
      for (int64_t c = 0; c < source.straight.classes; ++c) count(hist, bins, c, p(c));
    }
  }
}

// counts[image][chunk][class] of the labels in chunks of kChunk pixels; one block a chunk.
__global__ void chunk_counts_kernel(const uint8_t* label, int64_t area, int64_t chunks, int64_t classes,
                                    int64_t* counts) {
  __shared__ int found[256];
  for (int c = threadIdx.x; c < 256; c += blockDim.x) found[c] = 0;
  __syncthreads();
  const int64_t image = blockIdx.x / chunks, pixel = blockIdx.x % chunks * kChunk + threadIdx.x;
  if (pixel < area) atomicAdd(found + label[image * area + pixel], 1);
  __syncthreads();
  for (int c = threadIdx.x; c < classes; c += blockDim.x) counts[blockIdx.x * classes + c] = found[c];
}

// Counts every rate-th pixel of each class of each image; before[image][chunk][class] pixels of the class precede the
// chunk.
__global__ void sample_kernel(const uint8_t* label, const float* confidence, int64_t area, int64_t chunks,
                              int64_t classes, const int64_t* before, int64_t rate, int64_t* hist,
                              const int64_t* bins) {
  __shared__ int in_warp[kWarps][256];
  for (int c = threadIdx.x; c < kWarps * 256; c += blockDim.x) in_warp[0][c] = 0;
  __syncthreads();
  const int64_t image = blockIdx.x / chunks, pixel = blockIdx.x % chunks * kChunk + threadIdx.x;
  const int64_t i = image * area + pixel;
  const int c = pixel < area ? label[i] : 255, warp = threadIdx.x / 32;  // 255 is no class: at most 255 exist
  const unsigned same = __match_any_sync(0xffffffffu, c), earlier = same & ((1u << threadIdx.x % 32) - 1);
  if (earlier == 0) in_warp[warp][c] = __popc(same);
  __syncthreads();
  if (pixel >= area) return;
  int64_t rank = (c < classes ? before[blockIdx.x * classes + c] : 0) + __popc(earlier);
  for (int w = 0; w < warp; ++w) rank += in_warp[w][c];
  if (c < classes && rank % rate == 0) count(hist, bins, c, confidence[i]);
}

const int64_t* data(const std::optional<at::Tensor>& bins) {
  TORCH_CHECK_VALUE(!bins || bins->is_contiguous(), "bins: expected a contiguous tensor");
  return bins ? bins->const_data_ptr<int64_t>() : nullptr;
}

// Without bins, also adds the number of pixels of each class.
void count_images(at::Tensor& hist, const std::optional<at::Tensor>& bins, const at::Tensor& label,
                  const at::Tensor& confidence, int64_t rate, bool sample) {
  const int64_t N = label.size(0), C = hist.size(0), area = label.size(1) * label.size(2);
  const int64_t chunks = (area + kChunk - 1) / kChunk;
  TORCH_CHECK_VALUE(N * chunks <= INT32_MAX, "too many pixels for one batch");
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const unsigned int blocks = static_cast<unsigned int>(N * chunks);
  const uint8_t* y = label.const_data_ptr<uint8_t>();
  at::Tensor counts = at::empty({N, chunks, C}, hist.options());
  chunk_counts_kernel<<<blocks, kChunk, 0, stream>>>(y, area, chunks, C, counts.mutable_data_ptr<int64_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  if (!bins) hist.select(1, kPixels).add_(counts.sum(at::IntArrayRef({0, 1})));
  if (!sample) return;
  const at::Tensor before = counts.cumsum(1).sub_(counts);
  sample_kernel<<<blocks, kChunk, 0, stream>>>(y, confidence.const_data_ptr<float>(), area, chunks, C,
                                               before.const_data_ptr<int64_t>(), rate, hist.mutable_data_ptr<int64_t>(),
                                               data(bins));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<at::Tensor, at::Tensor> confidence_histogram_(at::Tensor& hist, const std::optional<at::Tensor>& bins,
                                                         const at::Tensor& logits,
                                                         const std::optional<at::Tensor>& flipped,
                                                         const std::optional<at::Tensor>& prior, at::IntArrayRef size,
                                                         bool align_corners, bool probabilities, int64_t rate,
                                                         bool own) {
  const c10::cuda::CUDAGuard guard(logits.device());
  const Maps maps = checked(logits, flipped, prior, size, align_corners, probabilities);
  check_histogram(hist, bins, logits.size(1), rate);
  at::Tensor label = at::empty({logits.size(0), size[0], size[1]}, logits.options().dtype(at::kByte));
  at::Tensor confidence = at::empty(label.sizes(), logits.options().dtype(at::kFloat));
  if (label.numel() == 0) return {label, confidence};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits.scalar_type(), "confidence_histogram_", [&] {
    confidence_kernel<<<blocks_for(label.numel()), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        Source<scalar_t>(maps, size), label.numel(), label.mutable_data_ptr<uint8_t>(),
        confidence.mutable_data_ptr<float>(), rate, own, hist.mutable_data_ptr<int64_t>(), data(bins));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  count_images(hist, bins, label, confidence, rate, !own);
  return {label, confidence};
}

// ---- labels ---------------------------------------------------------------------------------------------------------

template <typename S>
__global__ void pseudo_label_kernel(Source<S> source, int64_t pixels, const float* thresholds, uint8_t* label) {
  for (int64_t i = first_item(); i < pixels; i += item_step()) {
    const auto p = source.pixel(i);
    float best = 0.f;
    int64_t index = kIgnore;
    bool valid = true;
    for (int64_t c = 0; c < source.straight.classes; ++c) {
      const float ratio = __fdiv_rn(p(c), thresholds[c]);
      valid &= ratio == ratio;
      if (ratio > best) best = ratio, index = c;
    }
    label[i] = valid && best >= 1.f ? static_cast<uint8_t>(index) : kIgnore;
  }
}

at::Tensor pseudo_label(const at::Tensor& logits, const at::Tensor& thresholds_,
                        const std::optional<at::Tensor>& flipped, const std::optional<at::Tensor>& prior,
                        at::IntArrayRef size, bool align_corners, bool probabilities) {
  const c10::cuda::CUDAGuard guard(logits.device());
  const Maps maps = checked(logits, flipped, prior, size, align_corners, probabilities);
  TORCH_CHECK_VALUE(thresholds_.scalar_type() == at::kFloat && thresholds_.numel() == logits.size(1),
                    "thresholds: expected float32 [", logits.size(1), "]");
  const at::Tensor thresholds = thresholds_.contiguous();
  at::Tensor label = at::empty({logits.size(0), size[0], size[1]}, logits.options().dtype(at::kByte));
  if (label.numel() == 0) return label;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits.scalar_type(), "pseudo_label", [&] {
    pseudo_label_kernel<<<blocks_for(label.numel()), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        Source<scalar_t>(maps, size), label.numel(), thresholds.const_data_ptr<float>(),
        label.mutable_data_ptr<uint8_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return label;
}

}  // namespace
}  // namespace segadapt

TORCH_LIBRARY_IMPL(segadapt, CUDA, m) {
  m.impl("upsample_argmax", segadapt::upsample_argmax);
  m.impl("confidence_histogram_", segadapt::confidence_histogram_);
  m.impl("pseudo_label", segadapt::pseudo_label);
}
