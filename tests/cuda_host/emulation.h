// CUDA's words for g++, so that the kernels of csrc/cuda run on the host: each CUDA thread is a fiber (emulation.cpp).
//
// It knows blocks of one dimension, static shared memory, __syncthreads, __syncwarp and shuffles with a full mask. It
// is stricter than a GPU: threads that leave while others wait are an error, and so is a lane that waits elsewhere than
// its warp. What it cannot show: the weak ordering of memory, tensor cores, asynchronous copies, speed.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

// Blocks run one after the other on one operating-system thread, so static objects serve them all. As thread-local ones
// they lie together in memory, which is filled with NaN before each block: shared memory starts as garbage. Sanitizers
// guard only the plain ones. (A section of their own will not do: g++ ignores the attribute in templates.)
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct __attribute__((may_alias, aligned(8))) uint2 {
  unsigned x, y;
};
struct __attribute__((may_alias, aligned(16))) uint4 {
  unsigned x, y, z, w;
};

// The fiber that runs now finds its own here: the switch between fibers sets them.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = void*;
enum cudaError_t : int { cudaSuccess = 0, cudaErrorInvalidConfiguration = 9, cudaErrorLaunchFailure = 719 };

// A store with a hint for the caches.
template <typename T>
void __stwb(T* to, T value) {
  *to = value;
}

cudaError_t cudaGetLastError();
void __syncthreads();
void __syncwarp(unsigned mask = 0xFFFFFFFFu);

namespace emulation {

void run(dim3 grid, unsigned threads, void (*body)(void*), void* context);

template <typename Body>
void launch(dim3 grid, unsigned threads, void* stream, Body body) {
  (void)stream;
  run(grid, threads, [](void* context) { (*static_cast<Body*>(context))(); }, &body);
}

// What lane `source` of this warp gives in the same call.
uint64_t exchange(unsigned mask, uint64_t value, unsigned source);
unsigned lane();

template <typename T>
T shuffle(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "shuffles move up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulation

// A source outside the caller's segment of `width` lanes means the caller's own value, as on the device.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned lane = emulation::lane(), segment = lane & ~unsigned(width - 1);
  return emulation::shuffle(mask, value, segment | (unsigned(source) & unsigned(width - 1)));
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32) {
  const unsigned lane = emulation::lane(), end = (lane | unsigned(width - 1)) + 1, source = lane ^ unsigned(distance);
  return emulation::shuffle(mask, value, source < end ? source : lane);
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const unsigned lane = emulation::lane(), end = (lane | unsigned(width - 1)) + 1, source = lane + distance;
  return emulation::shuffle(mask, value, source < end ? source : lane);
}
