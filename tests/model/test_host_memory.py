"""Freed memory of the CPU stays with the process while it trains and goes back afterwards; its peak is measured."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest
import torch
from support import child_environment

from ctxext.model.host_memory import ResidentPeak, freed_memory_kept

CPU = torch.device("cpu")
MIB = 2**20
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone gives freed blocks back at once")

# In a process of its own: what this one's heap has room for depends on the tests before.
FAULTS = """
import resource, torch
from ctxext.model.host_memory import freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(12_000_000).sum()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

start = resident()
with freed_memory_kept(torch.device("cpu")):
    faults(), faults()
    print(faults(), resident() - start)
print(faults(), resident() - start)
with freed_memory_kept(torch.device("meta")):
    print(faults(), 0)
"""


def test_freed_blocks_are_used_again_without_page_faults_and_go_back_at_the_end() -> None:
    result = subprocess.run(
        [sys.executable, "-c", FAULTS], env=child_environment(), text=True, capture_output=True, check=True, timeout=120
    )
    (kept, held), (after, left), (elsewhere, _) = (map(int, line.split()) for line in result.stdout.splitlines())
    pages_of_one = 48_000_000 // resource.getpagesize()
    assert kept < pages_of_one / 100
    assert held > 40 * MIB
    assert left < 20 * MIB
    # Transparent huge pages may make one fault of 512.
    assert min(after, elsewhere) > 5 * pages_of_one / 512
    assert min(after, elsewhere) > 10 * kept


def test_results_do_not_depend_on_where_memory_comes_from() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(300, 400), torch.randn(400, 500)
    plain = torch.softmax(left @ right, -1)
    with freed_memory_kept(CPU):
        for _ in range(3):
            assert torch.equal(torch.softmax(left @ right, -1), plain)


def test_the_resident_peak_counts_what_was_freed_again_and_nothing_from_before() -> None:
    torch.ones(40 * MIB // 4).sum()
    peak = ResidentPeak()
    peak.start()
    for _ in range(2):
        torch.ones(64 * MIB // 4).sum()
    assert peak.growth_bytes() == pytest.approx(64 * MIB, rel=0.1)
    peak.start()
    assert peak.growth_bytes() == pytest.approx(0, abs=4 * MIB)


def test_a_peak_that_was_never_started_is_unknown() -> None:
    assert ResidentPeak().growth_bytes() is None
