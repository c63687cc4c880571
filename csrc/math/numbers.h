// Number types that the CPU and CUDA kernels share, and how they become each other.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define MEGATRON_INLINE __host__ __device__ __forceinline__
#else
#define MEGATRON_INLINE inline __attribute__((always_inline))
#endif

namespace megatron {

// The upper half of a float.
struct bfloat16 {
  uint16_t bits;
};

MEGATRON_INLINE float as_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

MEGATRON_INLINE uint32_t as_bits(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

template <typename N>
MEGATRON_INLINE N smaller(N left, N right) {
  return left < right ? left : right;
}

template <typename N>
struct Pair {
  N first, second;
};

// In which type arithmetic on T is done.
template <typename T>
struct Wide {
  using type = T;
};
template <>
struct Wide<bfloat16> {
  using type = float;
};
template <typename T>
using wide_t = typename Wide<T>::type;

MEGATRON_INLINE float widen(float value) { return value; }
MEGATRON_INLINE double widen(double value) { return value; }
MEGATRON_INLINE float widen(bfloat16 value) { return as_float(static_cast<uint32_t>(value.bits) << 16); }

// The float rounded to 16 bits, in the upper half of the result (ties to even); what is in the lower half means nothing.
MEGATRON_INLINE uint32_t rounded_to_upper_half(float value) {
  // A NaN with many bits set would overflow into another number: it becomes the usual one of its sign.
  const uint32_t negative = smaller(as_bits(value), 0xFFC00000u);
  const uint32_t bits = static_cast<uint32_t>(smaller(static_cast<int32_t>(negative), 0x7FC00000));
  return bits + 0x7FFFu + ((bits >> 16) & 1u);
}

// To the nearest T, ties to even; a NaN stays one (a quiet one, as all are that arithmetic makes).
template <typename T>
MEGATRON_INLINE T narrow(wide_t<T> value) {
  return value;
}
template <>
MEGATRON_INLINE bfloat16 narrow<bfloat16>(float value) {
#ifdef __CUDA_ARCH__
  uint16_t rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(value));
  return bfloat16{rounded};
#else
  return bfloat16{static_cast<uint16_t>(rounded_to_upper_half(value) >> 16)};
#endif
}

}  // namespace megatron
