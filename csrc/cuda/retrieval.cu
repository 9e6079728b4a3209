// Ranks and nearest lists on CUDA: float32 products through at::mm in tiles, warps that count and rescore. The truth
// and the error bound: csrc/retrieval.h.
#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cmath>

#include "cuda/warp.h"
#include "retrieval.h"

namespace segadapt {
namespace {

using at::Tensor;

constexpr int64_t kTileRows = 1024, kTileCols = 4096;  // 16 MB of float32 a piece

template <class T>
struct View {
  const T* x;
  const double* square;
  int64_t n, c;
};

// d of one pair, by one warp.
template <class T>
__device__ double distance(const View<T>& x, int64_t i, const View<T>& y, int64_t j) {
  const double dot = exact_dot<T>(x.x + i * x.c, 1, y.x + j * y.c, 1, x.c);
  const double d = __dadd_rn(__dadd_rn(x.square[i], y.square[j]), -2 * dot);
  return d > kFloor ? d : kFloor;
}

template <class T>
__global__ void square_kernel(const T* x, int64_t n, int64_t c, double* square) {
  const int64_t i = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (i >= n) return;
  const double s = exact_dot<T>(x + i * c, 1, x + i * c, 1, c);
  if (threadIdx.x % 32 == 0) square[i] = s;
}

template <class T>
__global__ void pair_kernel(View<T> x, View<T> y, const int64_t* i, const int64_t* j, int64_t count, double* d) {
  const int64_t p = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (p >= count) return;
  const double value = distance(x, i[p], y, j[p]);
  if (threadIdx.x % 32 == 0) d[p] = value;
}

template <class T>
struct Points {
  Tensor x, square;    // [N, C] contiguous, [N] float64
  double longest = 0;  // max |x|
  View<T> view() const {
    return {x.template const_data_ptr<T>(), square.template const_data_ptr<double>(), x.size(0), x.size(1)};
  }
};

template <class T>
Points<T> make_points(const Tensor& input, const char* name) {
  const int64_t n = input.size(0);
  Points<T> points{input.contiguous(), at::empty({n}, input.options().dtype(at::kDouble))};
  if (n == 0) return points;
  square_kernel<T><<<blocks_for(n, kWarps), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      points.x.template const_data_ptr<T>(), n, input.size(1), points.square.template mutable_data_ptr<double>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  const double most = points.square.max().item().toDouble();  // NaN if there is one
  TORCH_CHECK_VALUE(std::isfinite(most), name, " hold NaN or infinite values");
  points.longest = std::sqrt(most);
  return points;
}

template <class T>
Tensor pairs(const Points<T>& x, const Points<T>& y, const Tensor& i, const Tensor& j) {
  auto d = at::empty({i.size(0)}, x.square.options());
  if (i.size(0) == 0) return d;
  const auto rows = i.contiguous(), cols = j.contiguous();
  pair_kernel<T><<<blocks_for(i.size(0), kWarps), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      x.view(), y.view(), rows.const_data_ptr<int64_t>(), cols.const_data_ptr<int64_t>(), i.size(0),
      d.template mutable_data_ptr<double>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return d;
}

// A tile of products in pieces [pieces, rows, ld], whose corner is (row0, col0).
template <class T>
struct Tile {
  const T* piece;
  int64_t pieces, stride, ld, row0, col0, rows, cols;
  // t of the header, for row r and column j of the tile
  __device__ T operator()(int64_t r, int64_t j, double square) const {
    T sum = piece[r * ld + j];
    for (int64_t k = 1; k < pieces; k++) sum += piece[k * stride + r * ld + j];
    return T(square) - 2 * sum;
  }
};

template <class T, class F>
void for_each_tile(const Points<T>& x, const Points<T>& y, const F& use) {
  const at::NoTF32Guard full_precision;
  const int64_t n = x.x.size(0), m = y.x.size(0), c = x.x.size(1), pieces = (c + kDepth - 1) / kDepth;
  const int64_t rows_most = std::min(n, kTileRows), ld = std::min(m, kTileCols);
  const auto buffer = at::empty({pieces, rows_most, ld}, x.x.options());
  for (int64_t i = 0; i < n; i += kTileRows)
    for (int64_t j = 0; j < m; j += kTileCols) {
      const int64_t rows = std::min(kTileRows, n - i), cols = std::min(kTileCols, m - j);
      for (int64_t k = 0; k < pieces; k++) {
        const int64_t depth = std::min(kDepth, c - k * kDepth);
        auto out = buffer.select(0, k).narrow(0, 0, rows).narrow(1, 0, cols);
        at::mm_out(out, x.x.narrow(0, i, rows).narrow(1, k * kDepth, depth),
                   y.x.narrow(0, j, cols).narrow(1, k * kDepth, depth).t());
      }
      use(Tile<T>{buffer.template const_data_ptr<T>(), pieces, rows_most * ld, ld, i, j, rows, cols});
    }
}

// ---- rank_counts ---------------------------------------------------------------------------------------------------

// The listed items, and where their counts go.
struct Listed {
  const int64_t *start, *item;
  const double* d;
  int64_t *nearer, *equal, *earlier;
};

// A block for each row of the tile, a warp for each of its listed items in turn.
template <class T>
__global__ void count_kernel(Tile<T> tile, View<T> q, View<T> g, Listed listed, const double* error) {
  const int64_t i = tile.row0 + blockIdx.x;
  const int lane = threadIdx.x % 32;
  for (int64_t p = listed.start[i] + threadIdx.x / 32; p < listed.start[i + 1]; p += kWarps) {
    const double d = listed.d[p], t0 = d - q.square[i];
    const double low = d > kFloor ? t0 - error[i] : -INFINITY, high = t0 + error[i];
    int64_t nearer = 0, equal = 0, earlier = 0;
    for (int64_t j0 = 0; j0 < tile.cols; j0 += 32) {
      const int64_t j = j0 + lane;
      const bool inside = j < tile.cols;
      const double t = inside ? double(tile(blockIdx.x, j, g.square[tile.col0 + j])) : INFINITY;
      nearer += __popc(__ballot_sync(kAll, t < low));
      for (unsigned open = __ballot_sync(kAll, t >= low && t <= high); open; open &= open - 1) {
        const int64_t at = tile.col0 + j0 + __ffs(open) - 1;
        const double other = distance(q, i, g, at);
        nearer += other < d;
        equal += other == d;
        earlier += other == d && at < listed.item[p];
      }
    }
    if (lane == 0) listed.nearer[p] += nearer, listed.equal[p] += equal, listed.earlier[p] += earlier;
  }
}

// Takes the items that do not count out again: a thread for each listed item.
__global__ void leave_out_kernel(const int64_t* row, int64_t count, Listed listed, const int64_t* left_start,
                                 const int64_t* left_item, const double* left_d) {
  const int64_t p = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (p >= count) return;
  for (int64_t l = left_start[row[p]]; l < left_start[row[p] + 1]; l++) {
    listed.nearer[p] -= left_d[l] < listed.d[p];
    listed.equal[p] -= left_d[l] == listed.d[p];
    listed.earlier[p] -= left_d[l] == listed.d[p] && left_item[l] < listed.item[p];
  }
}

__global__ void row_kernel(const int64_t* start, int64_t rows, int64_t* row) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= rows) return;
  for (int64_t p = start[i]; p < start[i + 1]; p++) row[p] = i;
}

