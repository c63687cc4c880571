// RMSNorm (Zhang and Sennrich, 2019), with or without the residual add before it, and its gradient.
//
// Results must not overlap what is read: inputs are read through the read-only path, and rows twice.
#include "common.cuh"

namespace megatron {
namespace {

constexpr int THREADS = 512;

// A thread keeps this many packs of its row in registers between the two passes; what a longer row has beyond these is
// read again (from L2, mostly). With 512 threads that is 16,384 columns of bfloat16 and 8,192 of float32. Shorter rows
// get fewer threads, not fewer packs each: several loads in flight per thread hide their latency.
constexpr int KEPT = 4;

// The packs of a row that this thread has: threadIdx.x, + blockDim.x, … Registers need an index known when compiling.
#define MEGATRON_KEPT_PACKS(kept, count, pack) \
  _Pragma("unroll") for (int kept = 0, pack = threadIdx.x; kept < (count); ++kept, pack += blockDim.x)
#define MEGATRON_OTHER_PACKS(count, packs, pack) \
  for (int pack = threadIdx.x + (count) * blockDim.x; pack < (packs); pack += blockDim.x)

template <typename T, int N>
__device__ __forceinline__ float sum_of_squares(const Pack<T, N>& pack) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) sum += widen(pack.values[i]) * widen(pack.values[i]);
  return sum;
}

template <typename T, int N>
__device__ __forceinline__ Pack<T, N> normed_pack(const Pack<T, N>& hidden, const Pack<T, N>& weight, float scale) {
  Pack<T, N> normed;
#pragma unroll
  for (int i = 0; i < N; ++i) normed.values[i] = narrow<T>(widen(hidden.values[i]) * scale * widen(weight.values[i]));
  return normed;
}

// One pack of the row to normalise. With a residual this is where the sum is made, rounded and stored; what reads the
// row again reads it there.
template <typename T, int N, bool ADD>
__device__ __forceinline__ Pack<T, N> take(const T* hidden, const T* branch, T* sum, int64_t at) {
  Pack<T, N> pack = load<N>(hidden + at);
  if constexpr (ADD) {
    const Pack<T, N> other = load<N>(branch + at);
#pragma unroll
    for (int i = 0; i < N; ++i) pack.values[i] = narrow<T>(widen(pack.values[i]) + widen(other.values[i]));
    store(sum + at, pack);
  }
  return pack;
}

// One block per row. Bytes per element: 4 in bfloat16, 8 in float32 (floor 1,962 / 1,194 and 3,923 / 2,388 ns per
// million elements on A100 / H100); with the add 8 and 16 (3,923 / 2,388 and 7,847 / 4,776). The weight stays in L2.
template <typename T, int N, bool ADD>
__global__ void __launch_bounds__(THREADS)
    rms_norm_kernel(const T* __restrict__ hidden, const T* __restrict__ branch, const T* __restrict__ weight,
                    T* __restrict__ sum, T* __restrict__ normed, float* __restrict__ rstd, int columns, float eps) {
  const int64_t row = int64_t(blockIdx.x) * columns;
  const int packs = columns / N;
  Pack<T, N> kept_packs[KEPT];
  float squares = 0;
  MEGATRON_KEPT_PACKS(kept, KEPT, pack) {
    if (pack < packs) {
      kept_packs[kept] = take<T, N, ADD>(hidden, branch, sum, row + pack * N);
      squares += sum_of_squares(kept_packs[kept]);
    }
  }
  MEGATRON_OTHER_PACKS(KEPT, packs, pack) {
    squares += sum_of_squares(take<T, N, ADD>(hidden, branch, sum, row + pack * N));
  }
  const float scale = 1.0f / std::sqrt(block_sum(squares) / columns + eps);
  if (threadIdx.x == 0) rstd[blockIdx.x] = scale;
  MEGATRON_KEPT_PACKS(kept, KEPT, pack) {
    if (pack < packs) {
      store(normed + row + pack * N, normed_pack(kept_packs[kept], load<N>(weight + pack * N), scale));
    }
  }
  MEGATRON_OTHER_PACKS(KEPT, packs, pack) {
    const Pack<T, N> again = load<N>((ADD ? sum : hidden) + row + pack * N);
    store(normed + row + pack * N, normed_pack(again, load<N>(weight + pack * N), scale));
  }
}

// How many packs of a row a thread keeps in the backward pass: as many as make 16 sums of the weight's gradient.
template <int N>
constexpr int SUMMED = N == 1 ? 4 : 16 / N;

