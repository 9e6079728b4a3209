// Cycle association on the CPU: see lib/ops/association.py for what each operator does.
#include "association.h"

#include <ATen/Dispatch.h>
#include <torch/library.h>

#include "argmax.h"
#include "attention.h"

namespace segadapt {
namespace {

using at::Tensor;

// ---- argmax ---------------------------------------------------------------------------------------------------------

constexpr int64_t kTileRows = 512, kTileCols = 1024;  // 2 MB of products, which stay in the cache until they are read

std::tuple<Tensor, Tensor, Tensor, Tensor> mutual_argmax(const Tensor& a, const Tensor& b) {
  check_rows(a, b, "mutual_argmax");
  auto row_index = at::empty({a.size(0)}, a.options().dtype(at::kLong)),
       row_value = at::empty({a.size(0)}, a.options());
  auto col_index = at::empty({b.size(0)}, row_index.options()), col_value = at::empty({b.size(0)}, a.options());
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "mutual_argmax", [&] {
    const auto x = make_side<scalar_t>(a, Form::unit, "mutual_argmax: a"),
               y = make_side<scalar_t>(b, Form::unit, "mutual_argmax: b");
    for (const bool low_precision : {false, true}) {
      Candidates<scalar_t> by_row(x, y, low_precision), by_col(y, x, low_precision);
      scan_tiles(x, y, by_row, &by_col, kTileRows, kTileCols);
      const bool rows_precise = by_row.finish(), cols_precise = by_col.finish();
      by_row.write(row_index.mutable_data_ptr<int64_t>(), row_value.mutable_data_ptr<scalar_t>());
      by_col.write(col_index.mutable_data_ptr<int64_t>(), col_value.mutable_data_ptr<scalar_t>());
      if (rows_precise && cols_precise) break;
    }
  });
  return {row_index, row_value, col_index, col_value};
}

Tensor product_argmax(const Tensor& x, const Tensor& y) {
  check_rows(x, y, "product_argmax");
  auto index = at::empty({x.size(0)}, x.options().dtype(at::kLong)), value = at::empty({x.size(0)}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "product_argmax", [&] {
    const auto left = make_side<scalar_t>(x, Form::left, "product_argmax: x"),
               right = make_side<scalar_t>(y, Form::right, "product_argmax: y");
    for (const bool low_precision : {false, true}) {
      Candidates<scalar_t> by_row(left, right, low_precision);
      scan_tiles<scalar_t>(left, right, by_row, nullptr, kTileRows, kTileCols);
      const bool precise = by_row.finish();
      by_row.write(index.mutable_data_ptr<int64_t>(), value.mutable_data_ptr<scalar_t>());
      if (precise) break;
    }
  });
  return index;
}

// ---- softmax of panels ----------------------------------------------------------------------------------------------

// Calls step(j, lane type) for the whole vectors of a row and then for the values that are left.
template <class T, class Step>
inline void for_row(int64_t n, const Step& step) {
  constexpr int w = Vec<T>::lanes;
  int64_t j = 0;
  for (; j + w <= n; j += w) step(j, typename Vec<T>::type{});
  for (; j < n; j++) step(j, T{});
}

template <class T>
inline void read(const T* p, T& value) {
  value = *p;
}
template <class T>
inline void read(const T* p, typename Vec<T>::type& value) {
  value = load<T>(p);
}
template <class T>
inline void write(T* p, T value) {
  *p = value;
}
template <class T>
inline void write(T* p, typename Vec<T>::type value) {
  store<T>(p, value);
}

// A sum of vectors and of the values left over.
template <class T>
struct Sum {
  typename Vec<T>::type vectors{};
  T rest = 0;
  void add(T v) { rest += v; }
  void add(typename Vec<T>::type v) { vectors += v; }
  T total() const { return reduce_add<T>(vectors) + rest; }
};

// The largest and smallest value.
template <class T>
struct Range {
  typename Vec<T>::type tops = splat(-std::numeric_limits<T>::infinity()),
                        bottoms = splat(std::numeric_limits<T>::infinity());
  T rest_top = -std::numeric_limits<T>::infinity(), rest_bottom = std::numeric_limits<T>::infinity();
  void add(T v) { rest_top = std::max(rest_top, v), rest_bottom = std::min(rest_bottom, v); }
  void add(typename Vec<T>::type v) { tops = vmax(tops, v), bottoms = vmin(bottoms, v); }
  T top() const { return std::max(rest_top, reduce_max<T>(tops)); }
  T bottom() const { return std::min(rest_bottom, -reduce_max<T>(-bottoms)); }
};

template <class T>
T deviation_of(const T* s, int64_t n, T mean) {  // unbiased; n > 1
  Sum<T> squares;
  for_row<T>(n, [&](int64_t j, auto v) {
    read(s + j, v);
    v = v - mean;
    squares.add(v * v);
  });
  return std::sqrt(squares.total() / T(n - 1));
}

// One row of n values: scaled, measured, and turned into its softmax while it is in the cache. Returns 1 / temperature.
template <class T>
T softmax_row(T* s, const T* scale, int64_t n, bool contrast) {
  Range<T> range;
  Sum<T> values;
  for_row<T>(n, [&](int64_t j, auto v) {
    read(s + j, v);
    if (scale) {
      auto factor = v;
      read(scale + j, factor);
      write(s + j, v = v * factor);
    }
    range.add(v);
    values.add(v);
  });
  const T top = range.top();
  T inverse = 1;
  if (contrast) {
    inverse =
        is_constant(top, range.bottom()) ? T(0) : 1 / (deviation_of(s, n, values.total() / T(n)) + T(kSigmaEpsilon));
  }
  Sum<T> total;
  for_row<T>(n, [&](int64_t j, auto v) {
    read(s + j, v);
    v = exp_negative((v - top) * inverse);
    write(s + j, v);
    total.add(v);
  });
  const T norm = 1 / total.total();
  for_row<T>(n, [&](int64_t j, auto v) {
    read(s + j, v);
    write(s + j, v * norm);
  });
  return inverse;
}

Tensor contrast_softmax_(Tensor& s, const std::optional<Tensor>& col_scale, bool contrast) {
  check_panel(s, "contrast_softmax_: s");
  const Tensor scale = checked_scale(col_scale, s);
  auto inverse = at::empty({s.size(0)}, s.options());
  const int64_t n = s.size(1);
  if (s.numel() == 0) return inverse.zero_();
  AT_DISPATCH_FLOATING_TYPES(s.scalar_type(), "contrast_softmax_", [&] {
    auto* p = s.mutable_data_ptr<scalar_t>();
    auto* out = inverse.mutable_data_ptr<scalar_t>();
    const auto* factor = scale.defined() ? scale.const_data_ptr<scalar_t>() : nullptr;
    at::parallel_for(0, s.size(0), 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) out[i] = softmax_row(p + i * n, factor, n, contrast);
    });
  });
  return inverse;
}

