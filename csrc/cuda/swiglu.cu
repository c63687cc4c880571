// SwiGLU (Shazeer, 2020) over the joined gate and up projections.
#include "../math/swiglu.h"

#include "common.cuh"

namespace megatron {
namespace {

constexpr int THREADS = 256;

// blockIdx.x is the row, blockIdx.y a share of its columns. Bytes per element of the output: 6 in bfloat16, 12 in
// float32 (floor 2,943 / 1,791 and 5,885 / 3,582 ns per million elements on A100 / H100).
template <typename T, int N>
__global__ void __launch_bounds__(THREADS) swiglu_kernel(const T* gate_up, T* output, int64_t f) {
  const T* const gate = gate_up + int64_t(blockIdx.x) * 2 * f;
  T* const to = output + int64_t(blockIdx.x) * f;
  const int64_t column = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (column >= f) return;
  const Pack<T, N> gates = load<N>(gate + column), ups = load<N>(gate + f + column);
  Pack<T, N> result;
#pragma unroll
  for (int i = 0; i < N; ++i) result.values[i] = narrow<T>(swiglu(widen(gates.values[i]), widen(ups.values[i])));
  store(to + column, result);
}

// As above. Bytes per element of grad: 10 in bfloat16, 20 in float32 (floor 4,904 / 2,985 and 9,809 / 5,970 ns per
// million elements on A100 / H100).
template <typename T, int N>
__global__ void __launch_bounds__(THREADS)
    swiglu_backward_kernel(const T* grad, const T* gate_up, T* grad_gate_up, int64_t f) {
  const int64_t column = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * N;
  if (column >= f) return;
  const int64_t in_joined = int64_t(blockIdx.x) * 2 * f + column;
  const Pack<T, N> grads = load<N>(grad + int64_t(blockIdx.x) * f + column);
  const Pack<T, N> gates = load<N>(gate_up + in_joined), ups = load<N>(gate_up + in_joined + f);
  Pack<T, N> to_gate, to_up;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const auto result = swiglu_gradient(widen(grads.values[i]), widen(gates.values[i]), widen(ups.values[i]));
    to_gate.values[i] = narrow<T>(result.first);
    to_up.values[i] = narrow<T>(result.second);
  }
  store(grad_gate_up + in_joined, to_gate);
  store(grad_gate_up + in_joined + f, to_up);
}

// Launches `wide` or `single` with a block for every row and every share of its columns.
template <typename T, typename Kernel, typename... Arguments>
int launch_rows(bool is_wide, Kernel wide, Kernel single, int64_t rows, int64_t f, void* stream,
                Arguments... arguments) {
  if (rows == 0 || f == 0) return 0;
  const int64_t packs = is_wide ? f / FULL_PACK<T> : f;
  const int threads = threads_for(packs, THREADS);
  return launch(is_wide ? wide : single, rows, ceil_div(packs, threads), threads, stream, arguments..., f);
}

}  // namespace
}  // namespace megatron

MEGATRON_API int megatron_swiglu(int dtype, const void* gate_up, void* output, int64_t rows, int64_t f, void* stream) {
  using namespace megatron;
  return with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const bool wide = f % FULL_PACK<T> == 0 && all_aligned(gate_up, output);
    return launch_rows<T>(wide, swiglu_kernel<T, FULL_PACK<T>>, swiglu_kernel<T, 1>, rows, f, stream,
                          static_cast<const T*>(gate_up), static_cast<T*>(output));
  });
}

MEGATRON_API int megatron_swiglu_backward(int dtype, const void* grad, const void* gate_up, void* grad_gate_up,
                                          int64_t rows, int64_t f, void* stream) {
  using namespace megatron;
  return with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const bool wide = f % FULL_PACK<T> == 0 && all_aligned(grad, gate_up, grad_gate_up);
    return launch_rows<T>(wide, swiglu_backward_kernel<T, FULL_PACK<T>>, swiglu_backward_kernel<T, 1>, rows, f, stream,
                          static_cast<const T*>(grad), static_cast<const T*>(gate_up), static_cast<T*>(grad_gate_up));
  });
}
