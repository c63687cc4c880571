"""Bugs of the kinds that CUDA kernels get, to be planted in the real sources: what watches them has to notice."""

from __future__ import annotations

from tests.cuda_host.build import Bug

COMMON = "cuda/common.cuh"

# (bug, the kernels that have it). Before the barrier a warp reads what others have not written yet.
MISSING_BARRIERS = {
    "after partial sums": (
        Bug(
            COMMON,
            "if (lane == 0) partial[warp] = value;\n  __syncthreads();",
            "if (lane == 0) partial[warp] = value;",
        ),
        ("squared_norm",),
    ),
    "before the next reduction": (
        Bug(COMMON, "  __syncthreads();  // the next reduction writes where slower warps still read\n", ""),
        ("rms_norm",),
    ),
    "after the block's factors": (
        Bug("cuda/adamw.cu", "  }\n  __syncthreads();\n", "  }\n"),
        ("adamw",),
    ),
}

WRONG_NUMBERS = {
    "half a warp reduced": (Bug(COMMON, "distance = WARP / 2;", "distance = WARP / 4;"), ("cross_entropy",)),
    "shared memory read before it is written": (
        Bug(COMMON, "lane < warps ? partial[lane]", "lane <= warps ? partial[lane]"),
        ("squared_norm",),
    ),
    "barrier that not all threads reach": (
        Bug("cuda/squared_norm.cu", "sum = block_sum(sum);", "if (threadIdx.x < 64) sum = block_sum(sum);"),
        ("squared_norm",),
    ),
    "shuffle that not all lanes reach": (
        Bug("cuda/squared_norm.cu", "sum = block_sum(sum);", "if (threadIdx.x % 2) sum = block_sum(sum);"),
        ("squared_norm",),
    ),
    "tail left out": (
        Bug(
            "cuda/squared_norm.cu", "span.tail + threadIdx.x < end - begin", "span.tail + threadIdx.x + 1 < end - begin"
        ),
        ("squared_norm",),
    ),
    "rows one output wide": (
        Bug("cuda/swiglu.cu", "gate_up + int64_t(blockIdx.x) * 2 * f", "gate_up + int64_t(blockIdx.x) * f"),
        ("swiglu",),
    ),
}

# (bug, kernels, what the report says).
OUT_OF_BOUNDS = {
    "off-by-one store": (
        Bug("cuda/squared_norm.cu", "sums[blockIdx.x] = sum", "sums[blockIdx.x + 1] = sum"),
        ("squared_norm",),
        ("heap-buffer-overflow", "WRITE of size 8", "squared_norm.cu"),
    ),
    "off-by-one guard": (
        Bug("cuda/swiglu.cu", "store(to + column, result);", "store(to + column + 1, result);"),
        ("swiglu",),
        ("heap-buffer-overflow", "WRITE of size"),
    ),
    "undersized shared array": (
        Bug(COMMON, "W partial[MAX_WARPS];", "W partial[MAX_WARPS / 4];"),
        ("squared_norm",),
        ("index 8 out of bounds for type", "common.cuh"),
    ),
    "undersized shared array behind a pointer": (
        Bug(
            COMMON,
            "W partial[MAX_WARPS];\n",
            "W few[MAX_WARPS / 4];\n  W* volatile pointer = few;\n  W* const partial = pointer;\n",
        ),
        ("squared_norm",),
        ("global-buffer-overflow", "few"),
    ),
    "wide load from anywhere": (
        Bug("cuda/adamw.cu", "all_aligned(master, gradient, exp_avg, exp_avg_sq) && aligned(weights, 8)", "true"),
        ("adamw",),
        ("misaligned address",),
    ),
}
