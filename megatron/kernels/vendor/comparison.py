"""Whether an adapter's numbers are as good as the reference's: both against float64, on the present device."""

from __future__ import annotations

import torch

from megatron.utils.errors import ConfigError

# Times the reference's error. Another order of sums makes less than this; a wrong mask, scale or layout far more.
_SLACK = 2.0
_FLOOR = 1e-6

# (name, the adapter's result, the reference's, the exact one)
Result = tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]


def require_agreement(key: str, results: list[Result]) -> str:
    """The errors in one clause. Raises ConfigError with the figures where an adapter's result is not finite, or farther
    from float64 than twice the reference's distance."""
    words = []
    for name, found, reference, exact in results:
        error, usual = _error(found, exact), _error(reference, exact)
        allowed = _SLACK * usual + _FLOOR
        if not error <= allowed:  # also where it is not a number
            raise ConfigError(
                f"{key}=true is refused: compared with float64 on {exact.device}, the library's {name} is off by "
                f"{error:.1e}, the reference's by {usual:.1e}; allowed is {allowed:.1e}; use {key}=false, or another "
                "version of the library"
            )
        words.append(f"{name} {error:.0e} against {usual:.0e}")
    return "error against float64, here and of the reference: " + ", ".join(words)


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """‖found − exact‖ / ‖exact‖."""
    return float((found.double() - exact).norm() / exact.norm())