// m <- P (m - <P, m>) row_scale for one row.
template <class T>
void softmax_grad_row(T* m, const T* p, int64_t n, T row_scale) {
  Sum<T> sum;
  for_row<T>(n, [&](int64_t j, auto v) {
    auto q = v;
    read(m + j, v);
    read(p + j, q);
    sum.add(v * q);
  });
  const T mean = sum.total();
  for_row<T>(n, [&](int64_t j, auto v) {
    auto q = v;
    read(m + j, v);
    read(p + j, q);
    write(m + j, q * (v - mean) * row_scale);
  });
}

void softmax_grad_(Tensor& m, const Tensor& p, const Tensor& row_scale) {
  check_softmax_grad(m, p, row_scale);
  const Tensor row = row_scale.contiguous();
  const int64_t n = m.size(1);
  AT_DISPATCH_FLOATING_TYPES(m.scalar_type(), "softmax_grad_", [&] {
    auto* x = m.mutable_data_ptr<scalar_t>();
    const auto *q = p.const_data_ptr<scalar_t>(), *factor = row.const_data_ptr<scalar_t>();
    at::parallel_for(0, m.size(0), 8, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) softmax_grad_row(x + i * n, q + i * n, n, factor[i]);
    });
  });
}

// ---- attention ------------------------------------------------------------------------------------------------------

