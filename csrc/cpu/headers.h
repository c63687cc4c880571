// All that kernels.inc includes, for files that set an instruction set after it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <omp.h>

#include "../math/adamw.h"
#include "../math/rotary.h"
#include "../math/swiglu.h"
#include "table.h"
