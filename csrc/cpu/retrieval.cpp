// Ranks and nearest lists by squared Euclidean distance, from float32 tiles and float64 rescoring.
#include "retrieval.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "argmax.h"

namespace segadapt {
namespace {

using at::Tensor;

constexpr int64_t kTileRows = 512, kTileCols = 512;  // 1 MB a piece

template <class T>
struct Points {
  Tensor x;                    // [N, C] contiguous
  std::vector<double> square;  // |x|^2
  double longest = 0;          // max |x|
  int64_t n() const { return x.size(0); }
  int64_t c() const { return x.size(1); }
  const T* row(int64_t i) const { return x.template const_data_ptr<T>() + i * c(); }
};

template <class T>
Points<T> make_points(const Tensor& input, const char* name) {
  Points<T> points{input.contiguous(), std::vector<double>(input.size(0))};
  at::parallel_for(0, points.n(), 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      points.square[i] = exact_dot<T>(points.row(i), 1, points.row(i), 1, points.c());
  });
  double most = 0;
  for (double v : points.square) {
    TORCH_CHECK_VALUE(std::isfinite(v), name, " hold NaN or infinite values");
    most = std::max(most, v);
  }
  points.longest = std::sqrt(most);
  return points;
}

template <class T>
double distance(const Points<T>& x, int64_t i, const Points<T>& y, int64_t j) {
  return std::max(x.square[i] + y.square[j] - 2 * exact_dot<T>(x.row(i), 1, y.row(j), 1, x.c()), kFloor);
}

template <class T>
T below(double v) {
  const T r = T(v);
  return double(r) <= v ? r : std::nextafter(r, -std::numeric_limits<T>::infinity());
}
template <class T>
T above(double v) {
  const T r = T(v);
  return double(r) >= v ? r : std::nextafter(r, std::numeric_limits<T>::infinity());
}

// Calls row(i, t, j0, count) for each row i in [begin, end) of x and each tile's columns j0 .. j0 + count - 1 of y. The
// calls for one i come in the order of j, one at a time.
template <class T, class Row>
void for_each_row(const Points<T>& x, const Points<T>& y, int64_t begin, int64_t end, std::vector<Tensor>& buffer,
                  const Row& row) {
  constexpr int w = Vec<T>::lanes;
  const int64_t c = x.c(), rows = end - begin, ld = std::min(kTileCols, y.n()), pieces = (c + kDepth - 1) / kDepth;
  if (buffer.empty())
    for (int64_t k = 0; k < pieces; k++) buffer.push_back(at::empty({std::min(kTileRows, x.n()), ld}, x.x.options()));
  std::vector<const T*> piece(pieces);
  for (int64_t k = 0; k < pieces; k++) piece[k] = buffer[k].template const_data_ptr<T>();
  std::vector<T> square(ld);
  for (int64_t j0 = 0; j0 < y.n(); j0 += kTileCols) {
    const int64_t cols = std::min(kTileCols, y.n() - j0), whole = cols / w * w;
    for (int64_t k = 0; k < pieces; k++) {
      const int64_t depth = std::min(kDepth, c - k * kDepth);
      auto out = buffer[k].narrow(0, 0, rows).narrow(1, 0, cols);
      at::mm_out(out, x.x.narrow(0, begin, rows).narrow(1, k * kDepth, depth),
                 y.x.narrow(0, j0, cols).narrow(1, k * kDepth, depth).t());
    }
    for (int64_t j = 0; j < cols; j++) square[j] = T(y.square[j0 + j]);
    at::parallel_for(0, rows, 8, [&](int64_t first, int64_t last) {
      std::vector<T> t(ld);
      for (int64_t r = first; r < last; r++) {
        for (int64_t j = 0; j < whole; j += w) {
          auto sum = load<T>(piece[0] + r * ld + j);
          for (int64_t k = 1; k < pieces; k++) sum += load<T>(piece[k] + r * ld + j);
          store<T>(&t[j], load<T>(&square[j]) - 2 * sum);
        }
        for (int64_t j = whole; j < cols; j++) {
          T sum = piece[0][r * ld + j];
          for (int64_t k = 1; k < pieces; k++) sum += piece[k][r * ld + j];
          t[j] = square[j] - 2 * sum;
        }
        row(begin + r, t.data(), j0, cols);
      }
    });
  }
}

// ---- rank_counts ---------------------------------------------------------------------------------------------------

// One listed gallery item of a query; t < low means nearer, t > high means farther, between them d decides.
template <class T>
struct Listed {
  double d;
  int64_t item, place;  // place: where its counts go
  T low, high;
};

template <class T>
struct Counter {
  const Points<T>&q, &g;
  int64_t *nearer, *equal, *earlier;

