#include <ATen/Dispatch.h>
#include <torch/library.h>

#include "argmax.h"

namespace segadapt {
namespace {

using at::Tensor;

constexpr int64_t kTileRows = 512, kTileCols = 1024;  // 2 MB of products, which stay in the cache until they are read

std::tuple<Tensor, Tensor, Tensor, Tensor> mutual_argmax(const Tensor& a, const Tensor& b) {
  TORCH_CHECK_VALUE(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(1) && a.size(0) > 0 && b.size(0) > 0,
                    "mutual_argmax: a and b must be [N1, C] and [N2, C], got ", a.sizes(), " and ", b.sizes());
  TORCH_CHECK_VALUE(
      a.scalar_type() == b.scalar_type() && (a.scalar_type() == at::kFloat || a.scalar_type() == at::kDouble),
      "mutual_argmax: a and b must both be float32 or float64");
  auto row_index = at::empty({a.size(0)}, a.options().dtype(at::kLong)),
       row_value = at::empty({a.size(0)}, a.options());
  auto col_index = at::empty({b.size(0)}, row_index.options()), col_value = at::empty({b.size(0)}, a.options());
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "mutual_argmax", [&] {
    const auto x = make_side<scalar_t>(a, true, "mutual_argmax: a"),
               y = make_side<scalar_t>(b, true, "mutual_argmax: b");
    Candidates<scalar_t> by_row(x, y), by_col(y, x);
    scan_tiles(x, y, by_row, &by_col, kTileRows, kTileCols);
    by_row.finish(row_index.mutable_data_ptr<int64_t>(), row_value.mutable_data_ptr<scalar_t>());
    by_col.finish(col_index.mutable_data_ptr<int64_t>(), col_value.mutable_data_ptr<scalar_t>());
  });
  return {row_index, row_value, col_index, col_value};
}

Tensor product_argmax(const Tensor& x, const Tensor& y) {
  TORCH_CHECK_VALUE(x.dim() == 2 && y.dim() == 2 && x.size(1) == y.size(1) && x.size(0) > 0 && y.size(0) > 0,
                    "product_argmax: x and y must be [N1, C] and [N2, C], got ", x.sizes(), " and ", y.sizes());
  TORCH_CHECK_VALUE(
      x.scalar_type() == y.scalar_type() && (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble),
      "product_argmax: x and y must both be float32 or float64");
  auto index = at::empty({x.size(0)}, x.options().dtype(at::kLong)), value = at::empty({x.size(0)}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "product_argmax", [&] {
    const auto left = make_side<scalar_t>(x, false, "product_argmax: x"),
               right = make_side<scalar_t>(y, false, "product_argmax: y");
    Candidates<scalar_t> by_row(left, right);
    scan_tiles<scalar_t>(left, right, by_row, nullptr, kTileRows, kTileCols);
    by_row.finish(index.mutable_data_ptr<int64_t>(), value.mutable_data_ptr<scalar_t>());
  });
  return index;
}

void check_panel(const Tensor& t, const char* name) {
  TORCH_CHECK_VALUE(
      t.dim() == 2 && t.is_contiguous() && (t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble), name,
      " must be a contiguous float32 or float64 matrix");
}

// One row of n values: scaled, measured, and turned into its softmax while it is in the cache. Returns 1 / temperature.
template <class T>
T softmax_row(T* s, const T* scale, int64_t n, bool contrast) {
  constexpr int w = Vec<T>::lanes;
  using V = typename Vec<T>::type;
  const T lowest = -std::numeric_limits<T>::infinity();
  const int64_t whole = n / w * w;
  V top = splat(lowest), bottom = splat(-lowest), sum{};
  T top1 = lowest, bottom1 = -lowest, sum1 = 0;
  for (int64_t j = 0; j < whole; j += w) {
    V v = load<T>(s + j);
    if (scale) store<T>(s + j, v = v * load<T>(scale + j));
    top = vmax(top, v), bottom = v < bottom ? v : bottom, sum += v;
  }
  for (int64_t j = whole; j < n; j++) {
    if (scale) s[j] *= scale[j];
    top1 = std::max(top1, s[j]), bottom1 = std::min(bottom1, s[j]), sum1 += s[j];
  }
  top1 = std::max(top1, reduce_max<T>(top)), bottom1 = std::min(bottom1, -reduce_max<T>(-bottom));
  T inverse = 1;
  if (contrast) {
    const T mean = (reduce_add<T>(sum) + sum1) / T(n);
    V square{};
    T square1 = 0;
    for (int64_t j = 0; j < whole; j += w) {
      const V d = load<T>(s + j) - mean;
      square += d * d;
    }
    for (int64_t j = whole; j < n; j++) square1 += (s[j] - mean) * (s[j] - mean);
    const T sigma = n > 1 ? std::sqrt((reduce_add<T>(square) + square1) / T(n - 1)) : T(0);
    const T noise = 8 * std::numeric_limits<T>::epsilon() * std::max(std::abs(top1), std::abs(bottom1));
    inverse = sigma > noise ? 1 / (sigma + T(1e-10)) : T(0);
  }
  V total{};
  T total1 = 0;
  for (int64_t j = 0; j < whole; j += w) {
    const V e = vexp((load<T>(s + j) - top1) * inverse);
    store<T>(s + j, e);
    total += e;
  }
  for (int64_t j = whole; j < n; j++) total1 += s[j] = std::exp((s[j] - top1) * inverse);
  const T norm = 1 / (reduce_add<T>(total) + total1);
  for (int64_t j = 0; j < whole; j += w) store<T>(s + j, load<T>(s + j) * norm);
  for (int64_t j = whole; j < n; j++) s[j] *= norm;
  return inverse;
}

Tensor contrast_softmax_(Tensor& s, const std::optional<Tensor>& col_scale, bool contrast) {
  check_panel(s, "contrast_softmax_: s");
  auto inverse = at::empty({s.size(0)}, s.options());
  const auto scale = col_scale ? col_scale->to(s.scalar_type()).contiguous() : Tensor();
  TORCH_CHECK_VALUE(!col_scale || scale.numel() == s.size(1), "contrast_softmax_: one scale for each column expected");
  const int64_t n = s.size(1);
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

void softmax_grad_(Tensor& m, const Tensor& p, const Tensor& row_scale, const std::optional<Tensor>& col_scale,
                   Tensor& col_sum) {
  check_panel(m, "softmax_grad_: m");
  check_panel(p, "softmax_grad_: p");
  const int64_t rows = m.size(0), n = m.size(1);
  TORCH_CHECK_VALUE(m.sizes() == p.sizes() && row_scale.numel() == rows && col_sum.numel() == n &&
                        col_sum.is_contiguous() && (!col_scale || col_scale->numel() == n),
                    "softmax_grad_: sizes differ");
  const auto row = row_scale.contiguous(), col = col_scale ? col_scale->contiguous() : Tensor();
  AT_DISPATCH_FLOATING_TYPES(m.scalar_type(), "softmax_grad_", [&] {
    constexpr int w = Vec<scalar_t>::lanes;
    auto *x = m.mutable_data_ptr<scalar_t>(), *sums = col_sum.mutable_data_ptr<scalar_t>();
    const auto *q = p.const_data_ptr<scalar_t>(), *factor = row.const_data_ptr<scalar_t>();
    const auto* scale = col.defined() ? col.const_data_ptr<scalar_t>() : nullptr;
    const int64_t threads = at::get_num_threads(), chunk = (rows + threads - 1) / threads, whole = n / w * w;
    std::vector<std::vector<scalar_t>> partial((rows + chunk - 1) / chunk);
    at::parallel_for(0, partial.size(), 1, [&](int64_t first, int64_t last) {
      for (int64_t k = first; k < last; k++) {
        auto& part = partial[k];
        part.assign(n, 0);
        for (int64_t i = k * chunk; i < std::min(rows, (k + 1) * chunk); i++) {
          scalar_t* xi = x + i * n;
          const scalar_t* qi = q + i * n;
          typename Vec<scalar_t>::type sum{};
          scalar_t sum1 = 0;
          for (int64_t j = 0; j < whole; j += w) {
            const auto v = load<scalar_t>(xi + j) * load<scalar_t>(qi + j);
            sum += v;
            store<scalar_t>(&part[j], load<scalar_t>(&part[j]) + v);
          }
          for (int64_t j = whole; j < n; j++) sum1 += xi[j] * qi[j], part[j] += xi[j] * qi[j];
          sum1 += reduce_add<scalar_t>(sum);
          for (int64_t j = 0; j < whole; j += w) {
            auto v = load<scalar_t>(qi + j) * (load<scalar_t>(xi + j) - sum1) * factor[i];
            if (scale) v = v * load<scalar_t>(scale + j);
            store<scalar_t>(xi + j, v);
          }
          for (int64_t j = whole; j < n; j++)
            xi[j] = qi[j] * (xi[j] - sum1) * factor[i] * (scale ? scale[j] : scalar_t(1));
        }
      }
    });
    for (const auto& part : partial)
      for (int64_t j = 0; j < n; j++) sums[j] += part[j];
  });
}

}  // namespace
}  // namespace segadapt

TORCH_LIBRARY_IMPL(segadapt, CPU, m) {
  m.impl("mutual_argmax", segadapt::mutual_argmax);
  m.impl("product_argmax", segadapt::product_argmax);
  m.impl("contrast_softmax_", segadapt::contrast_softmax_);
  m.impl("softmax_grad_", segadapt::softmax_grad_);
}
