"""Each kernel against float64 formulas: one function per operation, for a size and an alignment."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from tests.cuda_host.device import Array, Device
from tests.cuda_host.numerics import BFLOAT16, FLOAT32, Kind, assert_close

EPS = 1e-5


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def rms_norm(device: Device, kind: Kind, rows: int, columns: int, offset: int = 0, extreme: float = 1.0) -> None:
    """`extreme` replaces one element of the first row."""
    values = normal(rows, rows, columns)
    values[0, columns // 2] *= extreme
    hidden = device.give(kind.encode(values), offset)
    weight = device.give(kind.encode(1 + 0.2 * normal(2, columns)), offset)
    normed, rstd = device.empty(hidden.shape, kind.storage, offset), device.empty((rows,), np.float32)
    device.call("rms_norm", kind.code, hidden, weight, normed, rstd, rows, columns, EPS)
    assert_normed(kind, hidden, weight, normed, rstd)


def assert_normed(kind: Kind, hidden: Array, weight: Array, normed: Array, rstd: Array) -> None:
    x, w = kind.decode(hidden), kind.decode(weight)
    with np.errstate(all="ignore"):
        expected = 1 / np.sqrt((x * x).mean(axis=1) + EPS)
        product = x * expected[:, None] * w
    assert_close("rstd", rstd, FLOAT32, expected)
    assert_close("normed", normed, kind, product)


def add_rms_norm(device: Device, kind: Kind, rows: int, columns: int, offset: int = 0) -> None:
    residual = device.give(kind.encode(normal(1, rows, columns)), offset)
    branch = device.give(kind.encode(0.1 * normal(2, rows, columns)), offset)
    weight = device.give(kind.encode(1 + 0.2 * normal(3, columns)), offset)
    total, normed = (device.empty(residual.shape, kind.storage, offset) for _ in range(2))
    rstd = device.empty((rows,), np.float32)
    device.call("add_rms_norm", kind.code, residual, branch, weight, total, normed, rstd, rows, columns, EPS)
    x, y = kind.decode(residual), kind.decode(branch)
    assert_close("sum", total, kind, x + y, np.abs(x) + np.abs(y))
    assert_normed(kind, total, weight, normed, rstd)


def rms_norm_backward(
    device: Device, kind: Kind, rows: int, columns: int, parts: int, offset: int = 0, with_sum: bool = True
) -> None:
    grad = device.give(kind.encode(normal(1, rows, columns)), offset)
    grad_sum = device.give(kind.encode(normal(2, rows, columns)), offset) if with_sum else None
    hidden = device.give(kind.encode(normal(3, rows, columns)), offset)
    weight = device.give(kind.encode(1 + 0.2 * normal(4, columns)), offset)
    g, x, w = kind.decode(grad), kind.decode(hidden), kind.decode(weight)
    rstd = device.give((1 / np.sqrt((x * x).mean(axis=1) + EPS)).astype(np.float32))
    grad_hidden = device.empty(hidden.shape, kind.storage, offset)
    grad_weight = device.empty((parts, columns), np.float32)
    device.call(
        "rms_norm_backward", kind.code, grad, grad_sum, hidden, weight, rstd, grad_hidden, grad_weight, parts, rows,
        columns,
    )  # fmt: skip
    r = rstd.astype(np.float64)[:, None]
    direct = np.zeros_like(x) if grad_sum is None else kind.decode(grad_sum)
    expected = r * (g * w - x * r**2 * (g * w * x).mean(axis=1, keepdims=True)) + direct
    terms = r * (abs(g * w) + abs(x) * r**2 * abs(g * w * x).mean(axis=1, keepdims=True)) + abs(direct)
    assert_close("grad_hidden", grad_hidden, kind, expected, terms)
    bounds = [rows * part // parts for part in range(parts + 1)]
    sums = [(g * x * r)[start:stop].sum(axis=0) for start, stop in pairwise(bounds)]
    sizes = [abs(g * x * r)[start:stop].sum(axis=0) for start, stop in pairwise(bounds)]
    assert_close("grad_weight", grad_weight, FLOAT32, np.array(sums), np.array(sizes))


def rotary(device: Device, kind: Kind, s: int, b: int, heads: int, kv: int, d: int, offset: int = 0) -> None:
    """Both ways: what rotary_split gives, and what rotary_join makes of other values in that form."""
    all_heads, half = heads + 2 * kv, d // 2
    qkv = device.give(kind.encode(normal(1, s, b, all_heads, d)), offset)
    angles = np.random.default_rng(2).uniform(-3, 3, (s, d))
    cos, sin = (device.give(table(angles).astype(np.float32), offset) for table in (np.cos, np.sin))
    cosines, sines = (table.astype(np.float64)[:, None, None, :half] for table in (cos, sin))
    groups = (heads, kv, kv)

    def turned(values: Array, sign: float, size: bool) -> Array:
        """[s, b, all heads, d]; with `size` the sum of the terms' magnitudes."""
        wide = abs(values) if size else values
        c, n = (abs(cosines), abs(sines)) if size else (cosines, sign * sines)
        first, second = wide[..., :half], wide[..., half:]
        result = np.concatenate([first * c + (n if size else -n) * second, second * c + first * n], axis=-1)
        result[..., heads + kv :, :] = wide[..., heads + kv :, :]
        return result

    def apart(joined: Array) -> list[Array]:
        """[s, b, all heads, d] → query, key and value [b, heads or kv, s, d]."""
        return [part.transpose(1, 2, 0, 3) for part in np.split(joined, np.cumsum(groups)[:2], axis=2)]

    outputs = [device.empty((b, group, s, d), kind.storage, offset) for group in groups]
    device.call("rotary_split", kind.code, qkv, cos, sin, *outputs, s, b, heads, kv, d)
    x = kind.decode(qkv)
    for name, got, expected, terms in zip(
        ("query", "key", "value"), outputs, apart(turned(x, 1, False)), apart(turned(x, 1, True)), strict=True
    ):
        assert_close(name, got, kind, expected, terms)

    upstream = kind.encode(normal(3, s, b, all_heads, d))
    grads = [device.give(np.ascontiguousarray(part), offset) for part in apart(upstream)]
    grad_qkv = device.empty(qkv.shape, kind.storage, offset)
    device.call("rotary_join", kind.code, *grads, cos, sin, grad_qkv, s, b, heads, kv, d)
    g = kind.decode(upstream)
    assert_close("grad_qkv", grad_qkv, kind, turned(g, -1, False), turned(g, -1, True))


