// The kernels for any processor of the architecture that this is compiled for.
#define MEGATRON_ISA baseline
#define MEGATRON_VECTOR_BYTES 32
#define MEGATRON_REGISTER_BYTES 16
#if defined(__x86_64__)
#define MEGATRON_FUSED(a, b, c) ((a) * (b) + (c))
#endif
#include "kernels.inc"
