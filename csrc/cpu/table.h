// The kernels of one instruction set as a table of functions; the machine that runs them decides which table is used.
#pragma once

#include "attention.h"

namespace megatron {

struct Table {
  const char* isa;
#define MEGATRON_MEMBER(name, parameters, arguments) int(*name) parameters;
  MEGATRON_KERNELS(MEGATRON_MEMBER)
  MEGATRON_CPU_KERNELS(MEGATRON_MEMBER)
#undef MEGATRON_MEMBER
};

extern const Table baseline_table, avx2_table, avx512_table;

}  // namespace megatron
