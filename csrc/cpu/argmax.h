// Exact row and column argmax of S = x y^T: tiles in the working precision name candidates, float64 decides.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "association.h"
#include "vec.h"

namespace segadapt {

// Sum of x_k/nx * y_k/ny in float64, in one fixed order that every implementation of this operator shares: 16 sums over
// k mod 16, then halving. Products of float32 are exact in float64, so that fused or separate arithmetic gives the same
// bits.
template <class T>
inline double exact_dot(const T* x, T nx, const T* y, T ny, int64_t c) {
  double acc[16] = {};
  int64_t k = 0;
  for (; k + 16 <= c; k += 16)
    for (int l = 0; l < 16; l++) acc[l] += double(T(x[k + l] / nx)) * double(T(y[k + l] / ny));
  for (int l = 0; k + l < c; l++) acc[l] += double(T(x[k + l] / nx)) * double(T(y[k + l] / ny));
  for (int step = 8; step; step /= 2)
    for (int l = 0; l < step; l++) acc[l] += acc[l + step];
  return acc[0];
}

// One side of the product: N vectors.
template <class T>
struct Side {
  at::Tensor x;                // [N, C] contiguous: what exact products take, over norm
  at::Tensor tiled;            // what tiles take: x, or x brought into the range of products
  std::vector<T> norm, scale;  // divisor of the exact product; factor of the tiles' rows or columns
  std::vector<T> to_tile;      // what turns an exact product into the tile's value
  std::vector<T> length;       // norm of the tile's scaled vectors: 1 or 0 for unit vectors
  T longest = 0;               // max of length
  std::vector<int32_t> first;  // the lowest index of the same values: repetitions share its answer, and are none
  int64_t n() const { return x.size(0); }
  int64_t c() const { return x.size(1); }
  const T* row(int64_t i) const { return x.template const_data_ptr<T>() + i * c(); }
};

// 64 bits of the raw values; equal rows are then compared in full.
template <class T>
inline uint64_t row_hash(const T* x, int64_t c) {
  uint64_t lane[8] = {};
  const auto* p = reinterpret_cast<const uint32_t*>(x);
  const int64_t words = c * int64_t(sizeof(T) / 4);
  for (int64_t k = 0; k + 8 <= words; k += 8)
    for (int l = 0; l < 8; l++) lane[l] = (lane[l] ^ p[k + l]) * 0x9E3779B97F4A7C15u;
  for (int64_t k = words & ~int64_t(7); k < words; k++) lane[k & 7] = (lane[k & 7] ^ p[k]) * 0x9E3779B97F4A7C15u;
  uint64_t h = 0;
  for (int l = 0; l < 8; l++) h = (h ^ (lane[l] >> 29) ^ lane[l]) * 0xBF58476D1CE4E5B9u;
  return h;
}

template <class T>
void measure_rows(Side<T>& side, std::vector<uint64_t>& hash) {
  at::parallel_for(0, side.n(), 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      side.norm[i] = T(std::sqrt(exact_dot<T>(side.row(i), 1, side.row(i), 1, side.c())));
      hash[i] = row_hash(side.row(i), side.c());
    }
  });
}

template <class T>
void find_repetitions(Side<T>& side, const std::vector<uint64_t>& hash) {
  std::unordered_map<uint64_t, int32_t> seen;
  seen.reserve(side.n());
  for (int64_t i = 0; i < side.n(); i++) {
    const int64_t other = seen.try_emplace(hash[i], int32_t(i)).first->second;
    side.first[i] = int32_t(std::memcmp(side.row(other), side.row(i), side.c() * sizeof(T)) ? i : other);
  }
}

// The power of two that brings a norm between 1 and 2 (a subnormal one as near to it as a factor can); 1 for 0.
template <class T>
inline T to_range(T norm) {
  return norm > 0 ? std::ldexp(T(1), std::min(-std::ilogb(norm), std::numeric_limits<T>::max_exponent - 2)) : T(1);
}

