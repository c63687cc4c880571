// Attention, as C functions of the CPU library alone: on a GPU torch's own kernels and flash-attn compute it. The
// conventions are those of kernels.h.
#pragma once

#include "../kernels.h"

// Query i of sample b attends to the keys start[b, i] … stop[b, i] - 1 of t; where both are null, to those up to its own
// place. query is [b, heads, s, d]; key and value are [b, kv, t, d]; mixed and grad are [s, b, heads, d]; log_sum_exp is
// wide, [b, heads, s], -inf where a query has no keys.
#define MEGATRON_CPU_KERNELS(X)                                                                                       \
  /* mixed = softmax(query · keyᵀ / √d) · value */                                                                    \
  X(attention,                                                                                                        \
    (int dtype, const void* query, const void* key, const void* value, const int32_t* start, const int32_t* stop,     \
     void* mixed, void* log_sum_exp, int64_t b, int64_t heads, int64_t kv, int64_t s, int64_t t, int64_t d,           \
     void* stream),                                                                                                   \
    (dtype, query, key, value, start, stop, mixed, log_sum_exp, b, heads, kv, s, t, d, stream))                       \
  /* mixed and log_sum_exp may be over more keys. grad_query is as query; grad_key and grad_value are wide,           \
     [b, kv, t, row], where row is d rounded up to a multiple of 32: what lies behind the first d is not of use. */   \
  X(attention_backward,                                                                                               \
    (int dtype, const void* grad, const void* query, const void* key, const void* value, const void* mixed,           \
     const void* log_sum_exp, const int32_t* start, const int32_t* stop, void* grad_query, void* grad_key,            \
     void* grad_value, int64_t b, int64_t heads, int64_t kv, int64_t s, int64_t t, int64_t d, int64_t row,            \
     void* stream),                                                                                                   \
    (dtype, grad, query, key, value, mixed, log_sum_exp, start, stop, grad_query, grad_key, grad_value, b, heads, kv, \
     s, t, d, row, stream))

#define MEGATRON_DECLARE(name, parameters, arguments) MEGATRON_API int megatron_##name parameters;
MEGATRON_CPU_KERNELS(MEGATRON_DECLARE)
#undef MEGATRON_DECLARE
