// The kernels for processors with AVX2 and FMA. The standard's headers come first, so that no inline function of
// theirs is compiled for this instruction set and then shared with code that runs without it.
#include "headers.h"
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#define MEGATRON_ISA avx2
#define MEGATRON_VECTOR_BYTES 32
#define MEGATRON_STREAM(to, from) \
  _mm256_stream_si256(static_cast<__m256i*>(to), _mm256_load_si256(static_cast<const __m256i*>(from)))
#include "kernels.inc"
#endif
