// CUDA's language on the host: csrc/cuda/*.cu compile against this with g++, kernels run thread by thread.
//
// Every CUDA thread is a fiber, an own stack that runs until it waits: at __syncthreads for its block, at a warp
// primitive for the lanes that its mask names. A wait that CUDA leaves undefined ends the process with the kernel's
// name and the thread: lanes of one mask at different primitives, a mask without the caller or with a lane that has
// left, threads at different barriers, a wait that nobody ends. So does a launch that a GPU would refuse.
// One block runs at a time, so __shared__ is static memory; extern __shared__ is NaN at the start of each block.
// Atomics need no more than plain additions.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

using cudaStream_t = void*;

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  int64_t x, y, z;  // wide enough to see a size that does not fit
  dim3(int64_t x, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
};

namespace emulated {

struct Place {  // of the running thread
  uint3 thread, block, block_size, grid_size;
};
extern Place place;
extern void* shared_memory;  // what the launch asks for

void run_blocks(const char* kernel, dim3 grid, dim3 block, size_t shared, void (*body)(void*), void* arguments);
void wait_for_block(int line);
void wait_for_warp(unsigned mask, int line);
void offer(uint64_t value);          // what the running lane shows its warp
uint64_t offered_by(unsigned lane);  // of the same warp
[[noreturn]] void fail(const char* what);

template <class Kernel>
struct Launch {
  const char* name;
  Kernel kernel;
  dim3 grid, block;
  size_t shared;

  template <class... Arguments>
  void operator()(Arguments... arguments) {
    struct Call {
      Kernel* kernel;
      std::tuple<Arguments...> arguments;
    } call{&kernel, {arguments...}};
    run_blocks(
        name, grid, block, shared,
        [](void* p) {
          auto* call = static_cast<Call*>(p);
          std::apply([&](auto... values) { (*call->kernel)(values...); }, call->arguments);
        },
        &call);
  }
};

template <class Kernel>
Launch<Kernel> launch(const char* name, Kernel kernel, dim3 grid, dim3 block, size_t shared = 0, cudaStream_t = {}) {
  return {name, kernel, grid, block, shared};
}

template <class To, class From>
To bits(From value) {
  static_assert(sizeof(From) <= 8 && sizeof(To) <= 8);
  uint64_t wide = 0;
  To result;
  std::memcpy(&wide, &value, sizeof value);
  std::memcpy(&result, &wide, sizeof result);
  return result;
}

// All lanes of the mask offer a value, read those of the others, and go on together.
template <class T, class Read>
auto exchange(unsigned mask, T value, int line, Read read) {
  offer(bits<uint64_t>(value));
  wait_for_warp(mask, line);
  const auto result = read();
  wait_for_warp(mask, -line);
  return result;
}

inline unsigned lane() { return place.thread.x % 32; }  // blocks are one-dimensional

template <class T>
T from_lane(unsigned mask, unsigned source, T own) {
  if (source >= 32) return own;
  if (!(mask >> source & 1)) fail("a shuffle reads from a lane outside its mask");
  return bits<T>(offered_by(source));
}

template <class Accept>
unsigned lanes_that(unsigned mask, Accept accept) {
  unsigned found = 0;
  for (unsigned l = 0; l < 32; ++l) found |= unsigned((mask >> l & 1) && accept(offered_by(l))) << l;
  return found;
}

}  // namespace emulated

#define threadIdx (::emulated::place.thread)
#define blockIdx (::emulated::place.block)
#define blockDim (::emulated::place.block_size)
#define gridDim (::emulated::place.grid_size)

// A place in the source is its line: compilers copy code, so that an address would not do.
inline void __syncthreads(int line = __builtin_LINE()) { emulated::wait_for_block(line); }
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) { emulated::wait_for_warp(mask, line); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int = 32, int line = __builtin_LINE()) {
  return emulated::exchange(mask, value, line, [=] { return emulated::from_lane(mask, unsigned(source) % 32, value); });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned step, int = 32, int line = __builtin_LINE()) {
  return emulated::exchange(mask, value, line,
                            [=] { return emulated::from_lane(mask, emulated::lane() + step, value); });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned flip, int = 32, int line = __builtin_LINE()) {
  return emulated::exchange(mask, value, line,
                            [=] { return emulated::from_lane(mask, emulated::lane() ^ flip, value); });
}
inline unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return emulated::exchange(mask, int(predicate != 0), line,
                            [=] { return emulated::lanes_that(mask, [](uint64_t other) { return other != 0; }); });
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, int line = __builtin_LINE()) {
  return emulated::exchange(mask, value, line, [=] {
    return emulated::lanes_that(mask, [=](uint64_t other) { return other == emulated::bits<uint64_t>(value); });
  });
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __float_as_int(float x) { return emulated::bits<int>(x); }
inline float __int_as_float(int x) { return emulated::bits<float>(x); }

// One rounding each, as _rn says (the sources are compiled with -ffp-contract=off).
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

inline float max(float a, float b) { return std::fmax(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
inline int max(int a, int b) { return a < b ? b : a; }
inline int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }
inline float min(float a, float b) { return std::fmin(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline int min(int a, int b) { return b < a ? b : a; }
inline int64_t min(int64_t a, int64_t b) { return b < a ? b : a; }
using std::abs;
using std::exp;
using std::sqrt;

template <class T>
T atomicAdd(T* address, T value) {
  return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);
}
