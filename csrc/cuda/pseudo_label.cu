// Class-balanced pseudo-labels (Zou et al., ECCV 2018) and label maps on CUDA: one thread a pixel. Up to kKept classes
// stay in its registers, at one exponential each; with more it reads its logits again for each of the softmax's steps
// (maximum, sum, result). Where logits are enlarged, a block first interpolates the rows that it needs along x, in
// shared memory. All rounding steps are spelled out (arithmetic.h), so that every kernel, and the CPU, sees the same
// bits, whatever the compiler would fuse.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "exponential.h"
#include "pseudo_label.h"

namespace segadapt {
namespace {

constexpr int kThreads = 256, kChunk = 1024, kWarps = kChunk / 32;
constexpr int kTileWidth = 32, kTileHeight = kThreads / kTileWidth;  // pixels of a block where there are lines
constexpr int64_t kSharedBytes = 48 << 10;
constexpr int kKept = 20;  // classes: Cityscapes' 19
constexpr int64_t kMaxImages = 65535;
constexpr unsigned kAll = 0xffffffffu;
constexpr uint8_t kIgnore = 255;

// A thread for each pixel of each image: pixels along x, images along y, so that no index needs more than 32 bits.
dim3 grid_for(int64_t images, int64_t pixels, int threads) {
  TORCH_CHECK_VALUE(images <= kMaxImages, "more than ", kMaxImages, " images in one batch");
  TORCH_CHECK_VALUE(pixels <= INT32_MAX - threads, "a map of more than 2^31 pixels");
  return dim3((pixels + threads - 1) / threads, images);
}

// How the pixels of a map are shared out. With lines, a block takes a tile of pixels, and of every class as many rows
// of logits as the tile can touch, interpolated at its columns: the lines, which lie in shared memory. Without, it
// takes kThreads pixels in raster order.
struct Layout {
  int lines;
  int64_t bytes;  // of shared memory
  dim3 grid;
};

template <typename T>
Layout layout_of(const at::Tensor& logits, at::IntArrayRef size, bool align_corners, int maps) {
  const Axis<T> rows(logits.size(2), size[0], align_corners);
  const dim3 raster = grid_for(logits.size(0), size[0] * size[1], kThreads);
  if (rows.in >= rows.out || rows.out > 1 << 16) return {0, 0, raster};
  // So many rows of logits lie between the tile's first and last row; one more for where the first one begins, and the
  // two around the last. 1/16 is more than rounding moves them.
  const int lines = static_cast<int>((kTileHeight - 1) * rows.scale + T(0.0625)) + 3;
  const int64_t bytes = maps * logits.size(1) * lines * kTileWidth * int64_t(sizeof(T));
  if (bytes > kSharedBytes) return {0, 0, raster};
  const int64_t across = (size[1] + kTileWidth - 1) / kTileWidth, down = (size[0] + kTileHeight - 1) / kTileHeight;
  return {lines, bytes, dim3(across * down, logits.size(0))};
}

struct Place {
  int x, y;
  bool inside;  // else x, y are those of a pixel at the border: warps count and blocks wait as a whole
  int tile_y;   // the first row of the tile
};

template <bool tiled>
__device__ Place place_in(int H, int W) {
  if (tiled) {
    const int across = (W + kTileWidth - 1) / kTileWidth, tile_y = int(blockIdx.x) / across * kTileHeight;
    const int x = int(blockIdx.x) % across * kTileWidth + int(threadIdx.x) % kTileWidth;
    const int y = tile_y + int(threadIdx.x) / kTileWidth;
    return {min(x, W - 1), min(y, H - 1), x < W && y < H, tile_y};
  }
  const int i = blockIdx.x * kThreads + threadIdx.x, pixel = min(i, H * W - 1);
  return {pixel % W, pixel / W, i == pixel, 0};
}

template <typename S, typename T>
struct Map {  // logits [N, C, h, w] seen at size H x W. S: stored type, T: arithmetic
  const S* x;
  int classes;
  Axis<T> rows, columns;
  bool mirror;

  struct Pixel {
    const S* image;
    int area, corner[4];
    T top, bottom, left, right;
    bool in_place;