template <typename T, int N>
__device__ __forceinline__ float dot(const Pack<T, N>& grad, const Pack<T, N>& hidden, const Pack<T, N>& weight) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) sum += widen(grad.values[i]) * widen(weight.values[i]) * widen(hidden.values[i]);
  return sum;
}

// Adds one row's share of the weight's gradient: g · x · rstd.
template <typename T, int N>
__device__ __forceinline__ void add_products(Pack<float, N>& sums, const Pack<T, N>& grad, const Pack<T, N>& hidden,
                                             float scale) {
#pragma unroll
  for (int i = 0; i < N; ++i) sums.values[i] += widen(grad.values[i]) * widen(hidden.values[i]) * scale;
}

// With y = x · rstd: dx = rstd · (g · w - y · mean(g · w · y)); `shared` is rstd² · mean(g · w · x). `grad_sum` is null
// or has what is added at `at`.
template <typename T, int N>
__device__ __forceinline__ Pack<T, N> grad_pack(const Pack<T, N>& grad, const Pack<T, N>& hidden,
                                                const Pack<T, N>& weight, const T* grad_sum, int64_t at, float scale,
                                                float shared) {
  Pack<T, N> direct{}, result;
  if (grad_sum != nullptr) direct = load<N>(grad_sum + at);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float through = widen(grad.values[i]) * widen(weight.values[i]) - widen(hidden.values[i]) * shared;
    result.values[i] = narrow<T>(scale * through + widen(direct.values[i]));
  }
  return result;
}

// One block per part of the rows, so that each column of the weight's gradient is summed by one thread, in one order.
// Columns that a thread has no registers for are summed in place, in grad_weight, which costs 8 bytes more of (mostly)
// L2 traffic per element. Bytes per element without and with grad_sum: 6 and 8 in bfloat16 (floor 2,943 / 1,791 and
// 3,923 / 2,388 ns per million elements on A100 / H100), 12 and 16 in float32 (5,885 / 3,582 and 7,847 / 4,776).
template <typename T, int N>
__global__ void __launch_bounds__(THREADS)
    rms_norm_backward_kernel(const T* __restrict__ grad_normed, const T* __restrict__ grad_sum,
                             const T* __restrict__ hidden, const T* __restrict__ weight,
                             const float* __restrict__ rstd, T* __restrict__ grad_hidden,
                             float* __restrict__ grad_weight, int64_t rows, int columns) {
  const int packs = columns / N;
  const int64_t part = int64_t(blockIdx.x) * columns, end = part_begin(rows, gridDim.x, blockIdx.x + 1);
  Pack<float, N> sums[SUMMED<N>] = {};
  MEGATRON_OTHER_PACKS(SUMMED<N>, packs, pack) { store(grad_weight + part + pack * N, Pack<float, N>{}); }
  for (int64_t r = part_begin(rows, gridDim.x, blockIdx.x); r < end; ++r) {
    const int64_t row = r * columns;
    const float scale = rstd[r];
    Pack<T, N> grads[SUMMED<N>], kept_packs[SUMMED<N>];
    float product = 0;
    MEGATRON_KEPT_PACKS(kept, SUMMED<N>, pack) {
      if (pack < packs) {
        grads[kept] = load<N>(grad_normed + row + pack * N);
        kept_packs[kept] = load<N>(hidden + row + pack * N);
        product += dot(grads[kept], kept_packs[kept], load<N>(weight + pack * N));
      }
    }
    MEGATRON_OTHER_PACKS(SUMMED<N>, packs, pack) {
      const int64_t at = row + pack * N;
      product += dot(load<N>(grad_normed + at), load<N>(hidden + at), load<N>(weight + pack * N));
    }
    const float shared = block_sum(product) * scale * scale / columns;
    MEGATRON_KEPT_PACKS(kept, SUMMED<N>, pack) {
      if (pack < packs) {
        const int64_t at = row + pack * N;
        store(grad_hidden + at, grad_pack(grads[kept], kept_packs[kept], load<N>(weight + pack * N), grad_sum, at,
                                          scale, shared));
        add_products(sums[kept], grads[kept], kept_packs[kept], scale);
      }
    }
    MEGATRON_OTHER_PACKS(SUMMED<N>, packs, pack) {
      const int64_t at = row + pack * N;
      const Pack<T, N> grad = load<N>(grad_normed + at), again = load<N>(hidden + at);
      store(grad_hidden + at, grad_pack(grad, again, load<N>(weight + pack * N), grad_sum, at, scale, shared));
      Pack<float, N> sum = load<N>(grad_weight + part + pack * N);
      add_products(sum, grad, again, scale);
      store(grad_weight + part + pack * N, sum);
    }
  }
  MEGATRON_KEPT_PACKS(kept, SUMMED<N>, pack) {
    if (pack < packs) store(grad_weight + part + pack * N, sums[kept]);
  }
}

