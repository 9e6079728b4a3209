// Sixteen floats (or eight doubles) at a time in the compilers' portable vector types: AVX-512, AVX2, NEON or plain
// code.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace segadapt {

template <class T>
struct Vec {
  static constexpr int lanes = 64 / sizeof(T);
  typedef T type __attribute__((vector_size(64)));
};
using vf = Vec<float>::type;
using vi = int32_t __attribute__((vector_size(64)));

template <class T>
inline typename Vec<T>::type load(const T* p) {
  typename Vec<T>::type v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, typename Vec<T>::type v) {
  std::memcpy(p, &v, sizeof v);
}

template <class T>
inline typename Vec<T>::type splat(T x) {
  return typename Vec<T>::type{} + x;
}

template <class V>
inline V vmax(V a, V b) {
  return a > b ? a : b;
}

template <class T>
inline T reduce_max(typename Vec<T>::type v) {
  T m = v[0];
  for (int l = 1; l < Vec<T>::lanes; l++) m = v[l] > m ? v[l] : m;
  return m;
}

template <class T>
inline T reduce_add(typename Vec<T>::type v) {  // a fixed tree
  for (int step = Vec<T>::lanes / 2; step; step /= 2)
    for (int l = 0; l < step; l++) v[l] += v[l + step];
  return v[0];
}

// One bit per lane in which a >= b.
inline uint32_t mask_ge(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
#elif defined(__AVX2__)
  __m256 x[2], y[2];
  std::memcpy(x, &a, sizeof a);
  std::memcpy(y, &b, sizeof b);
  return _mm256_movemask_ps(_mm256_cmp_ps(x[0], y[0], _CMP_GE_OQ)) |
         _mm256_movemask_ps(_mm256_cmp_ps(x[1], y[1], _CMP_GE_OQ)) << 8;
#else
  uint32_t bits = 0;
  for (int l = 0; l < 16; l++) bits |= uint32_t(a[l] >= b[l]) << l;
  return bits;
#endif
}
inline uint32_t mask_ge(Vec<double>::type a, Vec<double>::type b) {
  uint32_t bits = 0;
  for (int l = 0; l < 8; l++) bits |= uint32_t(a[l] >= b[l]) << l;
  return bits;
}

// exp to 2 ulp for x <= 88; below -87 it is 0. (Cephes' reduction and polynomial.)
inline vf vexp(vf x) {
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  vf n = (x * 1.44269504088896341f + magic) - magic;
  vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  vi bits;
  vi exponent = (__builtin_convertvector(n, vi) + 127) << 23;
  std::memcpy(&bits, &exponent, sizeof bits);
  vf scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return x < splat(-87.f) ? vf{} : p * scale;
}
inline Vec<double>::type vexp(Vec<double>::type x) {
  for (int l = 0; l < 8; l++) x[l] = std::exp(x[l]);
  return x;
}

}  // namespace segadapt