// Throws ValueError on NaN, infinity and norms that the dtype does not hold.
template <class T>
Side<T> make_side(const at::Tensor& input, Form form, const char* name) {
  Side<T> side;
  side.x = side.tiled = input.contiguous();
  const int64_t n = side.n();
  side.norm.resize(n), side.first.resize(n), side.length.resize(n);
  side.scale.assign(n, 1), side.to_tile.assign(n, 1);
  std::vector<uint64_t> hash(n);
  measure_rows(side, hash);
  find_repetitions(side, hash);
  T smallest = std::numeric_limits<T>::max(), largest = 0;
  bool finite = true;
  for (T v : side.norm) {
    finite &= bool(std::isfinite(v));
    if (v > 0) smallest = std::min(smallest, v);
    largest = std::max(largest, v);
  }
  TORCH_CHECK_VALUE(finite, name, " holds NaN, infinite or overflowing values");
  const bool out_of_range = largest > T(kLargestNorm) || smallest < T(kSmallestNorm);
  std::vector<T> factor(n);  // of the rows of tiled where out_of_range
  for (int64_t i = 0; i < n; i++) {
    const T norm = side.norm[i];
    if (form == Form::unit) {
      side.norm[i] = norm > 0 ? norm : T(1);
      side.length[i] = T(norm > 0);
      if (!out_of_range) side.scale[i] = T(1) / side.norm[i];
    } else {
      side.norm[i] = 1;
      if (out_of_range) side.to_tile[i] = factor[i] = to_range(form == Form::left ? norm : largest);
      side.length[i] = norm * side.to_tile[i];
    }
    side.longest = std::max(side.longest, side.length[i]);
  }
  if (out_of_range) {
    const auto column = [&](std::vector<T>& v) { return at::from_blob(v.data(), {n, 1}, side.x.options()); };
    side.tiled = form == Form::unit ? side.x / column(side.norm) : side.x * column(factor);
  }
  return side;
}

// The candidates of every row (or column): whatever may still hold the maximum, given the tiles' rounding error.
template <class T>
class Candidates {
 public:
  static constexpr int capacity = 6;
  Candidates(const Side<T>& mine, const Side<T>& others, bool low_precision)
      : mine_(mine),
        others_(others),
        best_(mine.n(), -std::numeric_limits<T>::infinity()),
        margin_(mine.n()),
        error_(product_error<T>(mine.c(), low_precision)),
        exact_(mine.n(), -std::numeric_limits<double>::infinity()),
        index_(mine.n(), 0),
        count_(mine.n(), 0),
        list_(mine.n() * capacity) {
    const double relative = candidate_margin<T>(mine.c(), low_precision);
    for (int64_t i = 0; i < mine.n(); i++) margin_[i] = T(relative * double(mine.length[i]) * double(others.longest));
  }

  // What a value must reach to be a candidate, as far as is known.
  T threshold(int64_t i) const {
    return mine_.first[i] == i ? best_[i] - margin_[i] : std::numeric_limits<T>::infinity();
  }
  T margin(int64_t i) const { return margin_[i]; }

  void push(int64_t i, int64_t j, T value) {
    if (others_.first[j] != j) return;
    best_[i] = std::max(best_[i], value);
    if (count_[i] == capacity) prune(i);
    if (count_[i] == capacity) rescore(i);
    list_[i * capacity + count_[i]++] = {value, int32_t(j)};
  }

  // Scores what is left. False when a tile's value was further from the exact one than the margin allows for: the
  // matrix product was less precise than it was asked to be.
  bool finish() {
    at::parallel_for(0, mine_.n(), 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        prune(i);
        rescore(i);
      }
    });
    return precise_;
  }

  // Indices and the float64 maxima.
  void write(int64_t* index, T* value) const {
    for (int64_t i = 0; i < mine_.n(); i++) index[i] = index_[mine_.first[i]], value[i] = T(exact_[mine_.first[i]]);
  }

 private:
  struct Entry {
    T value;
    int32_t index;
  };

  void prune(int64_t i) {
    Entry* list = &list_[i * capacity];
    int kept = 0;
    for (int k = 0; k < count_[i]; k++)
      if (list[k].value >= best_[i] - margin_[i]) list[kept++] = list[k];
    count_[i] = uint8_t(kept);
  }

  void rescore(int64_t i) {
    for (int k = 0; k < count_[i]; k++) {
      const auto [value, j] = list_[i * capacity + k];
      const double s = exact_dot(mine_.row(i), mine_.norm[i], others_.row(j), others_.norm[j], mine_.c());
      const double expected = s * double(mine_.to_tile[i]) * double(others_.to_tile[j]);
      const double bound = error_ * double(mine_.length[i]) * double(others_.length[j]);
      if (std::abs(double(value) - expected) > bound + std::numeric_limits<T>::min()) precise_ = false;
      if (s > exact_[i] || (s == exact_[i] && j < index_[i])) exact_[i] = s, index_[i] = j;
    }
    count_[i] = 0;
  }

  const Side<T>&mine_, &others_;
  std::vector<T> best_, margin_;
  const double error_;
  std::vector<double> exact_;
  std::vector<int32_t> index_;
  std::vector<uint8_t> count_;
  std::vector<Entry> list_;
  std::atomic<bool> precise_{true};
};

