// Exact row and column argmax of S = (x y^T) scaled per row and column, from float32 tiles and float64 rescoring.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#include <limits>
#include <string>
#include <unordered_map>
#include <vector>

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

// One side: N vectors, what S scales them by, and the norms of the scaled vectors for the error bound.
template <class T>
struct Side {
  at::Tensor x;                // [N, C] contiguous
  std::vector<T> norm, scale;  // divisor of the exact product; 1/norm (0 for a zero vector) in the tiles
  std::vector<T> length;       // norm of x/norm: 1 or 0 when normalised
  T longest = 0;               // max of length
  std::vector<int32_t> first;  // the lowest index of the same values: repetitions share its answer, and are none
  int64_t n() const { return x.size(0); }
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

// Norms and repetitions. normalise: S is the cosine; otherwise the plain product. Throws ValueError on NaN or infinity.
template <class T>
Side<T> make_side(const at::Tensor& input, bool normalise, const char* name) {
  Side<T> side;
  side.x = input.contiguous();
  const int64_t n = input.size(0), c = input.size(1);
  side.norm.resize(n), side.scale.resize(n), side.length.resize(n), side.first.resize(n);
  std::vector<uint64_t> hash(n);
  auto measure = [&] {
    const T* x = side.x.template const_data_ptr<T>();
    at::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        side.norm[i] = T(std::sqrt(exact_dot<T>(x + i * c, 1, x + i * c, 1, c)));
        hash[i] = row_hash(x + i * c, c);
      }
    });
  };
  measure();
  T least = std::numeric_limits<T>::max(), most = 0;
  bool finite = true;
  for (T v : side.norm) {
    finite &= bool(std::isfinite(v));
    if (v > 0) least = std::min(least, v);
    most = std::max(most, v);
  }
  TORCH_CHECK_VALUE(finite, name, " holds NaN, infinite or overflowing values");
  std::vector<T> divisor = side.norm;
  if (normalise && (most > T(1e12) || least < T(1e-12))) {  // raw products could leave the range of float32
    side.x =
        side.x / at::from_blob(side.norm.data(), {n, 1}, side.x.options()).clamp_min(std::numeric_limits<T>::min());
    std::fill(divisor.begin(), divisor.end(), T(1));
  }
  for (int64_t i = 0; i < n; i++) {
    const bool zero = side.norm[i] == 0;
    side.length[i] = normalise ? T(!zero) : side.norm[i];
    side.longest = std::max(side.longest, side.length[i]);
    side.norm[i] = zero || !normalise ? T(1) : divisor[i];
    side.scale[i] = T(1) / side.norm[i];
  }
  std::unordered_map<uint64_t, int32_t> seen;
  seen.reserve(n);
  const T* x = side.x.template const_data_ptr<T>();
  for (int64_t i = 0; i < n; i++) {
    const int64_t other = seen.try_emplace(hash[i], int32_t(i)).first->second;
    side.first[i] = int32_t(std::memcmp(x + other * c, x + i * c, c * sizeof(T)) ? i : other);
  }
  return side;
}

// The candidates of every row (or column): whatever may still hold the maximum, given the tiles' rounding error.
template <class T>
class Candidates {
 public:
  static constexpr int capacity = 6;
  Candidates(const Side<T>& mine, const Side<T>& others)
      : mine_(mine),
        others_(others),
        best_(mine.n(), -std::numeric_limits<T>::infinity()),
        margin_(mine.n()),
        exact_(mine.n(), -std::numeric_limits<double>::infinity()),
        index_(mine.n(), 0),
        count_(mine.n(), 0),
        list_(mine.n() * capacity) {
    // |tile - exact| <= (C + 16) u |x| |y|: a chain of C fused additions, the scales, the norms' rounding. Twice, for a
    // pair.
    const double unit = std::numeric_limits<T>::epsilon() / 2;
    for (int64_t i = 0; i < mine.n(); i++)
      margin_[i] = T(2.001 * double(mine.x.size(1) + 16) * unit * double(mine.length[i]) * double(others.longest));
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

  // Indices and the float64 maxima.
  void finish(int64_t* index, T* value) {
    at::parallel_for(0, mine_.n(), 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        prune(i);
        rescore(i);
        index[i] = index_[i];
        value[i] = T(exact_[i]);
      }
    });
    for (int64_t i = 0; i < mine_.n(); i++) index[i] = index[mine_.first[i]], value[i] = value[mine_.first[i]];
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
    const int64_t c = mine_.x.size(1);
    const T* x = mine_.x.template const_data_ptr<T>() + i * c;
    const T* y = others_.x.template const_data_ptr<T>();
    for (int k = 0; k < count_[i]; k++) {
      const int64_t j = list_[i * capacity + k].index;
      const double s = exact_dot(x, mine_.norm[i], y + j * c, others_.norm[j], c);
      if (s > exact_[i] || (s == exact_[i] && j < index_[i])) exact_[i] = s, index_[i] = int32_t(j);
    }
    count_[i] = 0;
  }

  const Side<T>&mine_, &others_;
  std::vector<T> best_, margin_;
  std::vector<double> exact_;
  std::vector<int32_t> index_;
  std::vector<uint8_t> count_;
  std::vector<Entry> list_;
};

// Feeds tiles of raw products, whose corner is (row0, col0) and whose rows lie ld apart, to both sides' candidates.
template <class T>
class TileScan {
 public:
  TileScan(const Side<T>& x, const Side<T>& y, Candidates<T>& by_row, Candidates<T>* by_col)
      : x_(x), y_(y), by_row_(by_row), by_col_(by_col) {}

