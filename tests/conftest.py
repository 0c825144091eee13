"""Hypothesis settings of all tests, and a cache folder that is not the user's."""

from __future__ import annotations

import os
import tempfile

from hypothesis import HealthCheck, settings

# Token caches of every test and of the programs that tests start; removed when this process ends.
_CACHE = tempfile.TemporaryDirectory(prefix="ctxext-test-cache-", ignore_cleanup_errors=True)
os.environ["CTXEXT_CACHE_DIR"] = _CACHE.name

# Derandomised, so that a red test means a change and not bad luck; no deadline, because shared machines stall.
settings.register_profile(
    "ctxext", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("ctxext")
