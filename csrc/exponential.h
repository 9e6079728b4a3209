// The exponential of every softmax, operation by operation the same on the CPU and on CUDA. V: float or, on the CPU,
// a vector of them, whose operations must be declared before (cpu/vec.h).
#pragma once
#include "arithmetic.h"

namespace segadapt {

// e^x for x <= 0 to about one unit in the last place, 0 where the result would be subnormal, exactly 1 for 0. (The
// reduction and the polynomial are those of Cephes' expf.)
template <class V>
SEGADAPT_SHARED V exp_negative(V x) {
  const V zero{};
  const V shifter = zero + 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits
  const V shifted = fused(x, zero + 1.44269504088896341f, shifter), n = shifted - shifter;
  const V r = fused(n, zero + 2.12194440e-4f, fused(n, zero - 0.693359375f, x));
  V p = zero + 1.9875691500e-4f;
  p = fused(p, r, zero + 1.3981999507e-3f);
  p = fused(p, r, zero + 8.3334519073e-3f);
  p = fused(p, r, zero + 4.1665795894e-2f);
  p = fused(p, r, zero + 1.6666665459e-1f);
  p = fused(p, r, zero + 5.0000001201e-1f);
  p = fused(p, product(r, r), r) + 1.f;
  // p 2^n: the low bits of shifted, which are n, go into the exponent. From -87 on it stays one: p > 1 for the lowest
  // n.
  return x < zero - 87.f ? zero : from_bits(as_bits(p) + (as_bits(shifted) << 23));
}
SEGADAPT_SHARED double exp_negative(double x) {
  using std::exp;
  return exp(x);
}

}  // namespace segadapt
