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
// torch takes its exp: so results are the same to the bit between 2^-126 and 2.4e38, and below one unit in the last place
// from exact. Below 8.3e-39 they are 0, above 2.4e38 infinity.
MEGATRON_INLINE float exponential(float value) {
  // To -88 … 88.4, where 2^n below comes out as 0 or infinity. As whole numbers, since the bits of floats of one sign
  // are in order: comparisons of floats would cost more. A NaN is clamped as well, and returns at the end.
  const uint32_t above = smaller(as_bits(value), 0xC2B00000u);
  const float clamped = as_float(static_cast<uint32_t>(smaller(static_cast<int32_t>(above), 0x42B0CCCD)));
  // Adding 1.5 · 2^23 + 127 rounds to a whole number, and leaves n + 127 in the lowest bits: 2^n where they are shifted.
  const float shift = 12583039.0f;
  const float shifted = MEGATRON_FUSED(clamped, 1.442695040888963407359924681001892137426645954152985934135449406931f, shift);
  const float power = as_float(as_bits(shifted) << 23);
  const float n = shifted - shift;
  float r = MEGATRON_FUSED(n, -0.693145751953125f, clamped);
  r = MEGATRON_FUSED(n, -1.428606765330187045e-06f, r);
  float p = 0.000198527617612853646278381f;
  p = MEGATRON_FUSED(p, r, 0.00139304355252534151077271f);
  p = MEGATRON_FUSED(p, r, 0.00833336077630519866943359f);
  p = MEGATRON_FUSED(p, r, 0.0416664853692054748535156f);
  p = MEGATRON_FUSED(p, r, 0.166666671633720397949219f);
  p = MEGATRON_FUSED(p, r, 0.5f);
  const float result = 1.0f + MEGATRON_FUSED(r * r, p, r);
  return value != value ? value : result * power;
}
#endif

}  // namespace megatron
