// The fused operations, as C functions: one list for the CPU library and for the CUDA one.
//
// Nothing here includes or links torch: a library serves every release of it, and builds in seconds. Tensors are
// contiguous and come as addresses. `dtype` says what the tensors hold; "wide" is float, or double where dtype is
// FLOAT64. `stream` is a cudaStream_t, null on the CPU. A function returns 0, UNSUPPORTED (it has no such case and has
// done nothing: the caller uses its reference), or the CUDA error of its launch.
#pragma once

#include <cstdint>

namespace megatron {

enum Dtype : int { FLOAT32 = 0, BFLOAT16 = 1, FLOAT64 = 2 };

constexpr int UNSUPPORTED = -1;

}  // namespace megatron

// X(name, parameters, arguments)
#define MEGATRON_KERNELS(X)                                                                                           \
  /* normed = hidden · rstd · weight, rstd[row] = 1 / sqrt(mean(hidden²) + eps); rstd is wide, [rows]. */             \
  X(rms_norm,                                                                                                         \
    (int dtype, const void* hidden, const void* weight, void* normed, void* rstd, int64_t rows, int64_t columns,      \
     double eps, void* stream),                                                                                       \
    (dtype, hidden, weight, normed, rstd, rows, columns, eps, stream))                                                \
  /* sum = residual + branch, rounded to dtype; then as rms_norm of that sum. */                                      \
  X(add_rms_norm,                                                                                                     \
    (int dtype, const void* residual, const void* branch, const void* weight, void* sum, void* normed, void* rstd,    \
     int64_t rows, int64_t columns, double eps, void* stream),                                                        \
    (dtype, residual, branch, weight, sum, normed, rstd, rows, columns, eps, stream))                                 \
  /* Gradient of the normed rows, plus grad_sum where that is not null (the gradient that reaches hidden directly).   \
     grad_weight is wide [parts, columns]: part p sums over the rows ⌊rows·p/parts⌋ … ⌊rows·(p+1)/parts⌋ − 1. */      \
  X(rms_norm_backward,                                                                                                \
    (int dtype, const void* grad_normed, const void* grad_sum, const void* hidden, const void* weight,                \
     const void* rstd, void* grad_hidden, void* grad_weight, int64_t parts, int64_t rows, int64_t columns,            \
     void* stream),                                                                                                   \
    (dtype, grad_normed, grad_sum, hidden, weight, rstd, grad_hidden, grad_weight, parts, rows, columns, stream))     \
  /* qkv [s, b, (heads + 2 kv) d] -> query [b, heads, s, d], key and value [b, kv, s, d]; query and key turned by     \
     cos and sin, wide [s, d], of which the first d/2 columns are read. */                                            \
  X(rotary_split,                                                                                                     \
    (int dtype, const void* qkv, const void* cos, const void* sin, void* query, void* key, void* value, int64_t s,    \
     int64_t b, int64_t heads, int64_t kv, int64_t d, void* stream),                                                  \
    (dtype, qkv, cos, sin, query, key, value, s, b, heads, kv, d, stream))                                            \
  /* The backward pass of rotary_split: the three gradients turned back and put together again. */                    \
  X(rotary_join,                                                                                                      \
    (int dtype, const void* grad_query, const void* grad_key, const void* grad_value, const void* cos,                \
     const void* sin, void* grad_qkv, int64_t s, int64_t b, int64_t heads, int64_t kv, int64_t d, void* stream),      \
    (dtype, grad_query, grad_key, grad_value, cos, sin, grad_qkv, s, b, heads, kv, d, stream))                        \
  /* gate_up [rows, 2 f], gate first -> silu(gate) · up [rows, f]. */                                                 \
  X(swiglu, (int dtype, const void* gate_up, void* output, int64_t rows, int64_t f, void* stream),                    \
    (dtype, gate_up, output, rows, f, stream))                                                                        \
  /* grad [rows, f] -> grad_gate_up [rows, 2 f]. */                                                                   \
  X(swiglu_backward,                                                                                                  \
    (int dtype, const void* grad, const void* gate_up, void* grad_gate_up, int64_t rows, int64_t f, void* stream),    \
    (dtype, grad, gate_up, grad_gate_up, rows, f, stream))                                                    \
  /* Over the first `valid` columns of logits [rows, columns]: statistics, wide [3, rows], are the maximum (-inf if   \
     valid is 0), the sum of exp(logit - maximum), and the logit of the row's target (0 if it is not among them). */  \
  X(cross_entropy_statistics,                                                                                         \
    (int dtype, const void* logits, const int64_t* targets, void* statistics, int64_t rows, int64_t columns,          \
     int64_t valid, void* stream),                                                                                    \
    (dtype, logits, targets, statistics, rows, columns, valid, stream))                                               \
  /* logits become (exp(logit - log_sum_exp) - [column is the target]) · grad, and 0 from column `valid` on;          \
     log_sum_exp and grad are wide, [rows]. */                                                                        \
  X(cross_entropy_gradient,                                                                                           \
    (int dtype, void* logits, const int64_t* targets, const void* log_sum_exp, const void* grad, int64_t rows,        \
     int64_t columns, int64_t valid, void* stream),                                                                   \
    (dtype, logits, targets, log_sum_exp, grad, rows, columns, valid, stream))                                        \
  /* AdamW over flat arrays of `count`. dtype (FLOAT32 or FLOAT64) is that of master, gradient, exp_avg, exp_avg_sq   \
     and of the scalar divisor, by which gradients are divided as they are read. weights, if not null, receives the   \
     new masters in bfloat16. updates (float) counts this update already. Where not_finite (float) is not 0, nothing  \
     is written. */                                                                                                   \
  X(adamw,                                                                                                            \
    (int dtype, void* master, const void* gradient, void* exp_avg, void* exp_avg_sq, void* weights,                   \
     const void* divisor, const float* not_finite, const float* updates, int64_t count, double learning_rate,         \
     double beta1, double beta2, double eps, double weight_decay, void* stream),                                      \
    (dtype, master, gradient, exp_avg, exp_avg_sq, weights, divisor, not_finite, updates, count, learning_rate,       \
     beta1, beta2, eps, weight_decay, stream))                                                                        \
  /* Sums of squares of flat [count], as double [parts]: part p sums ⌊count·p/parts⌋ … ⌊count·(p+1)/parts⌋ − 1. */    \
  X(squared_norm, (int dtype, const void* flat, double* sums, int64_t parts, int64_t count, void* stream),            \
    (dtype, flat, sums, parts, count, stream))

#define MEGATRON_API extern "C" __attribute__((visibility("default")))
#define MEGATRON_DECLARE(name, parameters, arguments) MEGATRON_API int megatron_##name parameters;
MEGATRON_KERNELS(MEGATRON_DECLARE)
#undef MEGATRON_DECLARE
