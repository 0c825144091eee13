"""Known GPUs by the names that drivers give; the peak of memory that a process has really had."""

from __future__ import annotations

import pytest
import torch

from ctxext.model.peaks import peak_bytes, peak_flops_per_second, peak_resident_bytes


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X OAM", 1307.4),
    ],
)
def test_a_known_gpu_has_the_speed_of_its_data_sheet(name: str, tflops: float) -> None:
    assert peak_flops_per_second(name) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize("name", ["NVIDIA L40", "NVIDIA GeForce RTX 4070", "NVIDIA T4", "cpu", ""])
def test_an_unknown_one_has_none(name: str) -> None:
    assert peak_flops_per_second(name) is None


def test_the_resident_peak_rises_with_what_is_held() -> None:
    before = peak_resident_bytes()
    assert before is not None
    held = torch.ones(max(before // 4, 1 << 26))  # float32: as much as the process had at its highest, at least 256 MiB
    after = peak_bytes(torch.device("cpu"))
    assert after is not None
    assert after > before
    assert float(held[-1]) == 1.0
