// Cycle association on CUDA: products through at::mm in row panels, simple kernels for what follows them. See
// lib/ops/association.py for what each operator does.
#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

#include "association.h"
#include "attention.h"
#include "cuda/warp.h"
#include "exponential.h"

namespace segadapt {
namespace {

using at::Tensor;

constexpr int64_t kPanelBytes = 64 << 20;  // of products: a GPU's kernels want millions of values at once
constexpr int64_t kChunkRows = 64;         // of a panel, which a column's thread goes down

// ---- argmax ---------------------------------------------------------------------------------------------------------

// One side of the product on the host; the names are those of csrc/cpu/argmax.h.
template <class T>
struct Side {
  Form form;
  Tensor x;         // [N, C] contiguous: what exact products take, over norm
  Tensor measured;  // norm of the rows of x
  Tensor norm;      // divisor of the exact product
  Tensor first;     // the lowest index of the same values: repetitions share its answer, and are none
  // For panels:
  Tensor tiled;     // what they take: unit vectors, or x brought into the range of products
  Tensor to_tile;   // what turns an exact product into the panel's value
  Tensor length;    // norm of the rows of tiled, or more
  Tensor rounding;  // norm of what rounding them to half took from them
  // What was found:
  Tensor margin, best, exact, index;
  Tensor candidates;  // int32: how many there were
};

// The same in a kernel.
template <class T>
struct View {
  const T *x, *norm, *to_tile, *length, *rounding, *margin;
  const int64_t* first;
  T* best;        // the largest panel value
  double* exact;  // the largest float64 value, and where
  int64_t* index;
  int* candidates;
  int64_t n;
};

template <class T>
View<T> view(const Side<T>& side) {
  return {side.x.template const_data_ptr<T>(),
          side.norm.template const_data_ptr<T>(),
          side.to_tile.template const_data_ptr<T>(),
          side.length.template const_data_ptr<T>(),
          side.rounding.template const_data_ptr<T>(),
          side.margin.template const_data_ptr<T>(),
          side.first.template const_data_ptr<int64_t>(),
          side.best.template mutable_data_ptr<T>(),
          side.exact.template mutable_data_ptr<double>(),
          side.index.template mutable_data_ptr<int64_t>(),
          side.candidates.template mutable_data_ptr<int>(),
          side.x.size(0)};
}

// A warp for each row: its norm and a hash of its bits.
template <class T>
__global__ void measure_kernel(const T* x, int64_t n, int64_t c, T* norm, int64_t* hash) {
  const int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (i >= n) return;
  const double square = exact_dot<T>(x + i * c, T(1), x + i * c, T(1), c);
  const auto* words = reinterpret_cast<const uint32_t*>(x + i * c);
  uint64_t h = 0;
  for (int64_t k = lane; k < c * int64_t(sizeof(T) / 4); k += 32) h = (h ^ words[k]) * 0x9E3779B97F4A7C15u;
  h = (h ^ (h >> 29)) * (2 * lane + 0xBF58476D1CE4E5B9u);
  for (int step = 16; step; step /= 2) h += __shfl_xor_sync(kAll, h, step);
  if (lane == 0) norm[i] = T(sqrt(square)), hash[i] = int64_t(h);
}

// A warp for each row: with the hashes sorted, order[p] being the row of hash sorted[p], the first row of the same hash
// if its values are the same, else the row itself.
template <class T>
__global__ void first_kernel(const T* x, int64_t n, int64_t c, const int64_t* sorted, const int64_t* order,
                             int64_t* first) {
  const int64_t p = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (p >= n) return;
  int64_t low = 0, high = p;  // the first position of this hash
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (sorted[middle] < sorted[p]) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const int64_t i = order[p], other = order[low];
  const auto *mine = reinterpret_cast<const uint32_t*>(x + i * c),
             *theirs = reinterpret_cast<const uint32_t*>(x + other * c);
  bool same = true;
  for (int64_t k = threadIdx.x % 32; k < c * int64_t(sizeof(T) / 4); k += 32) same &= mine[k] == theirs[k];
  const unsigned agree = __ballot_sync(kAll, same);
  if (threadIdx.x % 32 == 0) first[i] = agree == kAll ? other : i;
}

// The power of two that brings a norm between 1 and 2 (a subnormal one as near to it as a factor can); 1 for 0.
template <class T>
__global__ void to_range_kernel(const T* norm, int64_t n, T* factor) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  const int exponent = norm[i] > 0 ? -ilogb(norm[i]) : 0;
  factor[i] = ldexp(T(1), min(exponent, std::numeric_limits<T>::max_exponent - 2));
}

template <class T>
Tensor to_range(const Tensor& norm) {
  const Tensor factor = at::empty_like(norm);
  const int64_t n = norm.numel();
  to_range_kernel<T><<<blocks_for(n, kThreads), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      norm.template const_data_ptr<T>(), n, factor.template mutable_data_ptr<T>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return factor;
}

// Throws ValueError on NaN, infinity and norms that the dtype does not hold.
template <class T>
Side<T> make_side(const Tensor& input, Form form, const char* name) {
  Side<T> side{form, input.contiguous()};
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t n = input.size(0), c = input.size(1);
  const T* x = side.x.template const_data_ptr<T>();
  const Tensor norm = at::empty({n}, input.options()), hash = at::empty({n}, input.options().dtype(at::kLong));
  measure_kernel<T><<<blocks_for(n, kWarps), kThreads, 0, stream>>>(x, n, c, norm.template mutable_data_ptr<T>(),
                                                                    hash.template mutable_data_ptr<int64_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  TORCH_CHECK_VALUE(at::isfinite(norm).all().item<bool>(), name, " holds NaN, infinite or overflowing values");
  const auto [sorted, order] = at::sort(hash, true, 0, false);  // stable
  side.first = at::empty_like(hash);
  first_kernel<T><<<blocks_for(n, kWarps), kThreads, 0, stream>>>(x, n, c, sorted.template const_data_ptr<int64_t>(),
                                                                  order.template const_data_ptr<int64_t>(),
                                                                  side.first.template mutable_data_ptr<int64_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  side.measured = norm;
  side.norm = form == Form::unit ? at::where(norm > 0, norm, 1) : at::ones_like(norm);
  return side;
}

// For panels in T.
template <class T>
void set_tiles(Side<T>& side) {
  const Tensor& norm = side.measured;
  side.rounding = at::zeros_like(norm);
  if (side.form == Form::unit) {
    side.to_tile = at::ones_like(norm);
    side.tiled = side.x / side.norm.unsqueeze(1);
    side.length = (norm > 0).to(norm.scalar_type());
  } else {
    side.to_tile = to_range<T>(side.form == Form::left ? norm : norm.max().expand_as(norm).contiguous());
    side.tiled = side.x * side.to_tile.unsqueeze(1);
    side.length = norm * side.to_tile;
  }
}

// A warp for each row: the unit vector in half, and the norm of what that took from it.
__global__ void to_half_kernel(const float* x, const float* norm, int64_t n, int64_t c, at::Half* tiled,
                               float* rounding) {
  const int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (i >= n) return;
  double square = 0;
  for (int64_t k = i * c + threadIdx.x % 32; k < (i + 1) * c; k += 32) {
    const double value = double(x[k] / norm[i]) * kHalfScale;
    tiled[k] = at::Half(float(value));
    const double taken = value - double(float(tiled[k]));
    square += taken * taken;
  }
  for (int step = 16; step; step /= 2) square += __shfl_xor_sync(kAll, square, step);
  if (threadIdx.x % 32 == 0) rounding[i] = float(1.001 * sqrt(square));
}

// For panels in half, of unit vectors.
void set_half_tiles(Side<float>& side) {
  const int64_t n = side.x.size(0);
  side.tiled = at::empty(side.x.sizes(), side.x.options().dtype(at::kHalf));
  side.rounding = at::empty_like(side.norm);
  to_half_kernel<<<blocks_for(n, kWarps), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      side.x.const_data_ptr<float>(), side.norm.const_data_ptr<float>(), n, side.x.size(1),
      side.tiled.mutable_data_ptr<at::Half>(), side.rounding.mutable_data_ptr<float>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  side.to_tile = at::full_like(side.norm, kHalfScale);
  side.length = (side.measured > 0).to(at::kFloat) * kHalfScale + side.rounding;
}

__device__ void keep(double& exact, int64_t& index, double value, int64_t j) {
  if (value > exact || (value == exact && j < index)) exact = value, index = j;
}

// The exact product of row i of mine and row j of others; sets *imprecise where the panel's value is further from it
// than the margin allows for.
template <class T>
__device__ double rescore(const View<T>& mine, int64_t i, const View<T>& others, int64_t j, T panel_value, int64_t c,
                          double error, int* imprecise) {
  const double value = exact_dot<T>(mine.x + i * c, mine.norm[i], others.x + j * c, others.norm[j], c);
  const double expected = value * double(mine.to_tile[i]) * double(others.to_tile[j]);
  const double bound = error * double(mine.length[i]) * double(others.length[j]) +
                       double(mine.rounding[i]) * double(others.length[j]) +
                       double(mine.length[i]) * double(others.rounding[j]) + double(std::numeric_limits<T>::min());
  if (threadIdx.x % 32 == 0 && abs(double(panel_value) - expected) > bound) atomicAdd(imprecise, 1);
  return value;
}

// A warp for each row of the panel s [rows, cols.n]: the maximum, then float64 for all that the margin does not
// exclude, unless they are more than most. P: type of the panel.
template <class T, class P>
__global__ void row_kernel(const P* s, int64_t row0, int64_t count, View<T> rows, View<T> cols, int64_t c, double error,
                           int most, int* imprecise) {
  const int64_t r = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, i = row0 + r;
  const int lane = threadIdx.x % 32;
  if (r >= count || rows.first[i] != i) return;
  const P* p = s + r * cols.n;
  T top = -INFINITY;
  for (int64_t j = lane; j < cols.n; j += 32) top = max(top, T(p[j]));
  for (int step = 16; step; step /= 2) top = max(top, __shfl_xor_sync(kAll, top, step));
  const T limit = top - rows.margin[i];
  double exact = -INFINITY;
  int64_t index = 0;
  int candidates = 0;
  for (int64_t j0 = 0; j0 < cols.n && candidates <= most; j0 += 32) {
    const int64_t j = j0 + lane;
    unsigned hits = __ballot_sync(kAll, j < cols.n && T(p[j]) >= limit && cols.first[j] == j);
    candidates += __popc(hits);
    for (; hits && candidates <= most; hits &= hits - 1) {
      const int64_t at = j0 + __ffs(hits) - 1;
      keep(exact, index, rescore(rows, i, cols, at, T(p[at]), c, error, imprecise), at);
    }
  }
  if (lane > 0) return;
  keep(rows.exact[i], rows.index[i], exact, index);
  rows.candidates[i] = candidates;
}

// The panel's maxima by column, for each chunk of kChunkRows rows: top [chunks, cols].
template <class T, class P>
__global__ void col_top_kernel(const P* s, int64_t count, int64_t cols, T* top) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x, chunk = blockIdx.y;
  if (j >= cols) return;
  T highest = -INFINITY;
  for (int64_t r = chunk * kChunkRows; r < min(count, (chunk + 1) * kChunkRows); r++) {
    highest = max(highest, T(s[r * cols + j]));
  }
  top[chunk * cols + j] = highest;
}

// The same grid again: a lane for each column goes down its chunk, the warp scores the candidates of its 32 columns.
// exact, index [chunks, cols]: each chunk's best.
template <class T, class P>
__global__ void col_kernel(const P* s, int64_t row0, int64_t count, View<T> rows, View<T> cols, int64_t c, double error,
                           int most, const T* top, int64_t chunks, double* exact, int64_t* index, int* imprecise) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x, chunk = blockIdx.y;
  const int lane = threadIdx.x % 32;
  const bool inside = j < cols.n && cols.first[min(j, cols.n - 1)] == j;
  const int64_t col = min(j, cols.n - 1);
  T highest = cols.best[col];
  for (int64_t k = 0; k < chunks; k++) highest = max(highest, top[k * cols.n + col]);
  const T limit = highest - cols.margin[col];
  double my_exact = -INFINITY;
  int64_t my_index = 0;
  for (int64_t r = chunk * kChunkRows; r < min(count, (chunk + 1) * kChunkRows); r++) {
    const int64_t i = row0 + r;
    const T value = s[r * cols.n + col];
    bool hit = inside && value >= limit && rows.first[i] == i;
    if (hit) hit = atomicAdd(cols.candidates + col, 1) < most;
    unsigned hits = __ballot_sync(kAll, hit);
    for (; hits; hits &= hits - 1) {
      const int from = __ffs(hits) - 1;
      const T its_value = __shfl_sync(kAll, value, from);
      const double product = rescore(cols, j - lane + from, rows, i, its_value, c, error, imprecise);
      if (lane == from) keep(my_exact, my_index, product, i);
    }
  }
  if (j < cols.n) exact[chunk * cols.n + j] = my_exact, index[chunk * cols.n + j] = my_index;
}

// Adds the chunks' results to the columns'.
template <class T>
__global__ void col_merge_kernel(View<T> cols, const T* top, const double* exact, const int64_t* index,
                                 int64_t chunks) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= cols.n) return;
  for (int64_t k = 0; k < chunks; k++) {
    cols.best[j] = max(cols.best[j], top[k * cols.n + j]);
    keep(cols.exact[j], cols.index[j], exact[k * cols.n + j], index[k * cols.n + j]);
  }
}

