// What association.cu and retrieval.cu share: blocks of eight warps, and the exact product that a warp computes.
#pragma once
#include <cstdint>

namespace segadapt {

constexpr int kThreads = 256, kWarps = kThreads / 32;  // of a block
constexpr unsigned kAll = 0xffffffffu;                 // lanes of a warp

inline int64_t blocks_for(int64_t items, int64_t items_per_block) {
  return (items + items_per_block - 1) / items_per_block;
}

// Float64 dot product of x / nx and y / ny by one warp, in the order of csrc/cpu/argmax.h: lane l < 16 sums
// k mod 16 = l. Every lane gets it.
template <class T>
__device__ double exact_dot(const T* x, T nx, const T* y, T ny, int64_t c) {
  const int lane = threadIdx.x % 32;
  double sum = 0;
  if (lane < 16)
    for (int64_t k = lane; k < c; k += 16) sum = __dadd_rn(sum, __dmul_rn(double(x[k] / nx), double(y[k] / ny)));
  for (int step = 8; step; step /= 2) sum = __dadd_rn(sum, __shfl_down_sync(kAll, sum, step));
  return __shfl_sync(kAll, sum, 0);
}

}  // namespace segadapt
