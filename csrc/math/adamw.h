// The update of one weight by AdamW (Loshchilov and Hutter, 2019, algorithm 2), as torch.optim.AdamW computes it.
#pragma once

#include <cmath>

#include "numbers.h"

namespace megatron {

// What all elements of an update share. `rest` is 1 - beta, taken in double: 1 - 0.999f is off by 1e-5.
template <typename W>
struct AdamwFactors {
  W inverse_divisor, rest1, beta2, rest2, eps, keep, step_size, inverse_bias2_root;
};

template <typename W>
MEGATRON_INLINE AdamwFactors<W> adamw_factors(double divisor, double updates, double learning_rate, double beta1,
                                              double beta2, double eps, double weight_decay) {
  const double bias1 = 1.0 - pow(beta1, updates), bias2 = 1.0 - pow(beta2, updates);
  return {static_cast<W>(1.0 / divisor),
          static_cast<W>(1.0 - beta1),
          static_cast<W>(beta2),
          static_cast<W>(1.0 - beta2),
          static_cast<W>(eps),
          static_cast<W>(1.0 - learning_rate * weight_decay),
          static_cast<W>(learning_rate / bias1),
          static_cast<W>(1.0 / sqrt(bias2))};
}

template <typename W>
MEGATRON_INLINE void adamw(const AdamwFactors<W>& factors, W gradient, W& master, W& exp_avg, W& exp_avg_sq) {
  const W scaled = gradient * factors.inverse_divisor;
  exp_avg = exp_avg + factors.rest1 * (scaled - exp_avg);
  exp_avg_sq = factors.beta2 * exp_avg_sq + factors.rest2 * scaled * scaled;
  const W denominator = std::sqrt(exp_avg_sq) * factors.inverse_bias2_root + factors.eps;
  master = master * factors.keep - factors.step_size * exp_avg / denominator;
}

}  // namespace megatron