template <class T>
void start_scan(Side<T>& mine, const Side<T>& others, double error) {
  const Tensor &x = mine.x, lowest = at::full({x.size(0)}, -std::numeric_limits<double>::infinity(), x.options());
  const Tensor longest = others.length.max(), most_rounded = others.rounding.max();
  mine.margin = (mine.length * longest * error + mine.rounding * longest + mine.length * most_rounded) * kPair;
  mine.best = lowest;
  mine.exact = lowest.to(at::kDouble, false, true);
  mine.index = at::zeros({x.size(0)}, x.options().dtype(at::kLong));
  mine.candidates = at::zeros({x.size(0)}, x.options().dtype(at::kInt));
}

// by_col as well as by_row, or by_row alone, from tiles and panels of type P; what has more than most candidates is
// left to do. False when a panel was less precise than the error: cuBLAS may have been told elsewhere to use TF32 in
// spite of the guard, or to add up in half.
template <class T, class P>
bool scan_panels(Side<T>& x, Side<T>& y, bool both, double error, int most) {
  const at::NoTF32Guard full_precision;
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const int64_t c = x.x.size(1), n = x.x.size(0), m = y.x.size(0);
  start_scan(x, y, error);
  start_scan(y, x, error);
  const int64_t panel_rows = std::clamp<int64_t>(kPanelBytes / (m * int64_t(sizeof(P))), 1, n);
  const int64_t chunks = blocks_for(panel_rows, kChunkRows), col_blocks = blocks_for(m, kThreads);
  const Tensor panel = at::empty({panel_rows, m}, x.tiled.options()),
               imprecise = at::zeros({1}, x.x.options().dtype(at::kInt));
  const Tensor top = both ? at::empty({chunks, m}, x.x.options()) : Tensor();
  const Tensor exact = both ? at::empty({chunks, m}, y.exact.options()) : Tensor();
  const Tensor index = both ? at::empty({chunks, m}, y.index.options()) : Tensor();
  const P* s = panel.template const_data_ptr<P>();
  int* flag = imprecise.template mutable_data_ptr<int>();
  for (int64_t i = 0; i < n; i += panel_rows) {
    const int64_t rows = std::min(n - i, panel_rows), used = blocks_for(rows, kChunkRows);
    auto out = panel.narrow(0, 0, rows);
    at::mm_out(out, x.tiled.narrow(0, i, rows), y.tiled.t());
    row_kernel<T, P>
        <<<blocks_for(rows, kWarps), kThreads, 0, stream>>>(s, i, rows, view(x), view(y), c, error, most, flag);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    if (!both) continue;
    const dim3 grid(col_blocks, used);
    T* tops = top.template mutable_data_ptr<T>();
    double* best = exact.template mutable_data_ptr<double>();
    int64_t* at = index.template mutable_data_ptr<int64_t>();
    col_top_kernel<T, P><<<grid, kThreads, 0, stream>>>(s, rows, m, tops);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    col_kernel<T, P>
        <<<grid, kThreads, 0, stream>>>(s, i, rows, view(x), view(y), c, error, most, tops, used, best, at, flag);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    col_merge_kernel<T><<<col_blocks, kThreads, 0, stream>>>(view(y), tops, best, at, used);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return imprecise.item<int>() == 0;
}

template <class T>
void scan(Side<T>& x, Side<T>& y, bool both) {
  const int64_t c = x.x.size(1);
  set_tiles(x);
  set_tiles(y);
  if (scan_panels<T, T>(x, y, both, product_error<T>(c, false), INT32_MAX)) return;
  scan_panels<T, T>(x, y, both, product_error<T>(c, true), INT32_MAX);
}

// What scan_panels has left to do of mine.
template <class T>
void scan_crowded(Side<T>& mine, Side<T> others, int most) {
  const Tensor rows = (mine.candidates > most).nonzero().squeeze(1);
  if (rows.numel() == 0) return;
  Side<T> few{mine.form, mine.x.index_select(0, rows), mine.measured.index_select(0, rows),
              mine.norm.index_select(0, rows), at::arange(rows.numel(), rows.options())};
  scan(few, others, false);
  mine.exact.index_copy_(0, rows, few.exact);
  mine.index.index_copy_(0, rows, few.index);
}

// Both ways, with candidates from panels in half. False where those are of no use, or were less precise than the error.
bool scan_in_half(Side<float>& x, Side<float>& y) {
  const int64_t c = x.x.size(1);
  if (c < kMinHalfChannels || c > kMaxHalfChannels) return false;
  set_half_tiles(x);
  set_half_tiles(y);
  if (!scan_panels<float, at::Half>(x, y, true, half_product_error(c), kMaxHalfCandidates)) return false;
  scan_crowded(x, y, kMaxHalfCandidates);
  scan_crowded(y, x, kMaxHalfCandidates);
  return true;
}
bool scan_in_half(Side<double>&, Side<double>&) { return false; }

template <class T>
std::tuple<Tensor, Tensor> result(const Side<T>& side) {
  return {side.index.index_select(0, side.first), side.exact.index_select(0, side.first).to(side.x.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mutual_argmax(const Tensor& a, const Tensor& b) {
  check_rows(a, b, "mutual_argmax");
  const c10::cuda::CUDAGuard guard(a.device());
  std::tuple<Tensor, Tensor, Tensor, Tensor> found;
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "mutual_argmax", [&] {
    auto x = make_side<scalar_t>(a, Form::unit, "mutual_argmax: a"),
         y = make_side<scalar_t>(b, Form::unit, "mutual_argmax: b");
    if (!scan_in_half(x, y)) scan(x, y, true);
    found = std::tuple_cat(result(x), result(y));
  });
  return found;
}

Tensor product_argmax(const Tensor& x, const Tensor& y) {
  check_rows(x, y, "product_argmax");
  const c10::cuda::CUDAGuard guard(x.device());
  Tensor index;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "product_argmax", [&] {
    auto left = make_side<scalar_t>(x, Form::left, "product_argmax: x"),
         right = make_side<scalar_t>(y, Form::right, "product_argmax: y");
    scan(left, right, false);
    index = std::get<0>(result(left));
  });
  return index;
}

// ---- softmax of panels ----------------------------------------------------------------------------------------------

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
__device__ T deviation_of(const T* row, int64_t n, T mean) {  // unbiased; n > 1
  T squares = 0;
  for (int64_t j = threadIdx.x; j < n; j += kThreads) squares += (row[j] - mean) * (row[j] - mean);
  return sqrt(reduce(squares, Add()) / T(n - 1));
}

// A block for each row.
template <class T>
__global__ void softmax_kernel(T* s, const T* scale, int64_t n, bool contrast, T* inverse) {
  T* row = s + int64_t(blockIdx.x) * n;
  T top = -INFINITY, bottom = INFINITY, sum = 0;
  for (int64_t j = threadIdx.x; j < n; j += kThreads) {
    const T v = row[j] = scale ? row[j] * scale[j] : row[j];
    top = max(top, v), bottom = min(bottom, v), sum += v;
  }
  top = reduce(top, Max());
  T inv = 1;
  if (contrast) {
    bottom = -reduce(-bottom, Max());
    const T mean = reduce(sum, Add()) / T(n);
    inv = is_constant(top, bottom) ? T(0) : 1 / (deviation_of(row, n, mean) + T(kSigmaEpsilon));
  }
  T total = 0;
  for (int64_t j = threadIdx.x; j < n; j += kThreads) total += row[j] = exp_negative((row[j] - top) * inv);
  total = 1 / reduce(total, Add());
  for (int64_t j = threadIdx.x; j < n; j += kThreads) row[j] *= total;
  if (threadIdx.x == 0) inverse[blockIdx.x] = inv;
}

Tensor contrast_softmax_(Tensor& s, const std::optional<Tensor>& col_scale, bool contrast) {
  check_panel(s, "contrast_softmax_: s");
  const c10::cuda::CUDAGuard guard(s.device());
  const Tensor scale = checked_scale(col_scale, s);
  auto inverse = at::empty({s.size(0)}, s.options());
  if (s.numel() == 0) return inverse.zero_();
  AT_DISPATCH_FLOATING_TYPES(s.scalar_type(), "contrast_softmax_", [&] {
    softmax_kernel<scalar_t><<<s.size(0), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        s.mutable_data_ptr<scalar_t>(), scale.defined() ? scale.const_data_ptr<scalar_t>() : nullptr, s.size(1),
        contrast, inverse.mutable_data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return inverse;
}

template <class T>
__global__ void softmax_grad_kernel(T* m, const T* p, int64_t n, const T* row_scale) {
  T* x = m + int64_t(blockIdx.x) * n;
  const T* q = p + int64_t(blockIdx.x) * n;
  T sum = 0;
  for (int64_t j = threadIdx.x; j < n; j += kThreads) sum += x[j] * q[j];
  sum = reduce(sum, Add());
  for (int64_t j = threadIdx.x; j < n; j += kThreads) x[j] = q[j] * (x[j] - sum) * row_scale[blockIdx.x];
}

void softmax_grad_(Tensor& m, const Tensor& p, const Tensor& row_scale) {
  check_softmax_grad(m, p, row_scale);
  const c10::cuda::CUDAGuard guard(m.device());
  const Tensor row = row_scale.contiguous();
  if (m.numel() == 0) return;
  AT_DISPATCH_FLOATING_TYPES(m.scalar_type(), "softmax_grad_", [&] {
    softmax_grad_kernel<scalar_t><<<m.size(0), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        m.mutable_data_ptr<scalar_t>(), p.const_data_ptr<scalar_t>(), m.size(1), row.const_data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

// ---- attention ------------------------------------------------------------------------------------------------------

template <class T>
__device__ AttentionRow<T> attention_row(const T* stats, int64_t n, int64_t j) {
  return {stats[j], stats[n + j], stats[2 * n + j], stats[3 * n + j], stats[4 * n + j]};
}

// part [chunks, n]: sums of A_ij x_ij over the rows of each chunk, added up in order afterwards.
template <class T>
__global__ void attention_col_sum_kernel(const T* s, const T* x, int64_t rows, int64_t n, const T* row_stats,
                                         const T* col_scale, T* part) {
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x, chunk = blockIdx.y;
  if (j >= n) return;
  T sum = 0;
  for (int64_t i = chunk * kChunkRows; i < min(rows, (chunk + 1) * kChunkRows); i++)
    sum += attention_row(row_stats, rows, i).attention(s[i * n + j] * col_scale[j]) * x[i * n + j];
  part[chunk * n + j] = sum;
}

// A block for each row.
template <class T>
__global__ void attention_grad_kernel(T* s, T* x, T* y, int64_t rows, int64_t n, const T* row_stats, const T* col_stats,
                                      T* row_sum) {
  const AttentionRow<T> here = attention_row(row_stats, rows, blockIdx.x);
  const int64_t start = int64_t(blockIdx.x) * n;
  T sum = 0;
  for (int64_t j = threadIdx.x; j < n; j += kThreads) {
    const AttentionRow<T> there = attention_row(col_stats, n, j);
    const T cosine = s[start + j] * there.scale, x_ij = x[start + j], y_ij = y[start + j];
    const T a = here.attention(cosine), b = there.attention(cosine);
    sum += b * y_ij;
    s[start + j] = here.scale * there.scale * (here.gradient(a, x_ij) + there.gradient(b, y_ij));
    x[start + j] = a;
    y[start + j] = b;
  }
  sum = reduce(sum, Add());
  if (threadIdx.x == 0) row_sum[blockIdx.x] = sum;
}

std::tuple<Tensor, Tensor> attention_grad_(Tensor& s, Tensor& x, Tensor& y, const Tensor& rows, const Tensor& cols) {
  check_attention_grad(s, x, y, rows, cols);
  const c10::cuda::CUDAGuard guard(s.device());
  const int64_t r = s.size(0), n = s.size(1), chunks = blocks_for(r, kChunkRows);
  TORCH_CHECK_VALUE(chunks <= 65535, "attention_grad_: too many rows for one panel");
  auto row_sum = at::zeros({r}, s.options());
  if (s.numel() == 0) return {row_sum, at::zeros({n}, s.options())};
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const Tensor part = at::empty({chunks, n}, s.options());
  AT_DISPATCH_FLOATING_TYPES(s.scalar_type(), "attention_grad_", [&] {
    const auto *row = rows.const_data_ptr<scalar_t>(), *col = cols.const_data_ptr<scalar_t>();
    const dim3 grid(blocks_for(n, kThreads), chunks);
    attention_col_sum_kernel<scalar_t><<<grid, kThreads, 0, stream>>>(s.const_data_ptr<scalar_t>(),
                                                                      x.const_data_ptr<scalar_t>(), r, n, row,
                                                                      col + 4 * n, part.mutable_data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    attention_grad_kernel<scalar_t><<<r, kThreads, 0, stream>>>(
        s.mutable_data_ptr<scalar_t>(), x.mutable_data_ptr<scalar_t>(), y.mutable_data_ptr<scalar_t>(), r, n, row, col,
        row_sum.mutable_data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {row_sum, part.sum(0)};
}

}  // namespace
}  // namespace segadapt

TORCH_LIBRARY_IMPL(segadapt, CUDA, m) {
  m.impl("mutual_argmax", segadapt::mutual_argmax);
  m.impl("product_argmax", segadapt::product_argmax);
  m.impl("contrast_softmax_", segadapt::contrast_softmax_);
  m.impl("softmax_grad_", segadapt::softmax_grad_);
  m.impl("attention_grad_", segadapt::attention_grad_);
}
