// The kernels for processors with AVX-512 (F, BW, DQ, VL).
#include "headers.h"
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,bmi,bmi2,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define MEGATRON_ISA avx512
#define MEGATRON_VECTOR_BYTES 64
#define MEGATRON_STREAM(to, from) _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_load_si512(from))
#include "kernels.inc"
#endif
