"""The harness proves itself: bugs planted in the kernels' sources must not pass it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda_host import bugs
from tests.cuda_host.build import ADDRESS, KERNELS, PLAIN, build, missing, run_apart
from tests.cuda_host.cases import SMALL
from tests.cuda_host.device import ORDERS, Device
from tests.cuda_host.numerics import KINDS


def _orders_that_fail(library: Path, kernels: tuple[str, ...]) -> list[int]:
    """Orders of warps in which some kernel's numbers are wrong."""
    device, failed = Device(library), []
    for order in ORDERS:
        device.order(order)
        try:
            for kernel in kernels:
                for kind in KINDS:
                    SMALL[kernel](device, kind)
        except AssertionError:
            failed.append(order)
    device.release()
    return failed


@pytest.mark.parametrize("name", bugs.MISSING_BARRIERS | bugs.WRONG_NUMBERS)
def test_wrong_numbers_show(tmp_path: Path, name: str) -> None:
    if reason := missing():
        pytest.skip(reason)
    bug, kernels = (bugs.MISSING_BARRIERS | bugs.WRONG_NUMBERS)[name]
    assert _orders_that_fail(build(tmp_path, PLAIN, bug, kernels), kernels)


def test_right_numbers_pass(library: Path) -> None:
    assert _orders_that_fail(library, KERNELS) == []


def _skip_without_sanitizer() -> None:
    if reason := missing(ADDRESS):
        pytest.skip(reason)


@pytest.mark.timeout(900)  # a dozen seconds, but of compiling, which a busy machine makes minutes
def test_sanitizers_find_nothing_in_the_kernels(tmp_path: Path) -> None:
    """AddressSanitizer and UndefinedBehaviorSanitizer over the small cases of all kernels."""
    _skip_without_sanitizer()
    done = run_apart(build(tmp_path, ADDRESS), ADDRESS, KERNELS)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("name", bugs.OUT_OF_BOUNDS)
def test_sanitizers_find_planted_bugs(tmp_path: Path, name: str) -> None:
    _skip_without_sanitizer()
    bug, kernels, words = bugs.OUT_OF_BOUNDS[name]
    done = run_apart(build(tmp_path, ADDRESS, bug, kernels), ADDRESS, kernels)
    assert done.returncode != 0
    for word in words:
        assert word in done.stderr, done.stderr[-4000:]
