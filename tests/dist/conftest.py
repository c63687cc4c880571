"""Makes the worker pools available to the tests of this folder."""

from tests.dist.pool import pools

__all__ = ["pools"]
