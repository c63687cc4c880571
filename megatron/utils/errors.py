"""The errors that users see: each says what is wrong (with the values), the rule, and the cure.

The command line prints the message of a `MegatronError` without a traceback and exits with code 2.
Anything else that escapes is a bug of this project, and keeps its traceback.
"""

from __future__ import annotations

from typing import Literal


class MegatronError(Exception):
    """Base of all errors that a user can mend.

    `met_by` tells which processes raise the same error, so that it is said once: "machine" (all of a machine, say for
    a bad command line), "process" (this one alone), or "world" (the ranks have agreed on it).
    """

    met_by: Literal["machine", "process", "world"] = "machine"


class ConfigError(MegatronError):
    """The configuration, or a command line, asks for something that cannot be."""


class DataError(MegatronError):
    """Token data, text or a tokenizer is missing, damaged or does not fit."""


class CheckpointError(MegatronError):
    """A checkpoint or model folder is missing, damaged or does not fit."""


class TrainingError(MegatronError):
    """Training does not get on, on all ranks alike, and going on would change nothing about it."""

    met_by = "world"


class ResourceError(MegatronError):
    """This process ran out of something: device memory, disk space, time."""

    met_by = "process"
