"""Stated peaks against what the chips' clocks and units make, and the measured one against made-up times."""

import pytest
import torch

from cifar_dist.cost import peak
from cifar_dist.cost.flops import Peak
from cifar_dist.cost.peak import device_peak

CUDA = torch.device("cuda")
MEASURED = Peak(1e12, "measured")


@pytest.fixture
def gpu(monkeypatch):
    """Says what the GPU is called; one that no sheet names is measured."""
    monkeypatch.setattr(peak, "_measured_peak", lambda device, precision: MEASURED)
    return lambda name: monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)


# As torch names them: streaming multiprocessors, boost clock (GHz), and fp16 operations of its tensor cores in a clock.
CHIPS = {
    "Tesla V100-SXM2-32GB": (80, 1.53, 1024),
    "Tesla V100-PCIE-16GB": (80, 1.38, 1024),
    "Tesla T4": (40, 1.59, 1024),
    "NVIDIA A10": (72, 1.695, 1024),
    "NVIDIA A100-SXM4-80GB": (108, 1.41, 2048),
    "NVIDIA A100 80GB PCIe": (108, 1.41, 2048),
    "NVIDIA L4": (58, 2.04, 1024),
    "NVIDIA L40S": (142, 2.52, 1024),
    "NVIDIA H100 80GB HBM3": (132, 1.83, 4096),
    "NVIDIA H100 PCIe": (114, 1.62, 4096),
    "NVIDIA H200": (132, 1.83, 4096),
    "NVIDIA GeForce RTX 3090": (82, 1.695, 512),
    "NVIDIA GeForce RTX 4090": (128, 2.52, 512),
}


@pytest.mark.parametrize("name", CHIPS)
def test_stated_peaks_are_what_the_chips_can_do(name, gpu):
    gpu(name)
    processors, gigahertz, operations = CHIPS[name]
    found = device_peak(CUDA, "fp16")
    assert found.flops_per_second == pytest.approx(processors * gigahertz * 1e9 * operations, rel=0.02)
    assert name in found.source and "fp16" in found.source


# Streaming multiprocessors, boost clock (GHz), and fp32 lanes of one; a lane multiplies and adds in a clock.
LANES = {
    "Tesla V100-SXM2-16GB": (80, 1.53, 64),
    "Tesla V100-PCIE-32GB": (80, 1.38, 64),
    "Tesla T4": (40, 1.59, 64),
    "NVIDIA A10": (72, 1.695, 128),
    "NVIDIA A100-SXM4-40GB": (108, 1.41, 64),
    "NVIDIA A100-PCIE-40GB": (108, 1.41, 64),
    "NVIDIA L4": (58, 2.04, 128),
    "NVIDIA L40S": (142, 2.52, 128),
    "NVIDIA H100 80GB HBM3": (132, 1.98, 128),
    "NVIDIA H100 PCIe": (114, 1.755, 128),
    "NVIDIA H200": (132, 1.98, 128),
    "NVIDIA B200": (148, 1.965, 128),
    "NVIDIA GeForce RTX 3090": (82, 1.695, 128),
    "NVIDIA GeForce RTX 4090": (128, 2.52, 128),
}


@pytest.mark.parametrize("name", LANES)
def test_stated_fp32_is_what_the_lanes_can_do(name, gpu, monkeypatch):
    gpu(name)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    processors, gigahertz, lanes = LANES[name]
    assert device_peak(CUDA, "fp32").flops_per_second == pytest.approx(2e9 * processors * gigahertz * lanes, rel=0.02)


@pytest.mark.parametrize("name", [name for name in CHIPS if "V100" not in name and "T4" not in name])
def test_bf16_is_as_fast_as_fp16_and_tf32_half_of_that(name, gpu, monkeypatch):
    gpu(name)
    half = device_peak(CUDA, "fp16").flops_per_second
    assert device_peak(CUDA, "bf16").flops_per_second == half
    assert device_peak(CUDA, "fp32").flops_per_second == pytest.approx(half / 2, rel=0.02)
    assert "tf32" in device_peak(CUDA, "fp32").source
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    assert device_peak(CUDA, "fp32").flops_per_second <= 1.01 * half / 2
    assert "fp32" in device_peak(CUDA, "fp32").source


@pytest.mark.parametrize(
    "name",
    ["NVIDIA A10G", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA H200 NVL", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA L40"],
)
def test_a_gpu_of_a_similar_name_is_measured(name, gpu):
    gpu(name)
    assert device_peak(CUDA, "fp16") == MEASURED


def test_what_is_not_stated_is_measured(gpu):
    gpu("Tesla V100-SXM2-16GB")
    assert device_peak(CUDA, "bf16") == MEASURED
    assert device_peak(CUDA, "fp32").flops_per_second == 15.7e12
    assert device_peak(torch.device("cpu"), "fp32") == MEASURED


@pytest.mark.parametrize(
    "convolution, best", [([9e9], 2 * 1024**3), ([3.0, 1.0], 64 * 16 * 16 * 128 * 128 * 9 * 2)], ids=["matrix", "conv"]
)
def test_a_measured_peak_is_of_the_best_product(monkeypatch, convolution, best):
    def taken(work, device, seconds):
        shape = work.args[0].shape
        assert work().shape == shape
        return {512: [0.5], 1024: [2.0, 1.0, 4.0], 2048: [99.0], 64: convolution}[shape[0]]

    monkeypatch.setattr(peak, "durations", taken)
    found = device_peak(torch.device("cpu"), "bf16")
    assert found.flops_per_second == best
    assert "measured" in found.source and "bf16" in found.source


def test_products_are_really_measured():
    assert peak._measured_peak(torch.device("cpu"), "fp32", seconds=0.01).flops_per_second > 0