    __device__ T operator()(int c) const {
      const S* map = image + int64_t(c) * area;
      const T a = static_cast<T>(map[corner[0]]);
      if (in_place) return a;
      const T b = static_cast<T>(map[corner[1]]), d = static_cast<T>(map[corner[2]]),
              e = static_cast<T>(map[corner[3]]);
      return fused(fused(a, left, product(b, right)), top, product(fused(d, left, product(e, right)), bottom));
    }
  };

  struct PixelOfTile {  // the same from two lines
    const T *upper, *lower;
    int stride;
    T top, bottom;

    __device__ T operator()(int c) const { return fused(upper[c * stride], top, product(lower[c * stride], bottom)); }
  };

  __device__ int H() const { return static_cast<int>(rows.out); }
  __device__ int W() const { return static_cast<int>(columns.out); }
  __device__ const S* image(int n) const {
    return x + int64_t(n) * classes * (static_cast<int>(rows.in) * static_cast<int>(columns.in));
  }

  __device__ void locate_column(int column, int& x0, int& x1, T& left, T& right) const {
    columns.locate(mirror ? W() - 1 - column : column, x0, x1, left, right);
  }
  __device__ int first_row(const Place& at) const {  // of the tile's lines
    int first, second;
    T top, bottom;
    rows.locate(at.tile_y, first, second, top, bottom);
    return first;
  }

  // The tile's lines [classes, lines, kTileWidth], by all threads of the block.
  __device__ void load(int n, const Place& at, int lines, T* to) const {
    int x0, x1;
    T left, right;
    locate_column(at.x, x0, x1, left, right);
    const int first = first_row(at), h = static_cast<int>(rows.in);
    const S* logits = image(n);
    for (int k = threadIdx.x / kTileWidth; k < classes * lines; k += kTileHeight) {
      const int c = k / lines, row = min(first + k % lines, h - 1);
      const S* line = logits + (int64_t(c) * h + row) * columns.in;
      to[k * kTileWidth + threadIdx.x % kTileWidth] =
          fused(static_cast<T>(line[x0]), left, product(static_cast<T>(line[x1]), right));
    }
  }