def swiglu(device: Device, kind: Kind, rows: int, f: int, offset: int = 0, extreme: float = 1.0) -> None:
    """Both directions; `extreme` replaces the first gate."""
    values = 3 * normal(1, rows, 2 * f)
    values[0, 0] *= extreme
    gate_up = device.give(kind.encode(values), offset)
    grad = device.give(kind.encode(normal(2, rows, f)), offset)
    output, grad_gate_up = (device.empty((rows, n), kind.storage, offset) for n in (f, 2 * f))
    device.call("swiglu", kind.code, gate_up, output, rows, f)
    device.call("swiglu_backward", kind.code, grad, gate_up, grad_gate_up, rows, f)
    with np.errstate(all="ignore"):
        gate, up, upstream = kind.decode(gate_up)[:, :f], kind.decode(gate_up)[:, f:], kind.decode(grad)
        share = 1 / (1 + np.exp(-gate))
        rest = 1 / (1 + np.exp(gate))  # 1 - share, without its loss
        slope, size = share + gate * share * rest, share + abs(gate) * share * rest
        # Float32 has 1 - share only to 6e-8 of 1.
        terms = np.concatenate([abs(upstream * up) * (size + abs(gate) * share * 0.1), abs(upstream * gate * share)], 1)
        expected = np.concatenate([upstream * up * slope, upstream * gate * share], 1)
    assert_close("output", output, kind, gate * share * up)
    assert_close("grad_gate_up", grad_gate_up, kind, expected, terms)


def make_targets(rows: int, columns: int, valid: int) -> Array:
    """Among the valid columns, at their edges, and outside on either side."""
    targets = np.random.default_rng(5).integers(-2, columns + 3, rows)
    for row, target in enumerate([0, valid - 1, valid, -1, columns][:rows]):
        targets[row] = target
    return targets.astype(np.int64)


