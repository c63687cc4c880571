// Chooses the widest instruction set that this machine has, once, and forwards every call to its kernels.

#include <cstring>

#include "table.h"

namespace {

using megatron::Table;

bool runs_here(const Table& table) {
#if defined(__x86_64__)
  if (&table == &megatron::avx512_table)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  if (&table == &megatron::avx2_table) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return &table == &megatron::baseline_table;
}

constexpr const Table* TABLES[] = {
#if defined(__x86_64__)
    &megatron::avx512_table, &megatron::avx2_table,
#endif
    &megatron::baseline_table};

const Table* widest() {
  for (const Table* table : TABLES)
    if (runs_here(*table)) return table;
  return &megatron::baseline_table;
}

const Table* chosen = widest();

}  // namespace

// The instruction set in use.
MEGATRON_API const char* megatron_isa() { return chosen->isa; }

// Use another one from now on, so that tests reach all that a machine has. False where it cannot run here.
MEGATRON_API bool megatron_use_isa(const char* isa) {
  for (const Table* table : TABLES)
    if (std::strcmp(table->isa, isa) == 0 && runs_here(*table)) {
      chosen = table;
      return true;
    }
  return false;
}

#define MEGATRON_FORWARD(name, parameters, arguments) \
  MEGATRON_API int megatron_##name parameters { return chosen->name arguments; }
MEGATRON_KERNELS(MEGATRON_FORWARD)
MEGATRON_CPU_KERNELS(MEGATRON_FORWARD)
