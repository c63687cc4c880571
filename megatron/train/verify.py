"""Reading a checkpoint through before a run starts from it, so that a damaged file is noticed and not trained on.

The ranks share the work, each file being read once. It must not know what the files hold.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from megatron.checkpoint.native import MANIFEST, Manifest, read_manifest
from megatron.parallel.world import World
from megatron.utils.errors import CheckpointError
from megatron.utils.files import checksum_file
from megatron.utils.logging import get_logger
from megatron.utils.units import format_bytes

_logger = get_logger("megatron.train")


def find_damage(folder: Path, world: World, leave_out: Collection[str] = ()) -> list[str]:
    """The files of a checkpoint whose content is not what was written, alike on all ranks, which call it together.

    Files in `leave_out` are not looked at. Raises CheckpointError where the list of files cannot be read.
    """
    manifest = world.agree(lambda: read_manifest(folder))
    names = [name for name in manifest.files if name not in leave_out]
    total_bytes = sum(manifest.files[name][0] for name in names)
    _logger.info("comparing the checksums of %s (%s)", folder, format_bytes(total_bytes))
    # The largest first, so that the shares come out even.
    names.sort(key=lambda name: (-manifest.files[name][0], name))
    share = names[world.launch.rank :: world.launch.world_size]
    found = world.agree(lambda: _find_damaged(folder, manifest, share))
    return sorted(name for report in world.exchange(json.dumps(found)) for name in json.loads(report))


def refuse_damage(folder: Path, world: World, leave_out: Collection[str] = ()) -> None:
    """Raise CheckpointError on all ranks where `find_damage` finds any."""
    damaged = find_damage(folder, world, leave_out)

    def refuse() -> None:
        if damaged:
            raise CheckpointError(
                f"{folder} is damaged: {describe_damage(damaged)}. Use another copy or an older checkpoint."
            )

    world.agree(refuse)


def describe_damage(damaged: Sequence[str]) -> str:
    """What is wrong with a checkpoint that has these damaged files."""
    more = f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
    return f"the content of {', '.join(damaged[:5])}{more} is not what {MANIFEST} has the checksum of"


def _find_damaged(folder: Path, manifest: Manifest, names: Sequence[str]) -> list[str]:
    """Those of the files that have another content than was written, or that cannot be read."""
    damaged = []
    for name in names:
        try:
            right = checksum_file(folder / name) == manifest.files[name][1]
        except OSError as error:
            damaged.append(f"{name} ({error.strerror})")
        else:
            damaged += [] if right else [name]
    return damaged
