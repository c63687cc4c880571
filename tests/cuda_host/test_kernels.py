"""Every CUDA kernel, run on the host, against float64 over odd sizes, alignments and orders of warps."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from tests.cuda_host import cases
from tests.cuda_host.device import ORDERS, UNSUPPORTED, Device, signatures
from tests.cuda_host.numerics import BFLOAT16, FLOAT32, FLOAT64, KINDS, Kind

every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
every_order = pytest.mark.parametrize("order", ORDERS)

# Around a warp, around a block of 256 or 512 threads, and whole packs of 16 bytes (the last three).
SIZES = (1, 31, 32, 33, 255, 257, 511, 513, 8, 264, 1032)


@every_kind
@every_order
@pytest.mark.parametrize("columns", SIZES)
def test_rms_norm(device: Device, kind: Kind, order: int, columns: int) -> None:
    device.order(order)
    for rows, offset in ((3, 0), (2, 1)):
        cases.rms_norm(device, kind, rows, columns, offset)
        cases.add_rms_norm(device, kind, rows, columns, offset)


@every_kind
@pytest.mark.parametrize("columns", [2051, 4096, 8196, 16384, 16392, 20480])
def test_rms_norm_of_rows_that_registers_do_not_hold(device: Device, kind: Kind, columns: int) -> None:
    device.order(2)
    cases.rms_norm(device, kind, 2, columns)
    cases.add_rms_norm(device, kind, 1, columns)
    cases.rms_norm_backward(device, kind, 3, columns, 2)


@every_kind
@pytest.mark.parametrize("extreme", [np.nan, np.inf, 1e30, 1e-30])
def test_rms_norm_of_extreme_values(device: Device, kind: Kind, extreme: float) -> None:
    if abs(extreme) == 1e30:  # its square is infinite in float32: the row becomes 0, as PyTorch's does
        hidden = device.give(kind.encode(np.full((1, 40), extreme)))
        normed, rstd = device.empty((1, 40), kind.storage), device.empty((1,), np.float32)
        device.call("rms_norm", kind.code, hidden, hidden, normed, rstd, 1, 40, 1e-5)
        assert rstd[0] == 0
        assert (kind.decode(normed) == 0).all()
    else:
        cases.rms_norm(device, kind, 2, 40, extreme=extreme)


@every_kind
@every_order
@pytest.mark.parametrize("columns", SIZES)
def test_rms_norm_backward(device: Device, kind: Kind, order: int, columns: int) -> None:
    device.order(order)
    for rows, parts, offset, with_sum in ((5, 2, 0, True), (3, 5, 1, False), (1, 1, 0, False)):
        cases.rms_norm_backward(device, kind, rows, columns, parts, offset, with_sum)


@every_kind
@every_order
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 2), (5, 3, 4, 2, 6), (33, 1, 3, 3, 8), (3, 2, 32, 8, 128), (2, 2, 5, 1, 80), (2, 1, 71, 1, 64)],
)
def test_rotary(device: Device, kind: Kind, order: int, shape: tuple[int, int, int, int, int]) -> None:
    device.order(order)
    for offset in (0, 1):
        cases.rotary(device, kind, *shape, offset)


@every_kind
@every_order
@pytest.mark.parametrize("f", [*SIZES, 1376, 2056])
def test_swiglu(device: Device, kind: Kind, order: int, f: int) -> None:
    device.order(order)
    for rows, offset in ((3, 0), (2, 1)):
        cases.swiglu(device, kind, rows, f, offset)


@every_kind
@pytest.mark.parametrize("extreme", [np.nan, np.inf, 1e-30, 50.0, -50.0, 1e4, -1e4])
def test_swiglu_of_extreme_gates(device: Device, kind: Kind, extreme: float) -> None:
    cases.swiglu(device, kind, 2, 40, extreme=extreme)


@every_kind
@every_order
@pytest.mark.parametrize("columns", SIZES)
def test_cross_entropy(device: Device, kind: Kind, order: int, columns: int) -> None:
    device.order(order)
    for valid in sorted({0, 1, columns // 2, columns - 1, columns}):
        cases.cross_entropy(device, kind, 6, columns, valid, offset=valid % 3)


@every_kind
@pytest.mark.parametrize(
    ("columns", "valid"), [(32_017, 32_017), (32_024, 32_017), (32_064, 32_017), (128_256, 128_256)]
)
def test_cross_entropy_of_real_vocabularies(device: Device, kind: Kind, columns: int, valid: int) -> None:
    device.order(1)
    cases.cross_entropy(device, kind, 3, columns, valid)


@every_kind
@pytest.mark.parametrize("special", [-np.inf, np.inf, np.nan, 80.0])
def test_cross_entropy_of_extreme_logits(device: Device, kind: Kind, special: float) -> None:
    cases.cross_entropy(device, kind, 3, 1032, 1030, special=special)


@every_kind
def test_cross_entropy_of_a_row_of_minus_infinities(device: Device, kind: Kind) -> None:
    """No token has any probability on this rank; another rank's maximum then scales a sum of 0, not of NaN."""
    logits = device.give(kind.encode(np.full((2, 77), -np.inf)))
    statistics = device.empty((3, 2), np.float32)
    device.call("cross_entropy_statistics", kind.code, logits, device.give(np.array([3, -1])), statistics, 2, 77, 77)
    assert statistics.tolist() == [[-np.inf, -np.inf], [0.0, 0.0], [-np.inf, 0.0]]