def cross_entropy(
    device: Device, kind: Kind, rows: int, columns: int, valid: int, offset: int = 0, special: float = 0.0
) -> None:
    """The statistics, and the gradient in place; `special` is what one logit of each row is where it is not 0."""
    values = 4 * normal(rows, rows, columns)
    if special:
        values[:, columns // 3] = special
    start = kind.encode(values)
    logits, targets = device.give(start, offset), device.give(make_targets(rows, columns, valid))
    statistics = device.empty((3, rows), np.float32)
    device.call("cross_entropy_statistics", kind.code, logits, targets, statistics, rows, columns, valid)
    assert logits.tobytes() == start.tobytes(), "the statistics changed the logits"
    x = kind.decode(start)[:, :valid]
    with np.errstate(all="ignore"):
        maximum = x.max(axis=1, initial=-np.inf)
        sums = np.exp(x - np.where(np.isneginf(maximum), 0, maximum)[:, None]).sum(axis=1)
    inside = (targets >= 0) & (targets < valid)
    picked = np.take_along_axis(x, np.clip(targets, 0, valid - 1)[:, None], 1)[:, 0] if valid else np.zeros(rows)
    if not np.isnan(maximum).any():  # a NaN shows in the sum alone
        assert_close("maximum", statistics[0], FLOAT32, maximum, np.zeros(rows))
    assert_close("sum", statistics[1], FLOAT32, sums)
    assert_close("target", statistics[2], FLOAT32, np.where(inside, picked, 0.0))

    log_sum_exp = device.give((3 + 0.1 * normal(7, rows)).astype(np.float32))
    grad = device.give(normal(8, rows).astype(np.float32))
    device.call("cross_entropy_gradient", kind.code, logits, targets, log_sum_exp, grad, rows, columns, valid)
    with np.errstate(all="ignore"):
        exponent = x - log_sum_exp.astype(np.float64)[:, None]
        probability = np.exp(exponent)
    hot = np.arange(valid) == targets[:, None]
    expected, terms = np.zeros((rows, columns)), np.zeros((rows, columns))
    factor = grad.astype(np.float64)[:, None]
    expected[:, :valid] = (probability - hot) * factor
    with np.errstate(all="ignore"):
        lost = np.where(probability > 0, probability * (1 + 0.1 * abs(exponent)), 0)  # by rounding the difference
        terms[:, :valid] = (lost + hot) * abs(factor)
    assert_close("gradient", logits, kind, expected, terms)


def adamw(device: Device, count: int, offset: int = 0, with_weights: bool = True, not_finite: float = 0.0) -> None:
    rate, beta1, beta2, eps, decay, divisor, updates = 3e-4, 0.9, 0.95, 1e-8, 0.1, 2.5, 3.0
    start = [normal(1, count), normal(2, count), 0.1 * normal(3, count), 0.01 * normal(4, count) ** 2]
    master, gradient, mean, square = (device.give(FLOAT32.encode(values), offset) for values in start)
    p, g, m, v = (FLOAT32.decode(array) for array in (master, gradient, mean, square))
    before = [array.copy() for array in (master, mean, square)]
    weights = device.empty((count,), np.uint16, offset) if with_weights else None
    scalars = [device.give(np.array([value], np.float32)) for value in (divisor, not_finite, updates)]
    device.call(
        "adamw", 0, master, gradient, mean, square, weights, *scalars, count, rate, beta1, beta2, eps, decay
    )  # fmt: skip
    if not_finite:
        assert all((old == new).all() for old, new in zip(before, (master, mean, square), strict=True))
        assert weights is None or (weights == 0xFFFF).all()
        return
    scaled = g / divisor
    m_new, m_terms = beta1 * m + (1 - beta1) * scaled, abs(m) + abs(scaled)
    v_new = beta2 * v + (1 - beta2) * scaled**2
    denominator = np.sqrt(v_new / (1 - beta2**updates)) + eps
    step = rate / (1 - beta1**updates) / denominator
    assert_close("exp_avg", mean, FLOAT32, m_new, m_terms)
    assert_close("exp_avg_sq", square, FLOAT32, v_new)
    assert_close("master", master, FLOAT32, p * (1 - rate * decay) - step * m_new, abs(p) + step * m_terms)
    if weights is not None:
        assert (weights == BFLOAT16.encode(master)).all(), "weights are not the rounded masters"


def squared_norm(device: Device, kind: Kind, count: int, parts: int, offset: int = 0) -> None:
    flat = device.give(kind.encode(normal(1, count)), offset)
    sums = device.empty((parts,), np.float64)
    device.call("squared_norm", kind.code, flat, sums, parts, count)
    squares = kind.decode(flat) ** 2
    bounds = [count * part // parts for part in range(parts + 1)]
    expected = np.array([squares[start:stop].sum() for start, stop in pairwise(bounds)])
    assert np.allclose(sums, expected, rtol=1e-14, atol=0), f"squared_norm {kind.name}: {sums} for {expected}"


def _small_rms_norm(device: Device, kind: Kind) -> None:
    for columns in (1, 33, 257, 264, 2051):
        rms_norm(device, kind, 2, columns)
        add_rms_norm(device, kind, 2, columns, offset=1)
    for rows, columns, parts in ((5, 33, 2), (2, 264, 3), (5, 520, 1), (3, 2051, 2)):
        rms_norm_backward(device, kind, rows, columns, parts)


def _small_rotary(device: Device, kind: Kind) -> None:
    rotary(device, kind, 3, 2, 4, 2, 16)
    rotary(device, kind, 2, 1, 3, 1, 6, offset=1)


def _small_swiglu(device: Device, kind: Kind) -> None:
    for f, offset in ((1, 0), (33, 1), (264, 0), (264, 1)):
        swiglu(device, kind, 2, f, offset)


def _small_cross_entropy(device: Device, kind: Kind) -> None:
    for columns, valid, offset in ((1, 1, 0), (33, 31, 1), (264, 257, 0), (4099, 4001, 3), (8, 0, 0)):
        cross_entropy(device, kind, 3, columns, valid, offset)


def _small_adamw(device: Device, kind: Kind) -> None:
    for count, offset in ((1, 0), (257, 0), (1030, 0), (1030, 1)):
        adamw(device, count, offset)


def _small_squared_norm(device: Device, kind: Kind) -> None:
    for count, parts, offset in ((1, 3, 0), (33, 2, 1), (5003, 3, 0)):
        squared_norm(device, kind, count, parts, offset)


# A few sizes per file of csrc/cuda, for the sanitizers and the planted bugs.
SMALL: dict[str, Callable[[Device, Kind], None]] = {
    "rms_norm": _small_rms_norm,
    "rotary": _small_rotary,
    "swiglu": _small_swiglu,
    "cross_entropy": _small_cross_entropy,
    "adamw": _small_adamw,
    "squared_norm": _small_squared_norm,
}
