"""What a run costs besides time: energy and carbon dioxide, under stated assumptions."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.plan.result import Result

# A busy training GPU draws close to its limit; host, network and cooling come on top (Patterson et al., 2021: a modern
# data centre's overhead is about 1.1, and a server draws about as much again as a quarter of its GPUs).
SHARE_OF_POWER_LIMIT, SERVER_OVERHEAD, COOLING_OVERHEAD = 0.9, 1.25, 1.1
# Grams of CO₂ for a kWh, a mean of the world's grids in 2023 (Ember, Global Electricity Review 2024).
KG_CO2_PER_KWH = 0.48


@dataclass(frozen=True)
class Energy:
    """Of the whole run."""

    gpu_hours: float
    kwh: float
    kg_co2: float


def energy_of(result: Result) -> Energy:
    """GPU-hours, kWh and kg of CO₂ of all steps."""
    hours = result.steps * result.step_s / 3600.0
    watts = result.gpus * result.power_w * SHARE_OF_POWER_LIMIT * SERVER_OVERHEAD * COOLING_OVERHEAD
    kwh = watts * hours / 1000.0
    return Energy(hours * result.gpus, kwh, kwh * KG_CO2_PER_KWH)
