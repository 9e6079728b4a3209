// A register of floats (or doubles) at a time in the compilers' portable vector types: AVX-512, AVX2, NEON or plain
// code. Not more than a register: GCC turns operations on longer vectors into one for each element.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#include "arithmetic.h"

namespace segadapt {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Vec {
  static constexpr int lanes = kVectorBytes / sizeof(T);
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
using vf = Vec<float>::type;
using vd = Vec<double>::type;
using vi = int32_t __attribute__((vector_size(kVectorBytes)));

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
  return x - typename Vec<T>::type{};  // + would turn -0 into 0, and is not left out
}

template <class V>
inline V vmax(V a, V b) {
  return a > b ? a : b;
}

template <class V>
inline V vmin(V a, V b) {
  return a < b ? a : b;
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
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ));
#else
  uint32_t bits = 0;
  for (int l = 0; l < Vec<float>::lanes; l++) bits |= uint32_t(a[l] >= b[l]) << l;
  return bits;
#endif
}
inline uint32_t mask_ge(vd a, vd b) {
  uint32_t bits = 0;
  for (int l = 0; l < Vec<double>::lanes; l++) bits |= uint32_t(a[l] >= b[l]) << l;
  return bits;
}

using Bytes = uint8_t __attribute__((vector_size(Vec<float>::lanes)));

// Values of 0 to 255 as bytes. (GCC would take the conversion apart, too.)
inline Bytes to_bytes(vi v) {
#if defined(__AVX512F__)
  return __builtin_bit_cast(Bytes, _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(__AVX2__)
  const __m256i all = (__m256i)v;
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
  return __builtin_bit_cast(Bytes, _mm_cvtsi128_si64(_mm_packus_epi16(words, words)));
#else
  return __builtin_convertvector(v, Bytes);
#endif
}

// ---- arithmetic.h for vectors ---------------------------------------------------------------------------------------

inline vf product(vf a, vf b) { return a * b; }

inline vf fused(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FMA__) || defined(__aarch64__)
  for (int l = 0; l < Vec<float>::lanes; ++l) a[l] = fused(a[l], b[l], c[l]);
  return a;
#else
  return a * b + c;
#endif
}

inline vf floor_of(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_floor_ps((__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_floor_ps((__m256)x);
#else
  for (int l = 0; l < Vec<float>::lanes; ++l) x[l] = std::floor(x[l]);
  return x;
#endif
}

// The lanes of x that index names.
inline vf permuted(vf x, vi index) {
#if defined(__AVX512F__)
  return (vf)_mm512_permutexvar_ps((__m512i)index, (__m512)x);
#elif defined(__AVX2__)
  return (vf)_mm256_permutevar8x32_ps((__m256)x, (__m256i)index);
#else
  vf named;
  for (int l = 0; l < Vec<float>::lanes; ++l) named[l] = x[index[l]];
  return named;
#endif
}

inline vi as_bits(vf x) { return __builtin_bit_cast(vi, x); }
inline vf from_bits(vi x) { return __builtin_bit_cast(vf, x); }

inline vd exp_negative(vd x) {
  for (int l = 0; l < Vec<double>::lanes; l++) x[l] = std::exp(x[l]);
  return x;
}

}  // namespace segadapt

#include "exponential.h"