template <typename T, int N, bool ADD>
int forward_with(const void* hidden, const void* branch, const void* weight, void* sum, void* normed, void* rstd,
                 int64_t rows, int64_t columns, double eps, void* stream) {
  return launch(rms_norm_kernel<T, N, ADD>, rows, 1, threads_for(ceil_div(columns / N, KEPT), THREADS), stream,
                static_cast<const T*>(hidden), static_cast<const T*>(branch), static_cast<const T*>(weight),
                static_cast<T*>(sum), static_cast<T*>(normed), static_cast<float*>(rstd), static_cast<int>(columns),
                static_cast<float>(eps));
}

template <bool ADD>
int forward(int dtype, const void* hidden, const void* branch, const void* weight, void* sum, void* normed, void* rstd,
            int64_t rows, int64_t columns, double eps, void* stream) {
  if (columns > INT_MAX / 2) return UNSUPPORTED;
  return with_type(dtype, [&](auto element) {
    using T = decltype(element);
    if (rows == 0 || columns == 0) return 0;
    constexpr int N = FULL_PACK<T>;
    const bool wide = columns % N == 0 && all_aligned(hidden, branch, weight, sum, normed);
    return wide ? forward_with<T, N, ADD>(hidden, branch, weight, sum, normed, rstd, rows, columns, eps, stream)
                : forward_with<T, 1, ADD>(hidden, branch, weight, sum, normed, rstd, rows, columns, eps, stream);
  });
}

template <typename T, int N>
int backward_with(const void* grad_normed, const void* grad_sum, const void* hidden, const void* weight,
                  const void* rstd, void* grad_hidden, void* grad_weight, int64_t parts, int64_t rows, int64_t columns,
                  void* stream) {
  return launch(rms_norm_backward_kernel<T, N>, parts, 1, threads_for(ceil_div(columns / N, SUMMED<N>), THREADS),
                stream, static_cast<const T*>(grad_normed), static_cast<const T*>(grad_sum),
                static_cast<const T*>(hidden), static_cast<const T*>(weight), static_cast<const float*>(rstd),
                static_cast<T*>(grad_hidden), static_cast<float*>(grad_weight), rows, static_cast<int>(columns));
}

}  // namespace
}  // namespace megatron

MEGATRON_API int megatron_rms_norm(int dtype, const void* hidden, const void* weight, void* normed, void* rstd,
                                   int64_t rows, int64_t columns, double eps, void* stream) {
  return megatron::forward<false>(dtype, hidden, nullptr, weight, nullptr, normed, rstd, rows, columns, eps, stream);
}

MEGATRON_API int megatron_add_rms_norm(int dtype, const void* residual, const void* branch, const void* weight,
                                       void* sum, void* normed, void* rstd, int64_t rows, int64_t columns, double eps,
                                       void* stream) {
  return megatron::forward<true>(dtype, residual, branch, weight, sum, normed, rstd, rows, columns, eps, stream);
}

// Parts without rows are written too, as zeros.
MEGATRON_API int megatron_rms_norm_backward(int dtype, const void* grad_normed, const void* grad_sum,
                                            const void* hidden, const void* weight, const void* rstd,
                                            void* grad_hidden, void* grad_weight, int64_t parts, int64_t rows,
                                            int64_t columns, void* stream) {
  using namespace megatron;
  if (columns > INT_MAX / 2) return UNSUPPORTED;
  return with_type(dtype, [&](auto element) {
    using T = decltype(element);
    if (parts == 0 || columns == 0) return 0;
    constexpr int N = FULL_PACK<T>;
    const bool wide = columns % N == 0 && all_aligned(grad_normed, grad_sum, hidden, weight, grad_hidden, grad_weight);
    return (wide ? backward_with<T, N> : backward_with<T, 1>)(grad_normed, grad_sum, hidden, weight, rstd, grad_hidden,
                                                              grad_weight, parts, rows, columns, stream);
  });
}
