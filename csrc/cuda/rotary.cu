// Rotary position embedding (Su et al., 2021) fused into the splitting of qkv, and the way back.
#include "../math/rotary.h"

#include "common.cuh"

namespace megatron {
namespace {

constexpr int THREADS = 256;

struct Shape {
  int64_t s;
  int b, heads, kv, d;
};

// Query, key and value [b, heads or kv, s, d]; T is const in the backward pass.
template <typename T>
struct Heads {
  T *query, *key, *value;

  // Where head `head` of (query, key, value put together) begins.
  __device__ __forceinline__ T* at(const Shape& shape, int64_t position, int64_t batch, int head) const {
    const bool is_query = head < shape.heads;
    const int in_group = is_query ? head : (head - shape.heads) % shape.kv;
    T* const base = is_query ? query : (head < shape.heads + shape.kv ? key : value);
    const int64_t group = is_query ? shape.heads : shape.kv;
    return base + ((batch * group + in_group) * shape.s + position) * shape.d;
  }
};

template <typename T, int N>
struct Halves {
  Pack<T, N> first, second;

  __device__ __forceinline__ static Halves read(const T* from, int half) {
    return {load<N>(from), load<N>(from + half)};
  }

  __device__ __forceinline__ void write(T* to, int half) const {
    store(to, first);
    store(to + half, second);
  }

  template <bool BACK>
  __device__ __forceinline__ void rotate(const float* cos, const float* sin) {
    const Pack<float, N> cosines = load<N>(cos), sines = load<N>(sin);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float x = widen(first.values[i]), y = widen(second.values[i]);
      const Pair<float> turned = BACK ? turn_back(x, y, cosines.values[i], sines.values[i])
                                      : turn(x, y, cosines.values[i], sines.values[i]);
      first.values[i] = narrow<T>(turned.first);
      second.values[i] = narrow<T>(turned.second);
    }
  }
};

// One block per (position, batch), which is one row of qkv; each item is a pack of a head's first half and the pack of
// its second half that belongs to it. The row's cosines and sines come from L1 for all heads but the first. Bytes per
// element of qkv: 4 in bfloat16, 8 in float32, and the angles once for all heads (floor 1,962 / 1,194 and
// 3,923 / 2,388 ns per million elements on A100 / H100).
template <typename T, int N, bool BACK>
__global__ void __launch_bounds__(THREADS)
    rotary_kernel(const T* from_qkv, T* to_qkv, Heads<const T> from_heads, Heads<T> to_heads, const float* cos,
                  const float* sin, Shape shape) {
  const int64_t position = blockIdx.x / unsigned(shape.b), batch = blockIdx.x % unsigned(shape.b);
  const int half = shape.d / 2, packs = half / N, all_heads = shape.heads + 2 * shape.kv;
  const int64_t row = int64_t(blockIdx.x) * all_heads * shape.d;
  for (int item = threadIdx.x; item < all_heads * packs; item += blockDim.x) {
    const int head = item / packs, column = item % packs * N;
    const int64_t in_row = row + int64_t(head) * shape.d + column;
    const T* const source = BACK ? from_heads.at(shape, position, batch, head) + column : from_qkv + in_row;
    Halves<T, N> halves = Halves<T, N>::read(source, half);
    if (head < shape.heads + shape.kv) {
      const int64_t angle = position * shape.d + column;
      halves.template rotate<BACK>(cos + angle, sin + angle);
    }
    halves.write(BACK ? to_qkv + in_row : to_heads.at(shape, position, batch, head) + column, half);
  }
}

template <bool BACK, typename T>
int turn_all(const T* from_qkv, T* to_qkv, Heads<const T> from_heads, Heads<T> to_heads, const void* cos,
             const void* sin, int64_t s, int64_t b, int64_t heads, int64_t kv, int64_t d, void* stream) {
  constexpr int N = FULL_PACK<T>;
  const int64_t row = (heads + 2 * kv) * d;
  if (d % 2 != 0 || row > INT_MAX || b > INT_MAX) return UNSUPPORTED;
  if (s * b * row == 0) return 0;
  const Shape shape{s, static_cast<int>(b), static_cast<int>(heads), static_cast<int>(kv), static_cast<int>(d)};
  const bool wide = d / 2 % N == 0 && all_aligned(from_qkv, to_qkv, cos, sin) &&
                    all_aligned(from_heads.query, from_heads.key, from_heads.value) &&
                    all_aligned(to_heads.query, to_heads.key, to_heads.value);
  const auto kernel = wide ? rotary_kernel<T, N, BACK> : rotary_kernel<T, 1, BACK>;
  return launch(kernel, s * b, 1, threads_for(row / 2 / (wide ? N : 1), THREADS), stream, from_qkv, to_qkv, from_heads,
                to_heads, static_cast<const float*>(cos), static_cast<const float*>(sin), shape);
}

}  // namespace
}  // namespace megatron

MEGATRON_API int megatron_rotary_split(int dtype, const void* qkv, const void* cos, const void* sin, void* query,
                                       void* key, void* value, int64_t s, int64_t b, int64_t heads, int64_t kv,
                                       int64_t d, void* stream) {
  using namespace megatron;
  return with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const Heads<T> to{static_cast<T*>(query), static_cast<T*>(key), static_cast<T*>(value)};
    return turn_all<false, T>(static_cast<const T*>(qkv), nullptr, {}, to, cos, sin, s, b, heads, kv, d, stream);
  });
}

MEGATRON_API int megatron_rotary_join(int dtype, const void* grad_query, const void* grad_key, const void* grad_value,
                                      const void* cos, const void* sin, void* grad_qkv, int64_t s, int64_t b,
                                      int64_t heads, int64_t kv, int64_t d, void* stream) {
  using namespace megatron;
  return with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const Heads<const T> from{static_cast<const T*>(grad_query), static_cast<const T*>(grad_key),
                              static_cast<const T*>(grad_value)};
    return turn_all<true, T>(nullptr, static_cast<T*>(grad_qkv), from, {}, cos, sin, s, b, heads, kv, d, stream);
  });
}
