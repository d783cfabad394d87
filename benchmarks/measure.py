"""Measure times, bytes kept for the backward pass, and the machine's peak rates."""

import contextlib
import ctypes
import gc
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abn_exp.training.parallel import memory, synchronize

K = TypeVar("K")


class Quartiles(NamedTuple):
    low: float
    median: float
    high: float


def quartiles(values: list[float]) -> Quartiles:
    """Return the three quartiles of repeated measurements."""
    return Quartiles(*(float(value) for value in np.quantile(values, [0.25, 0.5, 0.75])))


def interleaved(calls: Mapping[K, Callable[[], float]], repetitions: int) -> dict[K, list[float]]:
    """Call everything in turn, `repetitions` times, so that a disturbance of the machine affects all alike."""
    found: dict[K, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions):
        for name, call in calls.items():
            found[name].append(call())
    return found


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return how long a call takes until its device has finished."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def saved_bytes(call: Callable[[], Tensor], network: nn.Module) -> int:
    """Return how many bytes a forward pass keeps for the backward one, each storage once.

    Parameters are left out, and what has a parameter's shape: binarised weights, which no batch makes more.
    """
    shapes = {parameter.shape for parameter in network.parameters()}
    kept: dict[int, Tensor] = {}  # the tensors themselves, so that no storage is freed and its address used again

    def pack(x: Tensor) -> Tensor:
        if x.shape not in shapes:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        call()
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def trim() -> None:
    """Return free memory to the system, so that the rest is in use."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak_bytes(call: Callable[[], Any], device: torch.device) -> float:
    """Return the memory that a call takes above what was in use before it; NaN where the system does not say."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        trim()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
        before = memory("VmRSS")
        call()
        return memory("VmHWM") - before
    except OSError:
        return math.nan


def host_growth(step: Callable[[], Any], steps: int) -> float:
    """Return by how many bytes a step this process grows, over the later `steps` of twice as many; NaN: unknown."""
    try:
        for i in range(2 * steps):
            if i == steps:
                trim()
                before = memory("VmRSS")
            step()
        trim()
        return (memory("VmRSS") - before) / steps
    except OSError:
        return math.nan


class Ceilings(NamedTuple):
    """What the device does at best: FLOP/s of matrix products by type, bytes/s of a copy (read and written)."""

    products: dict[torch.dtype, float]
    copy: float

    def or_higher(self, other: "Ceilings") -> "Ceilings":
        """Return the higher of two measurements of each."""
        products = {dtype: max(rate, other.products[dtype]) for dtype, rate in self.products.items()}
        return Ceilings(products, max(self.copy, other.copy))


def ceilings(device: torch.device, repetitions: int) -> Ceilings:
    """Measure the ceilings: products (float32 as TF32 where there is one), and a copy.

    Of products the faster of two kinds counts, square matrices and a wide convolution: on a CPU they come from two
    libraries, of which either may be the slower by half.
    """
    size, megabytes = (8192, 2048) if device.type == "cuda" else (1024, 128)  # bfloat16 is slow where it is emulated
    calls: dict[str, Callable[[], float]] = {}
    work: dict[str, float] = {}
    types = [torch.float32, torch.bfloat16, *[torch.float16] * (device.type == "cuda")]
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    for dtype in types:
        a = torch.randn(size, size, device=device, dtype=dtype)
        calls[f"{dtype} matrix"] = partial(seconds, partial(torch.mm, a, a), device)
        work[f"{dtype} matrix"] = 2.0 * size**3
        images = torch.randn(size // 128, 256, 32, 32, device=device, dtype=dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        kernel = torch.randn(256, 256, 3, 3, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
        calls[f"{dtype} convolution"] = partial(seconds, partial(F.conv2d, images, kernel, padding=1), device)
        work[f"{dtype} convolution"] = 2.0 * images.numel() * kernel[0].numel()
    source = torch.zeros(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    calls["copy"] = partial(seconds, partial(target.copy_, source), device)
    work["copy"] = 2.0 * source.numel()
    for call in calls.values():
        call()
    found = interleaved(calls, repetitions)
    torch.backends.cuda.matmul.allow_tf32 = before
    best = {name: work[name] / min(times) for name, times in found.items()}
    products = {dtype: max(best[f"{dtype} matrix"], best[f"{dtype} convolution"]) for dtype in types}
    return Ceilings(products, best["copy"])


PRODUCTS = (
    *("aten::convolution", "aten::convolution_backward", "aten::mm", "aten::addmm", "aten::bmm"),
    "onednn::qconv2d_pointwise",  # exact16's, of signs as 8-bit integers on a CPU
)


def product_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return how long the convolutions and matrix products of a call take, as torch's profiler finds."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        call()
        synchronize(device)
    events = [event for event in profile.key_averages() if event.key in PRODUCTS]
    time_of = "device_time_total" if device.type == "cuda" else "cpu_time_total"
    return sum(getattr(event, time_of) for event in events) / 1e6


def exponent(sizes: list[float], values: list[float]) -> float:
    """Return b of values = a sizes^b, by least squares of their logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
