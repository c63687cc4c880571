"""Rotary embedding against a product of complex numbers in float64, up to position 4000."""

from __future__ import annotations

import pytest
import torch

from megatron.kernels.rotary import rotary_split, rotary_tables

from .reference import DTYPES, assert_within

LENGTH, SIZE = 4001, 32
WIDE = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
CPU = torch.device("cpu")


def exact_angles(theta: float) -> torch.Tensor:
    """[position, pair]"""
    pairs = torch.arange(SIZE // 2, dtype=torch.float64)
    return torch.outer(torch.arange(LENGTH, dtype=torch.float64), theta ** (-2.0 * pairs / SIZE))


def allowed_angle_error(angles: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The power, its inverse and the product are each rounded to max(float32, dtype)."""
    return (2 + 3 * angles) * torch.finfo(WIDE[dtype]).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_tables_are_precise_at_every_position(dtype: torch.dtype, theta: float) -> None:
    angles = exact_angles(theta)
    allowed = allowed_angle_error(angles, dtype)
    for table, exact in zip(rotary_tables(LENGTH, SIZE, theta, dtype, CPU), (angles.cos(), angles.sin()), strict=True):
        assert table.shape == (LENGTH, SIZE) and table.dtype == WIDE[dtype]
        for half in table.chunk(2, dim=-1):
            assert_within(half, exact, allowed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_are_turned_and_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(LENGTH, 1, 3 * SIZE, generator=generator, dtype=torch.float64).to(dtype)
    query, key, value = rotary_split(qkv, *rotary_tables(LENGTH, SIZE, 1e4, dtype, CPU), 1, 1)
    assert query.dtype == dtype and query.shape == key.shape == value.shape == (1, 1, LENGTH, SIZE)
    assert torch.equal(value[0, 0], qkv[:, 0, 2 * SIZE :])
    found, heads = torch.stack((query[0, 0], key[0, 0])), qkv[:, 0].unflatten(-1, (3, SIZE))[:, :2].transpose(0, 1)
    angles = exact_angles(1e4)
    pairs = torch.complex(*heads.double().chunk(2, dim=-1))
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    of_angle = allowed_angle_error(angles, dtype) * pairs.abs()
    for half, exact in zip(found.chunk(2, dim=-1), (turned.real, turned.imag), strict=True):
        rounded = 0.5 * torch.finfo(dtype).eps * exact.abs() if dtype is torch.bfloat16 else 0.0
        assert_within(half, exact, 1.01 * rounded + 2 * of_angle)
