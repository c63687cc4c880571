// The kernels for processors with AVX2 and FMA. The standard's headers come first, so that no inline function of
// theirs is compiled for this instruction set and then shared with code that runs without it.
#include "headers.h"
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#define MEGATRON_ISA avx2
#define MEGATRON_VECTOR_BYTES 32
#include "kernels.inc"
#endif