  // A pixel of image n, or, with tiled, of the tile's lines; it gives the values of its classes.
  template <bool tiled>
  __device__ auto pixel(int n, const Place& at, int lines, const T* loaded) const {
    std::conditional_t<tiled, PixelOfTile, Pixel> p;
    int y0, y1;
    rows.locate(at.y, y0, y1, p.top, p.bottom);
    if constexpr (tiled) {
      p.upper = loaded + (y0 - first_row(at)) * kTileWidth + threadIdx.x % kTileWidth;
      p.lower = p.upper + (y1 - y0) * kTileWidth;
      p.stride = lines * kTileWidth;
    } else {
      int x0, x1;
      locate_column(at.x, x0, x1, p.left, p.right);
      const int width = static_cast<int>(columns.in);
      p.area = static_cast<int>(rows.in) * width;
      p.image = image(n);
      p.in_place = rows.in == rows.out && columns.in == columns.out;
      p.corner[0] = y0 * width + x0;
      p.corner[1] = y0 * width + x1;
      p.corner[2] = y1 * width + x0;
      p.corner[3] = y1 * width + x1;
    }
    return p;
  }
};

template <typename S, typename T>
Map<S, T> map_of(const at::Tensor& x, at::IntArrayRef size, bool align_corners, bool mirror) {
  TORCH_CHECK_VALUE(x.size(2) * x.size(3) <= INT32_MAX, "a map of more than 2^31 pixels");
  return {x.const_data_ptr<S>(), static_cast<int>(x.size(1)), Axis<T>(x.size(2), size[0], align_corners),
          Axis<T>(x.size(3), size[1], align_corners), mirror};
}

// f(S()), S being what the logits are stored in. Every type has kernels of its own, which take their time to compile.
template <typename F>
void with_type_of(const at::Tensor& logits, const F& f) {
  switch (logits.scalar_type()) {
    case at::kFloat:
      return f(float());
    case at::kHalf:
      return f(at::Half());
    case at::kBFloat16:
      return f(at::BFloat16());
    default:
      TORCH_CHECK_VALUE(false, "logits: expected a floating dtype, got ", logits.scalar_type());
  }
}

// ---- label maps -----------------------------------------------------------------------------------------------------

template <typename S, typename T, bool tiled>
__global__ void upsample_argmax_kernel(Map<S, T> map, int lines, uint8_t* label) {
  extern __shared__ double shared[];
  T* loaded = reinterpret_cast<T*>(shared);
  const Place at = place_in<tiled>(map.H(), map.W());
  if (tiled) {
    map.load(blockIdx.y, at, lines, loaded);
    __syncthreads();
  }
  if (!at.inside) return;
  const auto value = map.template pixel<tiled>(blockIdx.y, at, lines, loaded);
  T best = value(0);
  int index = 0;
  for (int c = 1; c < map.classes; ++c) {
    const T v = value(c);
    if (v > best) best = v, index = c;
  }
  label[(int64_t(blockIdx.y) * map.H() + at.y) * map.W() + at.x] = static_cast<uint8_t>(index);
}

template <typename S, typename T>
void upsample_argmax_images(const at::Tensor& logits, at::IntArrayRef size, bool align_corners, at::Tensor& label) {
  const Layout layout = layout_of<T>(logits, size, align_corners, 1);
  const auto kernel = layout.lines ? upsample_argmax_kernel<S, T, true> : upsample_argmax_kernel<S, T, false>;
  kernel<<<layout.grid, kThreads, layout.bytes, c10::cuda::getCurrentCUDAStream()>>>(
      map_of<S, T>(logits, size, align_corners, false), layout.lines, label.mutable_data_ptr<uint8_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor upsample_argmax(const at::Tensor& logits_, at::IntArrayRef size, bool align_corners) {
  check_logits(logits_, size);
  const c10::cuda::CUDAGuard guard(logits_.device());
  const at::Tensor logits = logits_.contiguous();
  at::Tensor label = at::empty({logits.size(0), size[0], size[1]}, logits.options().dtype(at::kByte));
  if (label.numel() == 0) return label;
  if (logits.scalar_type() == at::kDouble) {
    upsample_argmax_images<double, double>(logits, size, align_corners, label);
  } else {
    with_type_of(logits, [&](auto value) {
      upsample_argmax_images<decltype(value), float>(logits, size, align_corners, label);
    });
  }
  return label;
}

// ---- probabilities --------------------------------------------------------------------------------------------------

__device__ float sum_of(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// One pixel of one map: its softmax, or its values. kept: classes that registers hold, or 0.
template <typename S, int kept, bool tiled>
struct Softmax {
  std::conditional_t<tiled, typename Map<S, float>::PixelOfTile, typename Map<S, float>::Pixel> value;
  int classes;
  bool softmax;
  float top = 0.f, inverse = 1.f, poison = 0.f;  // poison: 0 for finite values alone
  float held[kept > 0 ? kept : 1];

  __device__ Softmax(const Map<S, float>& map, int image, const Place& at, int lines, const float* loaded, bool softmax)
      : value(map.template pixel<tiled>(image, at, lines, loaded)), classes(map.classes), softmax(softmax) {
    top = -INFINITY;
    each([&](int c, float& v) {
      v = value(c);
      poison = fused(v, 0.f, poison);
      top = fmaxf(top, v);
    });
    if (!softmax) return;
    float sum = 0.f;
    each([&](int c, float& v) {
      if (kept == 0) v = value(c);
      v = exp_negative(v - top);
      sum = sum_of(sum, v);
    });
    inverse = 1.f / sum;
  }

  __device__ float operator()(int c) const {
    if (kept > 0) return softmax ? product(held[c], inverse) : held[c];
    return softmax ? product(exp_negative(value(c) - top), inverse) : value(c);
  }

  // With kept, c is a constant in every step, so that held stays in registers.
  template <typename Step>
  __device__ void each(const Step& step) {
    if (kept > 0) {
#pragma unroll
      for (int c = 0; c < kept; ++c) {
        if (c < classes) step(c, held[c]);
      }
    } else {
      for (int c = 0; c < classes; ++c) step(c, held[0]);
    }
  }
};

// Arithmetic is float32, whatever the type: double is rounded first.
Maps without_double(Maps maps) {
  if (maps.logits.scalar_type() != at::kDouble) return maps;
  maps.logits = maps.logits.to(at::kFloat);
  if (maps.flipped) maps.flipped = maps.flipped->to(at::kFloat);
  return maps;
}

template <typename S>
struct Source {
  Map<S, float> straight, mirrored;
  const float* prior;
  bool softmax, flipped;
  int lines;

  Source(const Maps& maps, at::IntArrayRef size, const Layout& layout)
      : straight(map_of<S, float>(maps.logits, size, maps.align_corners, false)),
        mirrored(map_of<S, float>(maps.flipped.value_or(maps.logits), size, maps.align_corners, true)),
        prior(maps.prior ? maps.prior->const_data_ptr<float>() : nullptr),
        softmax(!maps.probabilities),
        flipped(maps.flipped.has_value()),
        lines(layout.lines) {}

  __device__ int H() const { return straight.H(); }
  __device__ int W() const { return straight.W(); }

  // Calls visit(c, p_c) for the classes of a pixel of the image, in order; whether everything was finite. All threads
  // of the block must call.
  template <int kept, bool tiled, typename Visit>
  __device__ bool visit(int image, const Place& at, const Visit& visit) const {
    extern __shared__ double shared[];
    float* loaded = reinterpret_cast<float*>(shared);
    float* mirrored_loaded = loaded + straight.classes * lines * kTileWidth;
    if (tiled) {
      straight.load(image, at, lines, loaded);
      if (flipped) mirrored.load(image, at, lines, mirrored_loaded);
      __syncthreads();
    }
    Softmax<S, kept, tiled> p(straight, image, at, lines, loaded, softmax);
    const int area = H() * W(), i = at.y * W() + at.x;
    float poison = p.poison;
    const auto with_prior = [&](int c, float v) {
      if (!prior) return v;
      const float factor = prior[int64_t(c) * area + i];
      poison = fused(factor, 0.f, poison);
      return product(v, factor);
    };
    if (flipped) {
      Softmax<S, kept, tiled> q(mirrored, image, at, lines, mirrored_loaded, softmax);
      poison += q.poison;
      p.each([&](int c, float&) { visit(c, with_prior(c, product(sum_of(p(c), q(c)), 0.5f))); });
    } else {
      p.each([&](int c, float&) { visit(c, with_prior(c, p(c))); });
    }
    return poison == 0.f;
  }
};

// ---- thresholds -----------------------------------------------------------------------------------------------------

// Adds 1 to hist[cell] for each lane whose cell is not negative; lanes of one cell do it together. All lanes must call.
__device__ void add_counts(int64_t* hist, int64_t cell) {
  const unsigned same = __match_any_sync(kAll, static_cast<unsigned long long>(cell));
  if (cell < 0 || __ffs(same) - 1 != static_cast<int>(threadIdx.x % 32)) return;
  atomicAdd(reinterpret_cast<unsigned long long*>(hist) + cell, static_cast<unsigned long long>(__popc(same)));
}

struct Histogram {
  int64_t* counts;
  const int64_t* bins;

  Histogram(at::Tensor& hist, const std::optional<at::Tensor>& bins)
      : counts(hist.mutable_data_ptr<int64_t>()), bins(bins ? bins->const_data_ptr<int64_t>() : nullptr) {}

  __device__ void add(int c, float confidence, bool counts_too) const {
    const int64_t width = bins ? 1 << kBinBits : kBins + 2;
    const int64_t cell = counts_too ? cell_of(confidence, bins ? bins + c : nullptr) : -1;
    add_counts(counts, cell < 0 ? -1 : c * width + cell);
  }
  __device__ void add_invalid(int c, float confidence, bool inside) const {
    const bool invalid = inside && !bins && !is_countable(confidence);
    add_counts(counts, invalid ? c * int64_t(kBins + 2) + kInvalid : -1);
  }
};

template <typename S, int kept, bool tiled>
__global__ void confidence_kernel(Source<S> source, uint8_t* label, float* confidence, int64_t rate, bool own,
                                  Histogram hist) {
  const Place at = place_in<tiled>(source.H(), source.W());
  const int i = at.y * source.W() + at.x;
  const bool sampled = own && at.inside && i % rate == 0;
  float best = 0.f;
  int index = 0;
  const bool finite = source.template visit<kept, tiled>(blockIdx.y, at, [&](int c, float p) {
    if (c == 0 || p > best) best = p, index = c;
    if (own) hist.add(c, p, sampled);
  });
  if (!finite) best = __int_as_float(0x7fffffff);
  hist.add_invalid(index, best, at.inside);
  if (!at.inside) return;
  const int64_t pixel = int64_t(blockIdx.y) * source.H() * source.W() + i;
  label[pixel] = static_cast<uint8_t>(index);
  confidence[pixel] = best;
}

// counts[image][chunk][class] of the labels in chunks of kChunk pixels; one block a chunk.
__global__ void chunk_counts_kernel(const uint8_t* label, int area, int classes, int64_t* counts) {
  __shared__ int found[256];
  for (int c = threadIdx.x; c < 256; c += kChunk) found[c] = 0;
  __syncthreads();
  const int pixel = blockIdx.x * kChunk + threadIdx.x;
  const int c = pixel < area ? label[int64_t(blockIdx.y) * area + pixel] : -1;
  const unsigned same = __match_any_sync(kAll, c);
  if (c >= 0 && __ffs(same) - 1 == static_cast<int>(threadIdx.x % 32)) atomicAdd(found + c, __popc(same));
  __syncthreads();
  int64_t* mine = counts + (int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * classes;
  for (int k = threadIdx.x; k < classes; k += kChunk) mine[k] = found[k];
}

// Counts every rate-th pixel of each class of each image; before[image][chunk][class] pixels of the class precede the
// chunk.
__global__ void sample_kernel(const uint8_t* label, const float* confidence, int area, int classes,
                              const int64_t* before, int64_t rate, Histogram hist) {
  __shared__ int in_warp[kWarps][256];
  for (int k = threadIdx.x; k < kWarps * 256; k += kChunk) in_warp[k / 256][k % 256] = 0;
  __syncthreads();
  const int pixel = blockIdx.x * kChunk + threadIdx.x, warp = threadIdx.x / 32;
  const int64_t i = int64_t(blockIdx.y) * area + pixel;
  const int c = pixel < area ? label[i] : 255;  // no class: at most 255 exist
  const unsigned same = __match_any_sync(kAll, c), earlier = same & ((1u << threadIdx.x % 32) - 1);
  if (earlier == 0) in_warp[warp][c] = __popc(same);
  __syncthreads();
  bool sampled = false;
  if (c < classes) {
    int64_t rank = before[(int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * classes + c] + __popc(earlier);
    for (int w = 0; w < warp; ++w) rank += in_warp[w][c];
    sampled = rank % rate == 0;
  }
  hist.add(sampled ? c : 0, sampled ? confidence[i] : 0.f, sampled);
}

// Without bins, also adds the number of pixels of each class.
void count_images(at::Tensor& hist, const std::optional<at::Tensor>& bins, const at::Tensor& label,
                  const at::Tensor& confidence, int64_t rate, bool sample) {
  const int64_t N = label.size(0), C = hist.size(0), area = label.size(1) * label.size(2);
  const dim3 grid = grid_for(N, area, kChunk);
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const uint8_t* y = label.const_data_ptr<uint8_t>();
  at::Tensor counts = at::empty({N, (area + kChunk - 1) / kChunk, C}, hist.options());
  chunk_counts_kernel<<<grid, kChunk, 0, stream>>>(y, static_cast<int>(area), static_cast<int>(C),
                                                   counts.mutable_data_ptr<int64_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  if (!bins) hist.select(1, kPixels).add_(counts.sum(at::IntArrayRef({0, 1})));
  if (!sample) return;
  const at::Tensor before = counts.cumsum(1).sub_(counts);
  sample_kernel<<<grid, kChunk, 0, stream>>>(y, confidence.const_data_ptr<float>(), static_cast<int>(area),
                                             static_cast<int>(C), before.const_data_ptr<int64_t>(), rate,
                                             Histogram(hist, bins));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<at::Tensor, at::Tensor> confidence_histogram_(at::Tensor& hist, const std::optional<at::Tensor>& bins,
                                                         const at::Tensor& logits,
                                                         const std::optional<at::Tensor>& flipped,
                                                         const std::optional<at::Tensor>& prior, at::IntArrayRef size,
                                                         bool align_corners, bool probabilities, int64_t rate, bool own,
                                                         bool return_maps) {
  const Maps maps = without_double(checked(logits, flipped, prior, size, align_corners, probabilities));
  check_histogram(hist, bins, logits.size(1), logits.device(), rate);
  const c10::cuda::CUDAGuard guard(logits.device());
  at::Tensor label = at::empty({logits.size(0), size[0], size[1]}, logits.options().dtype(at::kByte));
  at::Tensor confidence = at::empty(label.sizes(), logits.options().dtype(at::kFloat));
  if (label.numel() == 0) return {label, confidence};
  const Layout layout = layout_of<float>(logits, size, align_corners, flipped ? 2 : 1);
  const bool keep = logits.size(1) <= kKept;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  with_type_of(maps.logits, [&](auto value) {
    using S = decltype(value);
    const auto direct = keep ? confidence_kernel<S, kKept, false> : confidence_kernel<S, 0, false>;
    const auto tiled = keep ? confidence_kernel<S, kKept, true> : confidence_kernel<S, 0, true>;
    const auto kernel = layout.lines ? tiled : direct;
    kernel<<<layout.grid, kThreads, layout.bytes, stream>>>(
        Source<S>(maps, size, layout), label.mutable_data_ptr<uint8_t>(), confidence.mutable_data_ptr<float>(), rate,
        own, Histogram(hist, bins));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  count_images(hist, bins, label, confidence, rate, !own);
  if (!return_maps) label = label.new_empty({0}), confidence = confidence.new_empty({0});
  return {label, confidence};
}

void refine_from_maps_(at::Tensor& fine, const at::Tensor& bins, const at::Tensor& label, const at::Tensor& confidence,
                       int64_t rate) {
  check_histogram(fine, bins, fine.size(0), label.device(), rate);
  const Known known = checked(label, confidence, label.device());
  const c10::cuda::CUDAGuard guard(label.device());
  if (label.numel()) count_images(fine, bins, known.label, known.confidence, rate, true);
}

// ---- labels ---------------------------------------------------------------------------------------------------------

template <typename S, int kept, bool tiled>
__global__ void pseudo_label_kernel(Source<S> source, const float* thresholds, uint8_t* label) {
  const Place at = place_in<tiled>(source.H(), source.W());
  float best = 0.f;
  int index = kIgnore;
  const bool finite = source.template visit<kept, tiled>(blockIdx.y, at, [&](int c, float p) {
    const float ratio = p / thresholds[c];  // IEEE, as nvcc divides without -use_fast_math
    if (ratio > best) best = ratio, index = c;
  });
  if (!at.inside) return;
  label[(int64_t(blockIdx.y) * source.H() + at.y) * source.W() + at.x] =
      finite && best >= 1.f ? static_cast<uint8_t>(index) : kIgnore;
}

at::Tensor pseudo_label(const at::Tensor& logits, const at::Tensor& thresholds_,
                        const std::optional<at::Tensor>& flipped, const std::optional<at::Tensor>& prior,
                        const std::optional<at::Tensor>& known_label, const std::optional<at::Tensor>& known_confidence,
                        at::IntArrayRef size, bool align_corners, bool probabilities) {
  const Maps maps = without_double(checked(logits, flipped, prior, size, align_corners, probabilities));
  checked(known_label, known_confidence, logits, size);  // and not used: the logits tell as much
  check_thresholds(thresholds_, logits);
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor thresholds = thresholds_.contiguous();
  at::Tensor label = at::empty({logits.size(0), size[0], size[1]}, logits.options().dtype(at::kByte));
  if (label.numel() == 0) return label;
  const Layout layout = layout_of<float>(logits, size, align_corners, flipped ? 2 : 1);
  const bool keep = logits.size(1) <= kKept;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  with_type_of(maps.logits, [&](auto value) {
    using S = decltype(value);
    const auto direct = keep ? pseudo_label_kernel<S, kKept, false> : pseudo_label_kernel<S, 0, false>;
    const auto tiled = keep ? pseudo_label_kernel<S, kKept, true> : pseudo_label_kernel<S, 0, true>;
    const auto kernel = layout.lines ? tiled : direct;
    kernel<<<layout.grid, kThreads, layout.bytes, stream>>>(
        Source<S>(maps, size, layout), thresholds.const_data_ptr<float>(), label.mutable_data_ptr<uint8_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return label;
}

}  // namespace
}  // namespace segadapt

TORCH_LIBRARY_IMPL(segadapt, CUDA, m) {
  m.impl("upsample_argmax", segadapt::upsample_argmax);
  m.impl("confidence_histogram_", segadapt::confidence_histogram_);
  m.impl("refine_from_maps_", segadapt::refine_from_maps_);
  m.impl("pseudo_label", segadapt::pseudo_label);
}
