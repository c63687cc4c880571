// All that kernels.inc includes, for files that set an instruction set after it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "../math/adamw.h"
#include "../math/rotary.h"
#include "../math/swiglu.h"
#include "table.h"