// Of vector j, or of vectors j, j + 1, ... of stats [5, n].
template <class T, class V>
AttentionRow<V> attention_row(const T* stats, int64_t n, int64_t j, V) {
  V inverse, top, peak, mean, scale;
  read(stats + j, inverse);
  read(stats + n + j, top);
  read(stats + 2 * n + j, peak);
  read(stats + 3 * n + j, mean);
  read(stats + 4 * n + j, scale);
  return {inverse, top, peak, mean, scale};
}

// One row of s, x, y and its vector; returns the sum of A_ji y_ij and adds A_ij x_ij to col_sum.
template <class T>
T attention_grad_row(T* s, T* x, T* y, int64_t n, const AttentionRow<T>& row, const T* cols, T* col_sum) {
  Sum<T> row_sum;
  for_row<T>(n, [&](int64_t j, auto v) {
    using V = decltype(v);
    const auto same = [](T value) { return V{} + value; };
    const AttentionRow<V> here{same(row.inverse), same(row.top), same(row.peak), same(row.mean), same(row.scale)};
    const auto there = attention_row(cols, n, j, v);
    V x_ij, y_ij, so_far;
    read(s + j, v);
    read(x + j, x_ij);
    read(y + j, y_ij);
    read(col_sum + j, so_far);
    v = v * there.scale;
    const V a = here.attention(v), b = there.attention(v);
    row_sum.add(b * y_ij);
    write(col_sum + j, so_far + a * x_ij);
    write(s + j, here.scale * there.scale * (here.gradient(a, x_ij) + there.gradient(b, y_ij)));
    write(x + j, a);
    write(y + j, b);
  });
  return row_sum.total();
}

std::tuple<Tensor, Tensor> attention_grad_(Tensor& s, Tensor& x, Tensor& y, const Tensor& rows, const Tensor& cols) {
  check_attention_grad(s, x, y, rows, cols);
  const int64_t r = s.size(0), n = s.size(1);
  auto row_sum = at::zeros({r}, s.options());
  if (s.numel() == 0) return {row_sum, at::zeros({n}, s.options())};
  const int64_t threads = at::get_num_threads(), chunk = (r + threads - 1) / threads, chunks = (r + chunk - 1) / chunk;
  const auto partial = at::zeros({chunks, n}, s.options());  // added up in order: the same bits each run
  AT_DISPATCH_FLOATING_TYPES(s.scalar_type(), "attention_grad_", [&] {
    auto *s_ = s.mutable_data_ptr<scalar_t>(), *x_ = x.mutable_data_ptr<scalar_t>(),
         *y_ = y.mutable_data_ptr<scalar_t>(), *by_row = row_sum.mutable_data_ptr<scalar_t>(),
         *by_col = partial.mutable_data_ptr<scalar_t>();
    const auto *row = rows.const_data_ptr<scalar_t>(), *col = cols.const_data_ptr<scalar_t>();
    at::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; k++) {
        for (int64_t i = k * chunk; i < std::min(r, (k + 1) * chunk); i++) {
          by_row[i] = attention_grad_row(s_ + i * n, x_ + i * n, y_ + i * n, n, attention_row(row, r, i, scalar_t{}),
                                         col, by_col + k * n);
        }
      }
    });
  });
  return {row_sum, partial.sum(0)};
}

}  // namespace
}  // namespace segadapt

TORCH_LIBRARY_IMPL(segadapt, CPU, m) {
  m.impl("mutual_argmax", segadapt::mutual_argmax);
  m.impl("product_argmax", segadapt::product_argmax);
  m.impl("contrast_softmax_", segadapt::contrast_softmax_);
  m.impl("softmax_grad_", segadapt::softmax_grad_);
  m.impl("attention_grad_", segadapt::attention_grad_);
}