// A tile of products, whose corner in S is (row0, col0) and whose rows lie stride apart.
template <class T>
struct Tile {
  const T* products;
  int64_t stride, rows, cols, row0, col0;
  const T* row(int64_t r) const { return products + r * stride; }
};

// Feeds tiles to both sides' candidates: four rows at a time, once for the maxima, then again where those say so.
template <class T>
class TileScan {
 public:
  TileScan(const Side<T>& x, const Side<T>& y, Candidates<T>& by_row, Candidates<T>* by_col)
      : x_(x), y_(y), by_row_(by_row), by_col_(by_col) {}

  void operator()(const Tile<T>& tile) {
    const int64_t threads = at::get_num_threads(), chunk = ((tile.rows + threads - 1) / threads + 3) / 4 * 4;
    found_.resize((tile.rows + chunk - 1) / chunk);
    at::parallel_for(0, found_.size(), 1, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; k++) scan(tile, k * chunk, std::min(tile.rows, (k + 1) * chunk), found_[k]);
    });
    for (const auto& of_chunk : found_)
      for (const auto& f : of_chunk) by_col_->push(f.col, f.row, f.value);
  }

 private:
  static constexpr int w = Vec<T>::lanes, height = 4;
  using V = typename Vec<T>::type;

  struct Found {  // a candidate of a column; columns are shared by the threads, so it waits
    int64_t row, col;
    T value;
  };
  struct Hit {  // w columns from here on in which some row of the block reaches the column's limit
    int32_t col;
    uint32_t lanes;
  };
  struct Block {  // up to four rows of a tile, the last one repeated
    const T* row[height];
    T scale[height];
    V top[height];
    int64_t first;
    int rows;
  };

  void scan(const Tile<T>& tile, int64_t begin, int64_t end, std::vector<Found>& found) const {
    found.clear();
    std::vector<T> limit(tile.cols, std::numeric_limits<T>::infinity());
    if (by_col_)
      for (int64_t j = 0; j < tile.cols; j++) limit[j] = by_col_->threshold(tile.col0 + j);
    std::vector<Hit> hits(tile.cols / w + 1);
    for (int64_t r = begin; r < end; r += height) {
      Block block = block_of(tile, r, int(std::min<int64_t>(height, end - r)));
      const int count = find_maxima(tile, block, limit.data(), hits.data());
      if (by_col_) check_columns(tile, block, hits.data(), count, limit, found);
      for (int q = 0; q < block.rows; q++) check_row(tile, block, q);
    }
  }

  Block block_of(const Tile<T>& tile, int64_t first, int rows) const {
    Block block;
    block.first = first, block.rows = rows;
    for (int q = 0; q < height; q++) {
      const int64_t r = first + std::min(q, rows - 1);
      block.row[q] = tile.row(r), block.scale[q] = x_.scale[tile.row0 + r];
      block.top[q] = splat(-std::numeric_limits<T>::infinity());
    }
    return block;
  }

  T value(const Tile<T>& tile, const Block& block, int q, int64_t j) const {
    return block.row[q][j] * y_.scale[tile.col0 + j] * block.scale[q];
  }

  // Over all whole vectors of columns: the rows' maxima, and the hits, whose number it returns. Nothing else happens
  // here, as a call inside this loop would cost it its registers.
  int find_maxima(const Tile<T>& tile, Block& block, const T* limit, Hit* hits) const {
    const T* scale = &y_.scale[tile.col0];
    V top[height], mine[height];
    const T* row[height];
    for (int q = 0; q < height; q++) top[q] = block.top[q], mine[q] = splat(block.scale[q]), row[q] = block.row[q];
    int count = 0;
    for (int64_t j = 0; j < tile.cols / w * w; j += w) {
      const V c = load<T>(scale + j);
      V highest = splat(-std::numeric_limits<T>::infinity());
#pragma GCC unroll 4
      for (int q = 0; q < height; q++) {
        const V v = load<T>(row[q] + j) * c * mine[q];
        top[q] = vmax(top[q], v);
        highest = vmax(highest, v);
      }
      const uint32_t lanes = mask_ge(highest, load<T>(limit + j));
      hits[count] = {int32_t(j), lanes};
      count += lanes != 0;
    }
    for (int q = 0; q < height; q++) block.top[q] = top[q];
    return count;
  }

  void check_columns(const Tile<T>& tile, const Block& block, const Hit* hits, int count, std::vector<T>& limit,
                     std::vector<Found>& found) const {
    const auto check = [&](int q, int64_t j) {
      const T v = value(tile, block, q, j);
      if (v < limit[j]) return;
      found.push_back({tile.row0 + block.first + q, tile.col0 + j, v});
      limit[j] = std::max(limit[j], v - by_col_->margin(tile.col0 + j));
    };
    for (int h = 0; h < count; h++)
      for (uint32_t lanes = hits[h].lanes; lanes; lanes &= lanes - 1)
        for (int q = 0; q < block.rows; q++) check(q, hits[h].col + __builtin_ctz(lanes));
    for (int q = 0; q < block.rows; q++)
      for (int64_t j = tile.cols / w * w; j < tile.cols; j++) check(q, j);
  }

  void check_row(const Tile<T>& tile, const Block& block, int q) const {
    const int64_t i = tile.row0 + block.first + q, whole = tile.cols / w * w;
    T highest = reduce_max<T>(block.top[q]);
    for (int64_t j = whole; j < tile.cols; j++) highest = std::max(highest, value(tile, block, q, j));
    if (highest < by_row_.threshold(i)) return;
    const T least = highest - by_row_.margin(i);
    const T* scale = &y_.scale[tile.col0];
    for (int64_t j = 0; j < whole; j += w) {
      const V v = load<T>(block.row[q] + j) * load<T>(scale + j) * splat(block.scale[q]);
      for (uint32_t lanes = mask_ge(v, splat(least)); lanes; lanes &= lanes - 1) {
        const int64_t at = j + __builtin_ctz(lanes);
        by_row_.push(i, tile.col0 + at, value(tile, block, q, at));
      }
    }
    for (int64_t j = whole; j < tile.cols; j++)
      if (const T v = value(tile, block, q, j); v >= least) by_row_.push(i, tile.col0 + j, v);
  }

  const Side<T>&x_, &y_;
  Candidates<T>& by_row_;
  Candidates<T>* by_col_;
  std::vector<std::vector<Found>> found_;
};

