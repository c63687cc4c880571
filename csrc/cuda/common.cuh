// What every CUDA kernel here uses: launches, 16-byte loads and stores, reductions over a block.
//
// The same files compile with g++ against tests/cuda_host/emulation.h, which runs them without a GPU. Kernels stay
// within what it knows: threads of one dimension in whole warps, static shared memory, shuffles with a full mask. They
// live in unnamed namespaces: there shared arrays are plain objects of one file, which AddressSanitizer guards.
//
// Nothing here waits for the device, and nothing uses atomics: results are the same in every run.
//
// Floors in the kernels' comments are the time of their memory traffic alone, in ns per million elements, at the
// bandwidth of an A100-80GB (2,039 GB/s) and of an H100-SXM (3,350 GB/s): 490 and 299 for each byte per element.
#pragma once

#include <climits>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include "emulation.h"
#endif

#include "../kernels.h"
#include "../math/numbers.h"

namespace megatron {
namespace {

constexpr int WARP = 32;
constexpr int MAX_WARPS = 32;  // of a block, on every device so far
constexpr unsigned ALL_LANES = 0xFFFFFFFFu;

// ---------------------------------------------------------------------------------------------------------- launches

// Runs `kernel` in `blocks` × `layers` blocks; the launch's error, or 0.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, int64_t layers, int threads, void* stream,
           Arguments... arguments) {
  if (blocks > INT_MAX || layers > USHRT_MAX) return UNSUPPORTED;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(layers));
#ifdef __CUDACC__
  kernel<<<grid, threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
#else
  emulation::launch(grid, threads, stream, [&] { kernel(arguments...); });
#endif
  return static_cast<int>(cudaGetLastError());
}

// Calls work(T()) for the T that `dtype` names. Training on GPUs never uses float64: its callers take the reference.
template <typename Work>
int with_type(int dtype, Work work) {
  if (dtype == FLOAT32) return work(float());
  if (dtype == BFLOAT16) return work(bfloat16());
  return UNSUPPORTED;
}

inline int64_t ceil_div(int64_t value, int64_t by) { return (value + by - 1) / by; }

// Threads of a block that shares `items`: whole warps, no more than there is work for.
inline int threads_for(int64_t items, int most) {
  const int64_t threads = ceil_div(items < 1 ? 1 : items, WARP) * WARP;
  return threads < most ? static_cast<int>(threads) : most;
}

// Where part `part` of `parts` begins: ⌊count · part / parts⌋.
__host__ __device__ __forceinline__ int64_t part_begin(int64_t count, int64_t parts, int64_t part) {
  return count * part / parts;
}

// ------------------------------------------------------------------------------------------------------------ memory

// As many elements as 16 bytes hold, the most that one thread loads at once.
template <typename T>
constexpr int FULL_PACK = 16 / static_cast<int>(sizeof(T));

template <typename T, int N>
struct alignas(sizeof(T) * N > 16 ? 16 : sizeof(T) * N) Pack {
  T values[N];
};

inline bool aligned(const void* address, size_t bytes) { return reinterpret_cast<uintptr_t>(address) % bytes == 0; }

template <typename... Addresses>
bool all_aligned(Addresses... addresses) {
  return (aligned(addresses, 16) && ...);  // null is aligned
}

// N neighbours from `from`, which is aligned to the pack's size or to 16 bytes. The detour over uint4 makes sure of one
// wide instruction.
template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load(const T* from) {
  Pack<T, N> pack;
  if constexpr (sizeof pack % 16 == 0) {
#pragma unroll
    for (int part = 0; part < static_cast<int>(sizeof pack / 16); ++part) {
      const uint4 raw = reinterpret_cast<const uint4*>(from)[part];
      memcpy(reinterpret_cast<char*>(&pack) + 16 * part, &raw, 16);
    }
  } else {
    static_assert(N == 1, "load one element, or multiples of 16 bytes");
    pack.values[0] = *from;
  }
  return pack;
}

// The `index`-th four bytes of a pack.
template <int N>
__device__ __forceinline__ uint32_t word(const Pack<float, N>& pack, int index) {
  return as_bits(pack.values[index]);
}
template <int N>
__device__ __forceinline__ uint32_t word(const Pack<bfloat16, N>& pack, int index) {
  return pack.values[2 * index].bits | static_cast<uint32_t>(pack.values[2 * index + 1].bits) << 16;
}

// __stwb is an ordinary store that the compiler does not divide, as it did plain ones where values came by selection.
template <int N, typename T>
__device__ __forceinline__ void store(T* to, const Pack<T, N>& pack) {
  if constexpr (sizeof pack % 16 == 0) {
#pragma unroll
    for (int part = 0; part < static_cast<int>(sizeof pack / 16); ++part) {
      const int first = 4 * part;
      __stwb(reinterpret_cast<uint4*>(to) + part,
             uint4{word(pack, first), word(pack, first + 1), word(pack, first + 2), word(pack, first + 3)});
    }
  } else if constexpr (sizeof pack == 8) {
    __stwb(reinterpret_cast<uint2*>(to), uint2{word(pack, 0), word(pack, 1)});
  } else {
    static_assert(N == 1, "store one element, 8 bytes, or multiples of 16");
    *to = pack.values[0];
  }
}

// How `count` elements from an address divide: single ones up to a 16-byte boundary, packs, and single ones again.
struct Span {
  int64_t head, packs, tail;  // elements, packs, and the first element after the packs
};

template <typename T>
__device__ __forceinline__ Span span_of(const T* from, int64_t count) {
  constexpr int N = FULL_PACK<T>;
  const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(from) % 16 / sizeof(T));
  const int64_t to_boundary = past == 0 ? 0 : N - past;
  const int64_t head = to_boundary < count ? to_boundary : count;
  const int64_t packs = (count - head) / N;
  return {head, packs, head + packs * N};
}

// -------------------------------------------------------------------------------------------------------- reductions

struct Add {
  template <typename W>
  __device__ __forceinline__ W operator()(W left, W right) const {
    return left + right;
  }
};

struct Larger {
  __device__ __forceinline__ float operator()(float left, float right) const { return fmaxf(left, right); }
};

// Over a warp; every lane gets the same bits, since each step combines the same two values in both its lanes.
template <typename W, typename Combine>
__device__ __forceinline__ W warp_reduce(W value, Combine combine) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(ALL_LANES, value, distance));
  }
  return value;
}

// Over a block of whole warps; every thread gets the same bits. All threads must call it.
template <typename W, typename Combine>
__device__ __forceinline__ W block_reduce(W value, W identity, Combine combine) {
  __shared__ W partial[MAX_WARPS];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  value = warp_reduce(value, combine);
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  value = warp_reduce(lane < warps ? partial[lane] : identity, combine);
  __syncthreads();  // the next reduction writes where slower warps still read
  return value;
}

template <typename W>
__device__ __forceinline__ W block_sum(W value) {
  return block_reduce(value, W(0), Add());
}

}  // namespace
}  // namespace megatron