  void operator()(int64_t i, const std::vector<Listed<T>>& listed, const T* t, int64_t j0, int64_t cols) const {
    constexpr int w = Vec<T>::lanes, block = 4;
    using V = typename Vec<T>::type;
    using M = decltype(V{} < V{});
    const int64_t whole = cols / w * w;
    V least = splat(std::numeric_limits<T>::infinity()), most = -least;
    for (int64_t j = 0; j < whole; j += w) {
      const V v = load<T>(t + j);
      least = v < least ? v : least, most = vmax(most, v);
    }
    T bottom = -reduce_max<T>(-least), top = reduce_max<T>(most);
    for (int64_t j = whole; j < cols; j++) bottom = std::min(bottom, t[j]), top = std::max(top, t[j]);
    size_t p = 0, last = listed.size();
    while (p < last && listed[p].high < bottom) p++;
    while (last > p && listed[last - 1].low > top) nearer[listed[--last].place] += cols;

    std::vector<double> d;  // of this row's columns, where computed
    for (; p < last; p += block) {
      const int n = int(std::min<size_t>(block, last - p));
      V low[block], high[block];
      M under[block] = {}, up_to[block] = {};
      for (int q = 0; q < block; q++) {
        low[q] = splat(listed[p + std::min(q, n - 1)].low);
        high[q] = splat(listed[p + std::min(q, n - 1)].high);
      }
      for (int64_t j = 0; j < whole; j += w) {
        const V v = load<T>(t + j);
#pragma GCC unroll 4
        for (int q = 0; q < block; q++) under[q] += v < low[q], up_to[q] += v <= high[q];  // true is -1
      }
      for (int q = 0; q < n; q++) {
        const Listed<T>& mine = listed[p + q];
        int64_t a = 0, b = 0;
        for (int l = 0; l < w; l++) a -= under[q][l], b -= up_to[q][l];
        for (int64_t j = whole; j < cols; j++) a += t[j] < mine.low, b += t[j] <= mine.high;
        nearer[mine.place] += a;
        if (b > a) decide(i, mine, t, j0, cols, d);
      }
    }
  }

 private:
  void decide(int64_t i, const Listed<T>& mine, const T* t, int64_t j0, int64_t cols, std::vector<double>& d) const {
    if (d.empty()) d.assign(cols, -1);
    for (int64_t j = 0; j < cols; j++) {
      if (t[j] < mine.low || t[j] > mine.high) continue;
      if (d[j] < 0) d[j] = distance(q, i, g, j0 + j);
      nearer[mine.place] += d[j] < mine.d;
      equal[mine.place] += d[j] == mine.d;
      earlier[mine.place] += d[j] == mine.d && j0 + j < mine.item;
    }
  }
};

template <class T>
bool rank_counts_typed(const Tensor& query, const Tensor& gallery, const int64_t* start, const int64_t* item,
                       const int64_t* left_start, const int64_t* left_item, int64_t* nearer, int64_t* equal,
                       int64_t* earlier) {
  const auto q = make_points<T>(query, "rank_counts: the queries");
  const auto g = make_points<T>(gallery, "rank_counts: the gallery");
  if (overflows(query.scalar_type(), q.longest, g.longest)) return false;
  const auto bound = error_bound<T>(q.c());
  const Counter<T> count{q, g, nearer, equal, earlier};
  std::vector<Tensor> buffer;
  std::vector<std::vector<Listed<T>>> listed(std::min(kTileRows, q.n()));
  for (int64_t begin = 0; begin < q.n(); begin += kTileRows) {
    const int64_t end = std::min(q.n(), begin + kTileRows);
    at::parallel_for(begin, end, 8, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i++) {
        auto& mine = listed[i - begin];
        mine.clear();
        const double e = bound(std::sqrt(q.square[i]), g.longest);
        for (int64_t p = start[i]; p < start[i + 1]; p++) {
          const double d = distance(q, i, g, item[p]), t = d - q.square[i];
          mine.push_back(
              {d, item[p], p, d > kFloor ? below<T>(t - e) : -std::numeric_limits<T>::infinity(), above<T>(t + e)});
        }
        std::sort(mine.begin(), mine.end(), [](const auto& a, const auto& b) { return a.d < b.d; });
      }
    });
    for_each_row(q, g, begin, end, buffer, [&](int64_t i, const T* t, int64_t j0, int64_t cols) {
      if (!listed[i - begin].empty()) count(i, listed[i - begin], t, j0, cols);
    });
    at::parallel_for(begin, end, 8, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i++)
        for (int64_t l = left_start[i]; l < left_start[i + 1] && !listed[i - begin].empty(); l++) {
          const double d = distance(q, i, g, left_item[l]);
          for (const auto& mine : listed[i - begin]) {
            nearer[mine.place] -= d < mine.d;
            equal[mine.place] -= d == mine.d;
            earlier[mine.place] -= d == mine.d && left_item[l] < mine.item;
          }
        }
    });
  }
  return true;
}

