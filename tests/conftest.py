"""Hypothesis settings of all tests, a cache folder that is not the user's, and no precision left over by a test."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# Token caches of every test and of the programs that tests start; removed when this process ends.
_CACHE = tempfile.TemporaryDirectory(prefix="ctxext-test-cache-", ignore_cleanup_errors=True)
os.environ["CTXEXT_CACHE_DIR"] = _CACHE.name

# Derandomised, so that a red test means a change and not bad luck; no deadline, because shared machines stall.
settings.register_profile(
    "ctxext", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("ctxext")


@pytest.fixture(autouse=True)
def _precision_of_its_own() -> Iterator[None]:
    """Accelerate keeps the first precision of a process: after a test in bfloat16 the next would have it too."""
    yield
    state = sys.modules.get("accelerate.state")  # most tests never load it
    if state is not None:
        state.AcceleratorState._reset_state()
