// silu(gate) · up of one element, and its derivatives.
#pragma once

#include "exponential.h"

namespace megatron {

template <typename W>
MEGATRON_INLINE W sigmoid(W value) {
  return W(1) / (W(1) + exponential(-value));
}

template <typename W>
MEGATRON_INLINE W swiglu(W gate, W up) {
  return gate / (W(1) + exponential(-gate)) * up;
}

// The gradients of gate and up.
template <typename W>
MEGATRON_INLINE Pair<W> swiglu_gradient(W grad, W gate, W up) {
  const W share = sigmoid(gate), silu = gate * share;
  // d silu / d gate = share + silu (1 - share)
  return {grad * up * (share + silu * (W(1) - share)), grad * silu};
}

}  // namespace megatron