std::tuple<Tensor, Tensor, Tensor> rank_counts(const Tensor& q, const Tensor& g, const Tensor& start,
                                               const Tensor& item, const Tensor& left_start, const Tensor& left_item) {
  check_points(q, g);
  Tensor result[3];
  for (auto& r : result) r = at::zeros({item.size(0)}, item.options());
  const Tensor lists[] = {start.contiguous(), item.contiguous(), left_start.contiguous(), left_item.contiguous()};
  const bool done = AT_DISPATCH_FLOATING_TYPES(q.scalar_type(), "rank_counts", [&] {
    return rank_counts_typed<scalar_t>(q, g, lists[0].const_data_ptr<int64_t>(), lists[1].const_data_ptr<int64_t>(),
                                       lists[2].const_data_ptr<int64_t>(), lists[3].const_data_ptr<int64_t>(),
                                       result[0].mutable_data_ptr<int64_t>(), result[1].mutable_data_ptr<int64_t>(),
                                       result[2].mutable_data_ptr<int64_t>());
  });
  if (!done) return rank_counts(q.to(at::kDouble), g.to(at::kDouble), start, item, left_start, left_item);
  return {result[0], result[1], result[2]};
}

// ---- topk_pairs ----------------------------------------------------------------------------------------------------

// The k nearest of one row and the distance of the farthest, from candidates that t cannot exclude.
template <class T>
class Nearest {
 public:
  Nearest(const Points<T>& x, const Points<T>& y, int64_t i, int64_t k, const int64_t* left, int64_t left_count)
      : x_(x),
        y_(y),
        i_(i),
        k_(k),
        capacity_(std::max<int64_t>(4 * k, 64)),
        left_(left),
        left_count_(left_count),
        error_(error_bound<T>(x.c())(std::sqrt(x.square[i]), y.longest)) {
    near_.reserve(capacity_);
  }

  void scan(const T* t, int64_t j0, int64_t cols) {
    constexpr int w = Vec<T>::lanes;
    int64_t j = 0;
    for (; j + w <= cols; j += w) {
      const auto v = load<T>(t + j);
      for (uint32_t hits = mask_ge(splat(near_limit_), v) | mask_ge(v, splat(far_limit_)); hits; hits &= hits - 1) {
        const int l = __builtin_ctz(hits);
        push(t[j + l], j0 + j + l);
      }
    }
    for (; j < cols; j++) push(t[j], j0 + j);
  }

  void finish(int64_t* index, double* d, double* farthest) {
    rescore_near();
    rescore_far();
    for (int64_t r = 0; r < k_; r++) {
      const bool found = r < int64_t(best_.size());
      index[r] = found ? best_[r].second : -1;
      d[r] = found ? best_[r].first : std::numeric_limits<double>::infinity();
    }
    *farthest = farthest_;
  }

 private:
  using Candidate = std::pair<T, int64_t>;

  void push(T t, int64_t j) {
    const bool near = t <= near_limit_, far = t >= far_limit_;
    if (!(near || far) || std::binary_search(left_, left_ + left_count_, j)) return;
    if (near) {
      near_.push_back({t, j});
      if (int64_t(near_.size()) >= capacity_) prune_near();
    }
    if (far) {
      far_limit_ = std::max(far_limit_, below<T>(double(t) - 2 * error_));
      far_.push_back({t, j});
      if (far_.size() >= 64) {
        const auto end = std::remove_if(far_.begin(), far_.end(), [&](const auto& c) { return c.first < far_limit_; });
        far_.erase(end, far_.end());
        if (far_.size() >= 32) rescore_far();
      }
    }
  }

  void prune_near() {
    std::nth_element(near_.begin(), near_.begin() + (k_ - 1), near_.end());
    const double floor = kFloor - x_.square[i_];  // below it all t are the same distance
    near_limit_ = std::min(near_limit_, above<T>(std::max(double(near_[k_ - 1].first) + error_, floor) + error_));
    const auto end = std::remove_if(near_.begin(), near_.end(), [&](const auto& c) { return c.first > near_limit_; });
    near_.erase(end, near_.end());
    if (int64_t(near_.size()) > capacity_ / 2) rescore_near();
  }

