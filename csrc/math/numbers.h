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

// To the nearest T, ties to even; a NaN stays one.
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
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return bfloat16{static_cast<uint16_t>(is_nan ? 0x7FC0u : rounded)};
#endif
}

}  // namespace megatron
