// Cycle association on CUDA: float32 products through at::mm in row panels, simple kernels for what follows them.
#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <limits>

namespace segadapt {
namespace {

using at::Tensor;

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int64_t kPanelRows = 1024;
constexpr unsigned kAll = 0xffffffffu;

// Float64 dot product by one warp, in the order of csrc/cpu/argmax.h: lane l < 16 sums k mod 16 = l. Every lane gets
// it.
template <class T>
__device__ double exact_dot(const T* x, const T* y, int64_t c) {
  const int lane = threadIdx.x % 32;
  double sum = 0;
  if (lane < 16)
    for (int64_t k = lane; k < c; k += 16) sum = __dadd_rn(sum, __dmul_rn(double(x[k]), double(y[k])));
  for (int step = 8; step; step /= 2) sum = __dadd_rn(sum, __shfl_down_sync(kAll, sum, step));
  return __shfl_sync(kAll, sum, 0);
}

template <class T>
__global__ void norm_kernel(const T* x, int64_t n, int64_t c, T* norm) {
  const int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (i >= n) return;
  const double square = exact_dot<T>(x + i * c, x + i * c, c);
  if (threadIdx.x % 32 == 0) norm[i] = T(sqrt(square));
}

// One side of the product and what is known of its rows' maxima so far.
template <class T>
struct View {
  const T *x, *margin;
  T* best;        // the largest tile value
  double* exact;  // the largest float64 value, and where
  int64_t* index;
  int64_t n;
};

template <class T>
__device__ void keep(const View<T>& mine, int64_t i, double value, int64_t j) {
  if (value > mine.exact[i] || (value == mine.exact[i] && j < mine.index[i])) mine.exact[i] = value, mine.index[i] = j;
}

// A warp for each row of the panel s [rows, cols.n]: the maximum, then float64 for all that the margin does not
// exclude.
template <class T>
__global__ void row_kernel(const T* s, int64_t row0, int64_t count, View<T> rows, View<T> cols, int64_t c) {
  const int64_t r = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, i = row0 + r;
  const int lane = threadIdx.x % 32;
  if (r >= count) return;
  const T* p = s + r * cols.n;
  T top = -INFINITY;
  for (int64_t j = lane; j < cols.n; j += 32) top = max(top, p[j]);
  for (int step = 16; step; step /= 2) top = max(top, __shfl_xor_sync(kAll, top, step));
  const T limit = top - rows.margin[i];
  for (int64_t j0 = 0; j0 < cols.n; j0 += 32) {
    const int64_t j = j0 + lane;
    unsigned hits = __ballot_sync(kAll, j < cols.n && p[j] >= limit);
    for (; hits; hits &= hits - 1) {
      const int64_t at = j0 + __ffs(hits) - 1;
      const double value = exact_dot<T>(rows.x + i * c, cols.x + at * c, c);
      if (lane == 0) keep(rows, i, value, at);
    }
  }
}

// The same for columns: a lane for each column goes down the panel, the warp scores the candidates of its 32 columns.
template <class T>
__global__ void col_kernel(const T* s, int64_t row0, int64_t count, View<T> rows, View<T> cols, int64_t c) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int lane = threadIdx.x % 32;
  const bool inside = j < cols.n;
  const int64_t col = inside ? j : cols.n - 1;
  T top = cols.best[col];
  for (int64_t r = 0; r < count; r++) top = max(top, s[r * cols.n + col]);
  const T limit = top - cols.margin[col];
  for (int64_t r = 0; r < count; r++) {
    const int64_t i = row0 + r;
    unsigned hits = __ballot_sync(kAll, inside && s[r * cols.n + col] >= limit);
    for (; hits; hits &= hits - 1) {
      const int from = __ffs(hits) - 1;
      const int64_t at = j - lane + from;
      const double value = exact_dot<T>(cols.x + at * c, rows.x + i * c, c);
      if (lane == from) keep(cols, at, value, i);
    }
  }
  if (inside) cols.best[col] = top;
}

template <class T>
struct Side {
  Tensor x, length, margin, best, exact, index;
  View<T> view() const {
    return {x.template const_data_ptr<T>(),
            margin.template const_data_ptr<T>(),
            best.template mutable_data_ptr<T>(),
            exact.template mutable_data_ptr<double>(),
            index.template mutable_data_ptr<int64_t>(),
            x.size(0)};
  }
};

template <class T>
Side<T> make_side(const Tensor& input, bool normalise, const char* name) {
  Side<T> side;
  side.x = input.contiguous();
  const int64_t n = input.size(0);
  const auto norm = at::empty({n}, input.options());
  norm_kernel<T><<<(n + kWarps - 1) / kWarps, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      side.x.template const_data_ptr<T>(), n, input.size(1), norm.template mutable_data_ptr<T>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  TORCH_CHECK_VALUE(at::isfinite(norm).all().item<bool>(), name, " holds NaN, infinite or overflowing values");
  const auto positive = norm > 0;
  if (normalise) {  // the panels hold products of unit vectors, whatever the range of the input
    side.x = side.x / at::where(positive, norm, at::ones_like(norm)).unsqueeze(1);
    side.length = positive.to(norm.scalar_type());
  } else {
    side.length = norm;
  }
  side.best = at::full({n}, -std::numeric_limits<double>::infinity(), input.options());
  side.exact = at::full({n}, -std::numeric_limits<double>::infinity(), input.options().dtype(at::kDouble));
  side.index = at::zeros({n}, input.options().dtype(at::kLong));
  return side;
}

// by_col as well as by_row, or by_row alone. The margin is that of csrc/cpu/argmax.h.
template <class T>
void scan(Side<T>& x, Side<T>& y, bool both) {
  const at::NoTF32Guard full_precision;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t c = x.x.size(1), n = x.x.size(0), m = y.x.size(0);
  const double unit = 2.001 * double(c + 16) * double(std::numeric_limits<T>::epsilon()) / 2;
  x.margin = x.length * y.length.max() * unit;
  y.margin = y.length * x.length.max() * unit;
  const auto panel = at::empty({std::min(n, kPanelRows), m}, x.x.options());
  for (int64_t i = 0; i < n; i += kPanelRows) {
    const int64_t rows = std::min(n - i, kPanelRows);
    auto out = panel.narrow(0, 0, rows);
    at::mm_out(out, x.x.narrow(0, i, rows), y.x.t());
    const T* s = panel.template const_data_ptr<T>();
    row_kernel<T><<<(rows + kWarps - 1) / kWarps, kThreads, 0, stream>>>(s, i, rows, x.view(), y.view(), c);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    if (!both) continue;
    col_kernel<T><<<(m + kThreads - 1) / kThreads, kThreads, 0, stream>>>(s, i, rows, x.view(), y.view(), c);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

void check_rows(const Tensor& a, const Tensor& b, const char* name) {
  TORCH_CHECK_VALUE(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(1) && a.size(0) > 0 && b.size(0) > 0, name,
                    ": expected [N1, C] and [N2, C] with rows, got ", a.sizes(), " and ", b.sizes());
  TORCH_CHECK_VALUE(a.scalar_type() == b.scalar_type() && a.device() == b.device(), name, ": dtypes or devices differ");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mutual_argmax(const Tensor& a, const Tensor& b) {
  check_rows(a, b, "mutual_argmax");
  const c10::cuda::CUDAGuard guard(a.device());
  std::tuple<Tensor, Tensor, Tensor, Tensor> result;
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "mutual_argmax", [&] {
    auto x = make_side<scalar_t>(a, true, "mutual_argmax: a"), y = make_side<scalar_t>(b, true, "mutual_argmax: b");
    scan(x, y, true);
    result = {x.index, x.exact.to(a.scalar_type()), y.index, y.exact.to(b.scalar_type())};
  });
  return result;
}

Tensor product_argmax(const Tensor& x, const Tensor& y) {
  check_rows(x, y, "product_argmax");
  const c10::cuda::CUDAGuard guard(x.device());
  Tensor index;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "product_argmax", [&] {
    auto left = make_side<scalar_t>(x, false, "product_argmax: x"),
         right = make_side<scalar_t>(y, false, "product_argmax: y");
    scan(left, right, false);
    index = left.index;
  });
  return index;
}

struct Add {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// Over the block, in a fixed tree; every thread gets the result.
template <class T, class F>
__device__ T reduce(T value, F combine) {
  __shared__ T part[kThreads];
  part[threadIdx.x] = value;
  __syncthreads();
  for (int step = kThreads / 2; step; step /= 2) {
    if (threadIdx.x < step) part[threadIdx.x] = combine(part[threadIdx.x], part[threadIdx.x + step]);
    __syncthreads();
  }
  value = part[0];
  __syncthreads();
  return value;
}

template <class T>
__global__ void softmax_kernel(T* s, const T* scale, int64_t n, bool contrast, T eps, T* inverse) {
  T* row = s + int64_t(blockIdx.x) * n;
  T top = -INFINITY, size = 0, sum = 0;
  for (int64_t j = threadIdx.x; j < n; j += kThreads) {
    const T v = row[j] = scale ? row[j] * scale[j] : row[j];
    top = max(top, v), size = max(size, abs(v)), sum += v;
  }
  top = reduce(top, Max());
  T inv = 1;
  if (contrast) {
    size = reduce(size, Max());
    const T mean = reduce(sum, Add()) / T(n);
    T square = 0;
    for (int64_t j = threadIdx.x; j < n; j += kThreads) square += (row[j] - mean) * (row[j] - mean);
    const T sigma = n > 1 ? sqrt(reduce(square, Add()) / T(n - 1)) : T(0);
    inv = sigma > 8 * eps * size ? 1 / (sigma + T(1e-10)) : T(0);
  }
  T total = 0;
  for (int64_t j = threadIdx.x; j < n; j += kThreads) total += row[j] = exp((row[j] - top) * inv);
  total = 1 / reduce(total, Add());
  for (int64_t j = threadIdx.x; j < n; j += kThreads) row[j] *= total;
  if (threadIdx.x == 0) inverse[blockIdx.x] = inv;
}

Tensor contrast_softmax_(Tensor& s, const std::optional<Tensor>& col_scale, bool contrast) {
  TORCH_CHECK_VALUE(s.dim() == 2 && s.is_contiguous(), "contrast_softmax_: s must be a contiguous matrix");
  TORCH_CHECK_VALUE(!col_scale || col_scale->numel() == s.size(1),
                    "contrast_softmax_: one scale for each column expected");
  const c10::cuda::CUDAGuard guard(s.device());
  const auto scale = col_scale ? col_scale->to(s.scalar_type()).contiguous() : Tensor();
  auto inverse = at::empty({s.size(0)}, s.options());
  if (s.numel() == 0) return inverse;
  AT_DISPATCH_FLOATING_TYPES(s.scalar_type(), "contrast_softmax_", [&] {
    softmax_kernel<scalar_t><<<s.size(0), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        s.mutable_data_ptr<scalar_t>(), scale.defined() ? scale.const_data_ptr<scalar_t>() : nullptr, s.size(1),
        contrast, std::numeric_limits<scalar_t>::epsilon(), inverse.mutable_data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return inverse;
}

template <class T>
__global__ void col_sum_kernel(const T* m, const T* p, int64_t rows, int64_t n, T* col_sum) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= n) return;
  T sum = 0;
  for (int64_t i = 0; i < rows; i++) sum += m[i * n + j] * p[i * n + j];
  col_sum[j] += sum;
}

template <class T>
__global__ void softmax_grad_kernel(T* m, const T* p, int64_t n, const T* row_scale, const T* col_scale) {
  T* x = m + int64_t(blockIdx.x) * n;
  const T* q = p + int64_t(blockIdx.x) * n;
  T sum = 0;
  for (int64_t j = threadIdx.x; j < n; j += kThreads) sum += x[j] * q[j];
  sum = reduce(sum, Add());
  for (int64_t j = threadIdx.x; j < n; j += kThreads)
    x[j] = q[j] * (x[j] - sum) * row_scale[blockIdx.x] * (col_scale ? col_scale[j] : T(1));
}

void softmax_grad_(Tensor& m, const Tensor& p, const Tensor& row_scale, const std::optional<Tensor>& col_scale,
                   Tensor& col_sum) {
  const int64_t rows = m.size(0), n = m.size(1);
  TORCH_CHECK_VALUE(m.is_contiguous() && p.is_contiguous() && col_sum.is_contiguous() && m.sizes() == p.sizes() &&
                        row_scale.numel() == rows && col_sum.numel() == n && (!col_scale || col_scale->numel() == n),
                    "softmax_grad_: contiguous tensors of matching sizes expected");
  if (m.numel() == 0) return;
  const c10::cuda::CUDAGuard guard(m.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto row = row_scale.contiguous(), col = col_scale ? col_scale->contiguous() : Tensor();
  AT_DISPATCH_FLOATING_TYPES(m.scalar_type(), "softmax_grad_", [&] {
    col_sum_kernel<scalar_t><<<(n + kThreads - 1) / kThreads, kThreads, 0, stream>>>(
        m.const_data_ptr<scalar_t>(), p.const_data_ptr<scalar_t>(), rows, n, col_sum.mutable_data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    softmax_grad_kernel<scalar_t><<<rows, kThreads, 0, stream>>>(
        m.mutable_data_ptr<scalar_t>(), p.const_data_ptr<scalar_t>(), n, row.const_data_ptr<scalar_t>(),
        col.defined() ? col.const_data_ptr<scalar_t>() : nullptr);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace
}  // namespace segadapt

TORCH_LIBRARY_IMPL(segadapt, CUDA, m) {
  m.impl("mutual_argmax", segadapt::mutual_argmax);
  m.impl("product_argmax", segadapt::product_argmax);
  m.impl("contrast_softmax_", segadapt::contrast_softmax_);
  m.impl("softmax_grad_", segadapt::softmax_grad_);
}
