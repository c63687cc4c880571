// The kernels for processors with AVX-512 (F, BW, DQ, VL).
#include "headers.h"
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define MEGATRON_ISA avx512
#define MEGATRON_VECTOR_BYTES 64
#include "kernels.inc"
#endif
