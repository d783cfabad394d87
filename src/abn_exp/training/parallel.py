"""Measure how many runs to train at once on this machine, each in a process of its own (`seeds_at_once=auto`)."""

import logging
import multiprocessing
import os
import queue
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

import torch
from torch import Tensor

from abn_exp.config import Config
from abn_exp.data.catalog import CATALOG
from abn_exp.data.prepare import ImageDataset, Split
from abn_exp.identity import RunPlan
from abn_exp.machine import available_memory, cpu_count
from abn_exp.optimizer import build_optimizer
from abn_exp.training.classifier import LitClassifier, Stage
from abn_exp.training.setup import compile_, configure_process, make_loaders, make_network, select_device
from abn_exp.training.workers import sigint_blocked

SECONDS = 3.0  # of training, for each number that is tried
WARM = 1.0  # of training before the first number
PATIENCE = 180.0  # seconds for the slowest process to start: it imports, builds, compiles
WORTH, AS_GOOD = 1.1, 0.95  # times faster than one at a time; share of the best that makes fewer processes preferable
CONTEXT_BYTES = 600e6  # what a process takes of a GPU before its first tensor

log = logging.getLogger(__name__)
_spawn = multiprocessing.get_context("spawn")  # CUDA does not survive a fork


class StepLoop:
    """A run's network, data, loss and optimizer, stepped without a trainer: for measuring speed."""

    def __init__(self, config: Config, data: ImageDataset, device: torch.device, norm: str = "abn") -> None:
        self.config, self.device = config, device
        configure_process()
        classes = len(data.classes)
        self.network = make_network(config, norm, classes, device)
        if config.compile:
            compile_(self.network)
        self.loaders = make_loaders(config, data, device)
        steps = len(self.loaders["train"])
        self.classifier = LitClassifier(self.network, config.recipe, config.seed, classes, steps)
        self.optimizer = build_optimizer(config.recipe.optimizer.model_dump(), self.network.parameters())

    def loss(self, images: Tensor, labels: Tensor, stage: Stage = "train") -> tuple[Tensor, Tensor]:
        """Return the loss of a batch and the predicted classes."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            return self.classifier._shared_step((images, labels), stage)

    def step(self, batch: tuple[Tensor, Tensor]) -> None:
        """One step of training on one batch."""
        torch.use_deterministic_algorithms(self.config.deterministic)
        torch.backends.cudnn.benchmark = not self.config.deterministic
        self.loss(*batch)[0].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def synchronize(device: torch.device) -> None:
    """Wait for the device; a CPU has always finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(key: str) -> int:
    """Return the bytes of this process in /proc/self/status: VmRSS or VmHWM. Raises OSError where it is not Linux."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def random_data(train: int, test: int, size: int = 32) -> ImageDataset:
    """Return random images: the time of a step does not depend on their content."""
    random = torch.Generator().manual_seed(0)

    def split(n: int) -> Split:
        images = torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=random)
        return Split(images, torch.arange(n) % 10)

    return ImageDataset("random", split(train), split(test), tuple("0123456789"))


def largest(plans: Sequence[RunPlan]) -> RunPlan:
    """Return the run whose speed and memory stand for all: the one whose batch has the most pixels."""
    return max(plans, key=lambda plan: plan.config.dataset.image_size**2 * plan.config.recipe.batch_size)


def measure_best_count(plans: Sequence[RunPlan]) -> int:
    """Return how many of these runs to train at a time, as measured with the largest; log the measurements.

    The number with the most images a second in all, or a smaller one nearly as fast; 1 where more gain little.
    """
    plan = largest(plans)
    config = plan.config
    device = select_device(config)
    counts = candidates(len(plans), device, config.threads)
    if len(counts) < 2:
        return 1
    log.info("seeds_at_once=auto: measuring %s runs at once", ", ".join(map(str, counts)))
    rates = measure(config, plan.choices["norm"], counts, device)
    chosen = choose(rates)
    speeds = ", ".join(f"{count} at once {rate:,.0f} images/s" for count, rate in rates.items())
    log.info("%s in all: %d at a time", speeds or "none could be measured", chosen)
    return chosen


def candidates(pending: int, device: torch.device, threads: int) -> list[int]:
    """Return the numbers to try: powers of two and as many as there are cores for, never more than are pending."""
    cores = max(1, cpu_count() // threads)
    most = min(pending, cores if device.type == "cpu" else min(16 * torch.cuda.device_count(), cores))
    return sorted({count for count in (1, 2, 4, 8, 16, 32, 64, 128, cores) if count <= most})


def choose(rates: dict[int, float]) -> int:
    """Return the least number whose images a second are nearly the best, or 1 where the best gains little."""
    best = max(rates.values(), default=0.0)
    if best < WORTH * rates.get(1, 0.0):
        return 1
    return min((count for count, rate in rates.items() if rate >= AS_GOOD * best), default=1)


def measure(
    config: Config, norm: str, counts: list[int], device: torch.device, seconds: float = SECONDS
) -> dict[int, float]:
    """Return the images a second, in all, of each number of processes that train at once; those that fit."""
    turns = {count: (_spawn.Event(), _spawn.Barrier(count + 1)) for count in counts}
    found: multiprocessing.Queue[tuple[float, float] | None] = _spawn.Queue()
    processes = [
        _spawn.Process(target=_process, args=(config, norm, index, seconds, turns, found), daemon=True)
        for index in range(max(counts))
    ]
    free = _free_bytes(device)
    rates: dict[int, float] = {}
    try:
        for process in processes:
            with sigint_blocked():
                process.start()
        for count in counts:
            asked, barrier = turns[count]
            asked.set()
            barrier.wait(PATIENCE)
            answers = [found.get(timeout=PATIENCE) for _ in range(count)]
            measured = [answer for answer in answers if answer is not None]
            if len(measured) < count:
                raise BrokenBarrierError
            on_one = -(-count // torch.cuda.device_count()) if device.type == "cuda" else count
            if on_one * (max(size for _, size in measured) + _data_bytes(config)) > free:
                log.info("%d at once would not fit into memory", count)
                break
            rates[count] = sum(rate for rate, _ in measured)
    except (BrokenBarrierError, queue.Empty):
        log.warning("a process of those that were to be measured has ended; its number is left out")
    finally:
        for process in processes:
            process.kill()
    return rates


def _process(
    config: Config, norm: str, index: int, seconds: float, turns: dict[int, tuple[Event, Barrier]], found: Any
) -> None:
    """Train as one of the processes: of each count the first that many.

    A process that a count does not need takes no memory before a later one asks for it, so that the numbers that fit
    are measured before one that does not.
    """
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    try:
        own = [turn for count, turn in turns.items() if index < count]
        if not own[0][0].wait(PATIENCE * len(turns)):
            return  # nobody has asked
        loop, batches = begin(config, norm)
        for _, barrier in own:
            synchronize(loop.device)
            barrier.wait(PATIENCE)
            rate = images_per_second(loop.step, batches, seconds, loop.device)
            found.put((rate, _used_bytes(loop.device)))
    except BrokenBarrierError:
        pass
    except BaseException:
        found.put(None)
        for _, barrier in turns.values():
            barrier.abort()
        raise


def begin(config: Config, norm: str) -> tuple[StepLoop, Iterator[Any]]:
    """Return a loop after its first steps, and an endless iterator of batches."""
    torch.set_num_threads(config.threads)
    batch = config.recipe.batch_size // config.devices  # this device's share
    recipe = config.recipe.model_copy(update={"val_fraction": 0.0, "batch_size": batch})
    options = config.dataset.model_copy(update={"train_images": None})
    data = random_data(8 * recipe.batch_size, 10, options.image_size)
    # Ten classes here, and a device alone.
    config = config.model_copy(update={"recipe": recipe, "dataset": options, "init_from": None, "devices": 1})
    loop = StepLoop(config, data, select_device(config), norm)
    batches = cycle(loop.loaders["train"])
    images_per_second(loop.step, batches, WARM, loop.device)
    return loop, batches


def images_per_second(
    act: Callable[[Any], object], batches: Iterator[Any], seconds: float, device: torch.device
) -> float:
    """Return how many images `act` takes a second, called with one batch after another for so many seconds."""
    images, start = 0, time.monotonic()
    while images == 0 or time.monotonic() < start + seconds:
        batch = next(batches)
        act(batch)
        images += len(batch[1])
    synchronize(device)
    return images / (time.monotonic() - start)


def _used_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) + CONTEXT_BYTES
    try:
        return memory("VmHWM")  # ru_maxrss begins with what the process that started this one had
    except OSError:
        return 0.0


def _free_bytes(device: torch.device) -> float:
    """Return the memory that processes may share: nine tenths of what is free, or no bound where that is unknown."""
    if device.type == "cuda":
        return 0.9 * torch.cuda.mem_get_info(device)[0]
    return 0.9 * available_memory()


def _data_bytes(config: Config) -> float:
    """Return what a run's training images take (`BatchLoader`), which are not loaded while the speed is measured."""
    known = CATALOG.get(config.dataset.name)
    held = config.dataset.images[0] if config.dataset.images is not None else None  # of a set that is there in part
    count = config.dataset.train_images or held or (known.train_count if known is not None else 0)
    side = config.dataset.image_size + 2 * config.dataset.padding
    return count * side**2 * 4 * (2 if config.dataset.flip else 1)