  void rescore_near() {
    for (const auto& c : near_) best_.push_back({distance(x_, i_, y_, c.second), c.second});
    near_.clear();
    std::sort(best_.begin(), best_.end());
    if (int64_t(best_.size()) < k_) return;
    best_.resize(k_);
    near_limit_ = std::min(near_limit_, above<T>(best_.back().first - x_.square[i_] + error_));
  }

  void rescore_far() {
    for (const auto& c : far_) farthest_ = std::max(farthest_, distance(x_, i_, y_, c.second));
    far_.clear();
  }

  const Points<T>&x_, &y_;
  const int64_t i_, k_, capacity_;
  const int64_t* left_;
  const int64_t left_count_;
  const double error_;
  T near_limit_ = std::numeric_limits<T>::infinity(), far_limit_ = -std::numeric_limits<T>::infinity();
  std::vector<Candidate> near_, far_;
  std::vector<std::pair<double, int64_t>> best_;
  double farthest_ = -std::numeric_limits<double>::infinity();
};

std::tuple<Tensor, Tensor, Tensor> topk_pairs(const Tensor& x, const Tensor& y, int64_t k, const Tensor& left_start,
                                              const Tensor& left_item) {
  check_points(x, y);
  TORCH_CHECK_VALUE(k > 0, "topk_pairs: k must be at least 1, not ", k);
  auto index = at::empty({x.size(0), k}, x.options().dtype(at::kLong));
  auto d = at::empty({x.size(0), k}, x.options().dtype(at::kDouble)), farthest = at::empty({x.size(0)}, d.options());
  const auto starts = left_start.contiguous(), items = left_item.contiguous();
  const auto *s = starts.const_data_ptr<int64_t>(), *left = items.const_data_ptr<int64_t>();
  bool done = true;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "topk_pairs", [&] {
    const auto a = make_points<scalar_t>(x, "topk_pairs: the rows of x");
    const auto other = x.is_same(y) ? Points<scalar_t>{} : make_points<scalar_t>(y, "topk_pairs: the rows of y");
    const auto& b = x.is_same(y) ? a : other;
    if (overflows(x.scalar_type(), a.longest, b.longest)) {
      done = false;
      return;
    }
    std::vector<Tensor> buffer;
    for (int64_t begin = 0; begin < a.n(); begin += kTileRows) {
      const int64_t end = std::min(a.n(), begin + kTileRows);
      std::vector<Nearest<scalar_t>> rows;
      for (int64_t i = begin; i < end; i++) rows.emplace_back(a, b, i, k, left + s[i], s[i + 1] - s[i]);
      for_each_row(a, b, begin, end, buffer,
                   [&](int64_t i, const scalar_t* t, int64_t j0, int64_t cols) { rows[i - begin].scan(t, j0, cols); });
      at::parallel_for(begin, end, 8, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++)
          rows[i - begin].finish(index.mutable_data_ptr<int64_t>() + i * k, d.mutable_data_ptr<double>() + i * k,
                                 farthest.mutable_data_ptr<double>() + i);
      });
    }
  });
  if (!done) return topk_pairs(x.to(at::kDouble), y.to(at::kDouble), k, left_start, left_item);
  return {index, d, farthest};
}

// ---- pair_distances ------------------------------------------------------------------------------------------------

Tensor pair_distances(const Tensor& x, const Tensor& y, const Tensor& i, const Tensor& j) {
  check_points(x, y);
  auto result = at::empty({i.size(0)}, x.options().dtype(at::kDouble));
  const auto rows = i.contiguous(), cols = j.contiguous();
  const auto *r = rows.const_data_ptr<int64_t>(), *c = cols.const_data_ptr<int64_t>();
  auto* out = result.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "pair_distances", [&] {
    const auto a = make_points<scalar_t>(x, "pair_distances: the rows of x");
    const auto other = x.is_same(y) ? Points<scalar_t>{} : make_points<scalar_t>(y, "pair_distances: the rows of y");
    const auto& b = x.is_same(y) ? a : other;
    at::parallel_for(0, i.size(0), 64, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; p++) out[p] = distance(a, r[p], b, c[p]);
    });
  });
  return result;
}

}  // namespace
}  // namespace segadapt

TORCH_LIBRARY_IMPL(segadapt, CPU, m) {
  m.impl("rank_counts", segadapt::rank_counts);
  m.impl("topk_pairs", segadapt::topk_pairs);
  m.impl("pair_distances", segadapt::pair_distances);
}
