"""Hypothesis settings of all tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Derandomised, so that a red test means a change and not bad luck; no deadline, because shared machines stall.
settings.register_profile(
    "ctxext", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("ctxext")
