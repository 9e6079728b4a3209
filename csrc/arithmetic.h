// Float arithmetic that the CPU and CUDA kernels share operation by operation, so that both round alike: products,
// sums and fused products are never contracted or reordered. cpu/vec.h has the same for vectors.
#pragma once
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define SEGADAPT_SHARED __host__ __device__ inline
#else
#define SEGADAPT_SHARED inline
#endif

namespace segadapt {

SEGADAPT_SHARED float product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;  // -ffp-contract=off
#endif
}

SEGADAPT_SHARED double product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// a b + c with one rounding where the processor has that instruction, as all GPUs do. (Without it, bits may differ.)
template <class T>
SEGADAPT_SHARED T fused(T a, T b, T c) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__aarch64__)
  using std::fma;
  return fma(a, b, c);
#else
  return a * b + c;
#endif
}

SEGADAPT_SHARED int32_t as_bits(float x) { return __builtin_bit_cast(int32_t, x); }
SEGADAPT_SHARED float from_bits(int32_t x) { return __builtin_bit_cast(float, x); }

}  // namespace segadapt
