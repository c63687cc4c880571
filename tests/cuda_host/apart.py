"""Runs the small cases of kernels on a built library, in a process that a sanitizer watches.

python -m tests.cuda_host.apart LIBRARY KERNEL…
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.cuda_host.cases import SMALL
from tests.cuda_host.device import ORDERS, Device
from tests.cuda_host.numerics import KINDS


def main(library: str, kernels: list[str]) -> None:
    device = Device(Path(library))
    for order in ORDERS[:2]:
        device.order(order)
        for kernel in kernels:
            for kind in KINDS:
                SMALL[kernel](device, kind)
                device.release()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
