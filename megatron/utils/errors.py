"""The errors that users see: each says what is wrong (with the values), the rule, and the cure.

The command line prints the message of a `MegatronError` without a traceback and exits with code 2.
Anything else that escapes is a bug of this project, and keeps its traceback.
"""

from __future__ import annotations


class MegatronError(Exception):
    """Base of all errors that a user can mend. `alone`: other processes of the run do not raise the same."""

    alone = False


class ConfigError(MegatronError):
    """The configuration, or a command line, asks for something that cannot be."""


class DataError(MegatronError):
    """Token data, text or a tokenizer is missing, damaged or does not fit."""


class CheckpointError(MegatronError):
    """A checkpoint or model folder is missing, damaged or does not fit."""


class ResourceError(MegatronError):
    """This process ran out of something: device memory, disk space, time."""

    alone = True