// x y^T, in out or in memory of its own. On processors other than Intel's, MKL, behind at::mm, takes its kernels for
// AVX2; oneDNN, where PyTorch has it, takes those for AVX-512, which are twice as fast.
inline at::Tensor product_of_rows(const at::Tensor& x, const at::Tensor& y, at::Tensor out) {
#if defined(__AVX512F__)
  using Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&, std::string_view,
                            c10::List<std::optional<at::Scalar>>, std::optional<std::string_view>);
  static const auto linear = __builtin_cpu_is("intel")
                                 ? std::nullopt
                                 : c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
  if (linear && x.scalar_type() == at::kFloat && std::min({x.size(0), x.size(1), y.size(0)}) >= 64) {
    return linear->typed<Linear>().call(x, y, std::nullopt, "none", c10::List<std::optional<at::Scalar>>(), "");
  }
#endif
  at::mm_out(out, x, y.t());
  return out;
}

// All tiles of x y^T.
template <class T>
void scan_tiles(const Side<T>& x, const Side<T>& y, Candidates<T>& by_row, Candidates<T>* by_col, int64_t tile_rows,
                int64_t tile_cols) {
  TileScan<T> scan(x, y, by_row, by_col);
  const int64_t stride = std::min(tile_cols, y.n());
  auto buffer = at::empty({std::min(tile_rows, x.n()), stride}, x.x.options());
  for (int64_t i = 0; i < x.n(); i += tile_rows)
    for (int64_t j = 0; j < y.n(); j += tile_cols) {
      const int64_t rows = std::min(tile_rows, x.n() - i), cols = std::min(tile_cols, y.n() - j);
      const auto tile = product_of_rows(x.tiled.narrow(0, i, rows), y.tiled.narrow(0, j, cols),
                                        buffer.narrow(0, 0, rows).narrow(1, 0, cols));
      scan({tile.template const_data_ptr<T>(), tile.stride(0), rows, cols, i, j});
    }
}

}  // namespace segadapt