  void operator()(const T* tile, int64_t ld, int64_t rows, int64_t cols, int64_t row0, int64_t col0) {
    const int64_t threads = at::get_num_threads(), chunk = ((rows + threads - 1) / threads + 3) / 4 * 4;
    found_.resize((rows + chunk - 1) / chunk);
    at::parallel_for(0, found_.size(), 1, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; k++) {
        found_[k].clear();
        scan(tile, ld, k * chunk, std::min(rows, (k + 1) * chunk), cols, row0, col0, found_[k]);
      }
    });
    for (const auto& chunk_found : found_)
      for (const auto& f : chunk_found) by_col_->push(f.col, f.row, f.value);
  }

 private:
  struct Found {
    int64_t row, col;
    T value;
  };

  void scan(const T* tile, int64_t ld, int64_t begin, int64_t end, int64_t cols, int64_t row0, int64_t col0,
            std::vector<Found>& found) {
    constexpr int w = Vec<T>::lanes, block = 4;
    using V = typename Vec<T>::type;
    const T lowest = -std::numeric_limits<T>::infinity();
    const int64_t whole = cols / w * w;
    std::vector<T> col_limit(cols, -lowest);
    if (by_col_)
      for (int64_t j = 0; j < cols; j++) col_limit[j] = by_col_->threshold(col0 + j);
    const T *scale = &y_.scale[col0], *limit = col_limit.data();
    struct Hit {
      int32_t at;
      uint32_t bits;
    };
    std::vector<Hit> hits_of_block(cols / w + 1);
    Hit* hit = hits_of_block.data();
    auto check = [&](int64_t r, int64_t j) {
      const T v = tile[r * ld + j] * scale[j] * x_.scale[row0 + r];
      if (v < col_limit[j]) return;
      found.push_back({row0 + r, col0 + j, v});
      col_limit[j] = std::max(col_limit[j], v - by_col_->margin(col0 + j));
    };
    for (int64_t r0 = begin; r0 < end; r0 += block) {
      const int n = int(std::min<int64_t>(block, end - r0));
      V top[block], mine[block];
      for (int q = 0; q < block; q++) top[q] = splat(lowest), mine[q] = splat(x_.scale[row0 + r0 + std::min(q, n - 1)]);
      const T* s[block];
      for (int q = 0; q < block; q++) s[q] = tile + (r0 + std::min(q, n - 1)) * ld;
      int count = 0;
      for (int64_t j = 0; j < whole; j += w) {
        const V c = load<T>(scale + j);
        V highest = splat(lowest);
#pragma GCC unroll 4
        for (int q = 0; q < block; q++) {
          const V v = load<T>(s[q] + j) * c * mine[q];
          top[q] = vmax(top[q], v);
          highest = vmax(highest, v);
        }
        const uint32_t hits = mask_ge(highest, load<T>(limit + j));
        hit[count] = {int32_t(j), hits};
        count += hits != 0;
      }
      for (int h = 0; h < count; h++)  // a call inside the loop above would cost it its registers
        for (uint32_t bits = hit[h].bits; bits; bits &= bits - 1)
          for (int q = 0; q < n; q++) check(r0 + q, hit[h].at + __builtin_ctz(bits));
      for (int q = 0; q < n; q++) {
        const int64_t i = row0 + r0 + q;
        for (int64_t j = whole; j < cols; j++) check(r0 + q, j);
        T highest = reduce_max<T>(top[q]);
        for (int64_t j = whole; j < cols; j++) highest = std::max(highest, s[q][j] * scale[j] * x_.scale[i]);
        if (highest < by_row_.threshold(i)) continue;
        const T least = highest - by_row_.margin(i);
        for (int64_t j = 0; j < whole; j += w)
          for (uint32_t hits = mask_ge(load<T>(s[q] + j) * load<T>(scale + j) * mine[q], splat(least)); hits;
               hits &= hits - 1) {
            const int64_t at = j + __builtin_ctz(hits);
            by_row_.push(i, col0 + at, s[q][at] * scale[at] * x_.scale[i]);
          }
        for (int64_t j = whole; j < cols; j++)
          if (const T v = s[q][j] * scale[j] * x_.scale[i]; v >= least) by_row_.push(i, col0 + j, v);
      }
    }
  }

  const Side<T>&x_, &y_;
  Candidates<T>& by_row_;
  Candidates<T>* by_col_;
  std::vector<std::vector<Found>> found_;
};

// All tiles of x y^T through at::mm.
template <class T>
void scan_tiles(const Side<T>& x, const Side<T>& y, Candidates<T>& by_row, Candidates<T>* by_col, int64_t tile_rows,
                int64_t tile_cols) {
  TileScan<T> scan(x, y, by_row, by_col);
  const int64_t ld = std::min(tile_cols, y.n());
  auto buffer = at::empty({std::min(tile_rows, x.n()), ld}, x.x.options());
  for (int64_t i = 0; i < x.n(); i += tile_rows)
    for (int64_t j = 0; j < y.n(); j += tile_cols) {
      const int64_t rows = std::min(tile_rows, x.n() - i), cols = std::min(tile_cols, y.n() - j);
      auto out = buffer.narrow(0, 0, rows).narrow(1, 0, cols);
      at::mm_out(out, x.x.narrow(0, i, rows), y.x.narrow(0, j, cols).t());
      scan(buffer.template const_data_ptr<T>(), ld, rows, cols, i, j);
    }
}

}  // namespace segadapt
