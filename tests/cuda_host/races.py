"""ThreadSanitizer over the CUDA kernels: no races in them, and a report for every barrier that is taken out.

python -m tests.cuda_host.races

It takes a minute, so it is no part of the test suite. Only __syncthreads and __syncwarp order memory here, as CUDA has
it: kernels that rely on the order in which a GPU happens to run things are found too.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.cuda_host.bugs import MISSING_BARRIERS
from tests.cuda_host.build import KERNELS, THREAD, Bug, build, missing, run_apart


def report(folder: Path, bug: Bug | None, kernels: tuple[str, ...]) -> tuple[bool, str]:
    """Whether a race was reported, and where. A failure of another kind is an error."""
    done = run_apart(build(folder, THREAD, bug, kernels), THREAD, kernels)
    race = "WARNING: ThreadSanitizer: data race" in done.stderr
    if done.returncode != (66 if race else 0):
        raise SystemExit(f"the run failed with status {done.returncode}:\n{done.stderr[-4000:]}")
    lines = [line.strip() for line in done.stderr.splitlines() if "SUMMARY" in line or "csrc/cuda" in line]
    return race, "\n".join(lines[:4])


def main() -> int:
    if reason := missing(THREAD):
        print(f"skipped: {reason}")
        return 0
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        race, where = report(Path(folder, "right"), None, KERNELS)
        print(f"kernels as they are: {'RACE' if race else 'no race'}\n{where}")
        failed |= race
        for number, (name, (bug, kernels)) in enumerate(MISSING_BARRIERS.items()):
            race, where = report(Path(folder, str(number)), bug, kernels)
            print(f"barrier {name} taken out: {'found' if race else 'NOT FOUND'}\n{where}")
            failed |= not race
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