@every_order
@pytest.mark.parametrize("count", [1, 3, 4, 31, 255, 257, 1023, 1025, 4099])
def test_adamw(device: Device, order: int, count: int) -> None:
    device.order(order)
    for offset, with_weights in ((0, True), (0, False), (1, True)):
        cases.adamw(device, count, offset, with_weights)


def test_adamw_goes_round_more_elements_than_it_has_threads(device: Device) -> None:
    cases.adamw(device, 2048 * 256 + 77, offset=1)


@pytest.mark.parametrize("flag", [1.0, np.inf, np.nan])
def test_adamw_writes_nothing_where_gradients_are_not_finite(device: Device, flag: float) -> None:
    cases.adamw(device, 1030, not_finite=flag)


@every_kind
@every_order
@pytest.mark.parametrize("count", [*SIZES, 4099])
def test_squared_norm(device: Device, kind: Kind, order: int, count: int) -> None:
    device.order(order)
    for parts, offset in ((1, 0), (3, 1), (7, 2)):
        cases.squared_norm(device, kind, count, parts, offset)


@every_kind
def test_squared_norm_of_what_float32_cannot_square(device: Device, kind: Kind) -> None:
    sums = device.empty((1,), np.float64)
    for value, expected in ((1e30, 1e60), (np.inf, np.inf), (np.nan, np.nan)):
        flat = kind.encode(np.array([value, 0.0, 0.0]))
        device.call("squared_norm", kind.code, device.give(flat), sums, 1, 3)
        assert np.allclose(sums, expected, rtol=1e-2, equal_nan=True)


def test_rows_begin_beyond_32_bits(device: Device) -> None:
    """Memory that is mostly never touched: two rows of 2^31 columns, of which only the first few are tokens."""
    columns, valid = 2**31 + 8, 40
    no_reserve = 0x4000  # Linux's MAP_NORESERVE, which Python names from 3.13 on
    with mmap.mmap(-1, 4 * (columns + valid), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve) as memory:
        logits = np.frombuffer(memory, np.float32)
        logits[:valid], logits[columns:] = 1, 2
        statistics = device.empty((3, 2), np.float32)
        targets = device.give(np.array([0, 39]))
        device.call("cross_entropy_statistics", FLOAT32.code, logits, targets, statistics, 2, columns, valid)
        del logits
    assert statistics.tolist() == [[1, 2], [40, 40], [1, 2]]


def test_results_do_not_depend_on_the_order(device: Device) -> None:
    """Bit for bit: what a GPU's scheduler does changes no training run."""
    results = set()
    values, targets = cases.normal(1, 4, 4099).astype(np.float32), np.array([1, 2, 3, 4])
    for order in ORDERS:
        device.order(order)
        statistics, sums = device.empty((3, 4), np.float32), device.empty((3,), np.float64)
        device.call("cross_entropy_statistics", 0, device.give(values), device.give(targets), statistics, 4, 4099, 4099)
        device.call("squared_norm", 0, device.give(values), sums, 3, values.size)
        results.add((statistics.tobytes(), sums.tobytes()))
    assert len(results) == 1


def _arguments(name: str) -> list[float | None]:
    """No pointers, no sizes."""
    return [0] * (len(signatures()[name]) - 2)


@pytest.mark.parametrize("name", sorted(signatures()))
def test_nothing_to_do_is_no_error_and_float64_is_not_for_the_device(device: Device, name: str) -> None:
    for kind in (FLOAT32,) if name == "adamw" else KINDS:
        assert device.code(name, kind.code, *_arguments(name)) == 0
    assert device.code(name, FLOAT64.code, *_arguments(name)) == UNSUPPORTED
    if name == "adamw":
        assert device.code(name, BFLOAT16.code, *_arguments(name)) == UNSUPPORTED


def test_sums_of_nothing_are_written(device: Device) -> None:
    sums, grad_weight = device.empty((3,), np.float64), device.empty((2, 5), np.float32)
    device.call("squared_norm", FLOAT32.code, None, sums, 3, 0)
    device.call("rms_norm_backward", FLOAT32.code, None, None, None, None, None, None, grad_weight, 2, 0, 5)
    assert (sums == 0).all()
    assert (grad_weight == 0).all()


def test_an_odd_head_size_is_left_to_the_reference(device: Device) -> None:
    assert device.code("rotary_split", 0, *[None] * 6, 2, 2, 1, 1, 5) == UNSUPPORTED