// The query of every entry of a list.
Tensor rows_of(const Tensor& start, int64_t count) {
  auto row = at::empty({count}, start.options());
  const int64_t rows = start.size(0) - 1;
  if (count == 0) return row;
  row_kernel<<<blocks_for(rows, kThreads), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      start.const_data_ptr<int64_t>(), rows, row.mutable_data_ptr<int64_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return row;
}

// The header's bound for every row of x.
template <class T>
Tensor errors(const Points<T>& x, const Points<T>& y) {
  const auto bound = error_bound<T>(x.x.size(1));
  return x.square.sqrt() * (bound.xy * y.longest) + x.square * bound.xx +
         (bound.yy * y.longest * y.longest + bound.least);
}

std::tuple<Tensor, Tensor, Tensor> rank_counts(const Tensor& query, const Tensor& gallery, const Tensor& start,
                                               const Tensor& item, const Tensor& left_start, const Tensor& left_item) {
  check_points(query, gallery);
  const c10::cuda::CUDAGuard guard(query.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const auto nearer = at::zeros({item.size(0)}, item.options()), equal = at::zeros({item.size(0)}, item.options()),
             earlier = at::zeros({item.size(0)}, item.options());
  if (item.size(0) == 0) return {nearer, equal, earlier};
  const auto starts = start.contiguous(), items = item.contiguous(), left_starts = left_start.contiguous(),
             left_items = left_item.contiguous();
  bool done = true;
  AT_DISPATCH_FLOATING_TYPES(query.scalar_type(), "rank_counts", [&] {
    const auto q = make_points<scalar_t>(query, "rank_counts: the queries");
    const auto g = make_points<scalar_t>(gallery, "rank_counts: the gallery");
    if (overflows(query.scalar_type(), q.longest, g.longest)) {
      done = false;
      return;
    }
    const auto row = rows_of(starts, item.size(0)), d = pairs(q, g, row, items), error = errors(q, g);
    const Listed listed{starts.const_data_ptr<int64_t>(),  items.const_data_ptr<int64_t>(),
                        d.const_data_ptr<double>(),        nearer.mutable_data_ptr<int64_t>(),
                        equal.mutable_data_ptr<int64_t>(), earlier.mutable_data_ptr<int64_t>()};
    const double* errors_of_rows = error.const_data_ptr<double>();
    for_each_tile(q, g, [&](const Tile<scalar_t>& tile) {
      count_kernel<scalar_t><<<tile.rows, kThreads, 0, stream>>>(tile, q.view(), g.view(), listed, errors_of_rows);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
    const auto left_d = pairs(q, g, rows_of(left_starts, left_items.size(0)), left_items);
    leave_out_kernel<<<blocks_for(item.size(0), kThreads), kThreads, 0, stream>>>(
        row.const_data_ptr<int64_t>(), item.size(0), listed, left_starts.const_data_ptr<int64_t>(),
        left_items.const_data_ptr<int64_t>(), left_d.const_data_ptr<double>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  if (!done) return rank_counts(query.to(at::kDouble), gallery.to(at::kDouble), start, item, left_start, left_item);
  return {nearer, equal, earlier};
}

// ---- topk_pairs ----------------------------------------------------------------------------------------------------

__device__ bool holds(const int64_t* begin, const int64_t* end, int64_t value) {
  while (begin < end) {
    const int64_t* middle = begin + (end - begin) / 2;
    if (*middle == value) return true;
    if (*middle < value)
      begin = middle + 1;
    else
      end = middle;
  }
  return false;
}

// A warp for each row of the tile. index, d [N1, k] hold the nearest so far in order of (d, index), all exact; farthest
// likewise.
template <class T>
__global__ void nearest_kernel(Tile<T> tile, View<T> x, View<T> y, int64_t k, const int64_t* left_start,
                               const int64_t* left_item, const double* error, int64_t* index, double* d,
                               double* farthest) {
  const int64_t r = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32, i = tile.row0 + r;
  const int lane = threadIdx.x % 32;
  if (r >= tile.rows) return;
  const int64_t *left = left_item + left_start[i], *left_end = left_item + left_start[i + 1];
  index += i * k, d += i * k;
  double last = d[k - 1], far = farthest[i];
  for (int64_t j0 = 0; j0 < tile.cols; j0 += 32) {
    const int64_t mine = tile.col0 + j0 + lane;
    const bool inside = j0 + lane < tile.cols;
    const double t = inside ? double(tile(r, j0 + lane, y.square[mine])) + x.square[i] : 0;
    unsigned open =
        __ballot_sync(kAll, inside && (t <= last + error[i] || t >= far - error[i]) && !holds(left, left_end, mine));
    for (; open; open &= open - 1) {
      const int64_t j = tile.col0 + j0 + __ffs(open) - 1;
      const double value = distance(x, i, y, j);
      far = value > far ? value : far;
      if (value < last) {  // an equal one has a higher index than what is there
        if (lane == 0) {
          int64_t place = k - 1;
          for (; place > 0 && value < d[place - 1]; place--) d[place] = d[place - 1], index[place] = index[place - 1];
          d[place] = value, index[place] = j;
        }
        __syncwarp();
        last = d[k - 1];
      }
    }
  }
  if (lane == 0) farthest[i] = far;
}

std::tuple<Tensor, Tensor, Tensor> topk_pairs(const Tensor& x, const Tensor& y, int64_t k, const Tensor& left_start,
                                              const Tensor& left_item) {
  check_points(x, y);
  TORCH_CHECK_VALUE(k > 0, "topk_pairs: k must be at least 1, not ", k);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  const double infinity = std::numeric_limits<double>::infinity();
  const auto index = at::full({x.size(0), k}, -1, x.options().dtype(at::kLong));
  const auto d = at::full({x.size(0), k}, infinity, x.options().dtype(at::kDouble));
  const auto farthest = at::full({x.size(0)}, -infinity, d.options());
  const auto starts = left_start.contiguous(), items = left_item.contiguous();
  bool done = true;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "topk_pairs", [&] {
    const auto a = make_points<scalar_t>(x, "topk_pairs: the rows of x");
    const auto b = x.is_same(y) ? a : make_points<scalar_t>(y, "topk_pairs: the rows of y");
    if (overflows(x.scalar_type(), a.longest, b.longest)) {
      done = false;
      return;
    }
    const auto error = errors(a, b);
    for_each_tile(a, b, [&](const Tile<scalar_t>& tile) {
      nearest_kernel<scalar_t><<<blocks_for(tile.rows, kWarps), kThreads, 0, stream>>>(
          tile, a.view(), b.view(), k, starts.const_data_ptr<int64_t>(), items.const_data_ptr<int64_t>(),
          error.const_data_ptr<double>(), index.mutable_data_ptr<int64_t>(), d.mutable_data_ptr<double>(),
          farthest.mutable_data_ptr<double>());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  if (!done) return topk_pairs(x.to(at::kDouble), y.to(at::kDouble), k, left_start, left_item);
  return {index, d, farthest};
}

// ---- pair_distances ------------------------------------------------------------------------------------------------

Tensor pair_distances(const Tensor& x, const Tensor& y, const Tensor& i, const Tensor& j) {
  check_points(x, y);
  const c10::cuda::CUDAGuard guard(x.device());
  Tensor result;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "pair_distances", [&] {
    const auto a = make_points<scalar_t>(x, "pair_distances: the rows of x");
    result = pairs(a, x.is_same(y) ? a : make_points<scalar_t>(y, "pair_distances: the rows of y"), i, j);
  });
  return result;
}

}  // namespace
}  // namespace segadapt

TORCH_LIBRARY_IMPL(segadapt, CUDA, m) {
  m.impl("rank_counts", segadapt::rank_counts);
  m.impl("topk_pairs", segadapt::topk_pairs);
  m.impl("pair_distances", segadapt::pair_distances);
}
