// exp, in a form that compilers turn into vector code on the CPU; the device's own on CUDA.
#pragma once

#include <cmath>

#include "numbers.h"

// a · b + c, rounded once. Where the processor has no such instruction the library's function would be slow beyond use.
#ifndef MEGATRON_FUSED
#define MEGATRON_FUSED(a, b, c) __builtin_fmaf(a, b, c)
#endif

namespace megatron {

MEGATRON_INLINE double exponential(double value) { return exp(value); }

#ifdef __CUDACC__
MEGATRON_INLINE float exponential(float value) { return expf(value); }
#else
// exp(x) = 2^n · exp(r) with n = round(x / ln 2), r = x - n ln 2 in two parts (Cody and Waite, 1980). For exp(r) the
// polynomial and the order of operations are those of the SLEEF library (Shibata and Petrogalli, 2020), from which
// torch takes its exp: so results are the same to the bit, and below one unit in the last place from exact.
MEGATRON_INLINE float exponential(float value) {
  const float low = -104.0f, high = 100.0f;  // beyond these the result is 0 or infinity
  const float clamped = value >= low ? (value > high ? high : value) : low;  // a NaN becomes low, and returns below
  // Adding and taking away 1.5 · 2^23 rounds to a whole number.
  const float shift = 12582912.0f;
  const float n = (clamped * 1.442695040888963407359924681001892137426645954152985934135449406931f + shift) - shift;
  float r = MEGATRON_FUSED(n, -0.693145751953125f, clamped);
  r = MEGATRON_FUSED(n, -1.428606765330187045e-06f, r);
  float p = 0.000198527617612853646278381f;
  p = MEGATRON_FUSED(p, r, 0.00139304355252534151077271f);
  p = MEGATRON_FUSED(p, r, 0.00833336077630519866943359f);
  p = MEGATRON_FUSED(p, r, 0.0416664853692054748535156f);
  p = MEGATRON_FUSED(p, r, 0.166666671633720397949219f);
  p = MEGATRON_FUSED(p, r, 0.5f);
  p = 1.0f + MEGATRON_FUSED(r * r, p, r);
  // 2^n in two factors, so that subnormal results and those just below infinity come out right.
  const int32_t whole = static_cast<int32_t>(n), half = whole >> 1;
  const float first = as_float(static_cast<uint32_t>(half + 127) << 23);
  const float second = as_float(static_cast<uint32_t>(whole - half + 127) << 23);
  const float result = p * first * second;
  return value != value ? value : result;
}
#endif

}  // namespace megatron
