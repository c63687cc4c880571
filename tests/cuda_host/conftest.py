"""The kernels built once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cuda_host.build import PLAIN, build, missing
from tests.cuda_host.device import Device


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := missing():
        pytest.skip(reason)
    return build(tmp_path_factory.mktemp("cuda_host"), PLAIN)


@pytest.fixture
def device(library: Path) -> Iterator[Device]:
    device = Device(library)
    yield device
    device.order(0)
    device.release()
