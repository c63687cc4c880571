// One rotated pair (i, i + d/2) of a head.
#pragma once

#include "numbers.h"

namespace megatron {

template <typename W>
MEGATRON_INLINE Pair<W> turn(W first, W second, W cos, W sin) {
  return {first * cos - second * sin, second * cos + first * sin};
}

// The transpose of `turn`, which is the turn by the opposite angle.
template <typename W>
MEGATRON_INLINE Pair<W> turn_back(W first, W second, W cos, W sin) {
  return {first * cos + second * sin, second * cos - first * sin};
}

}  // namespace megatron
