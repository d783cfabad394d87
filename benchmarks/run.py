"""Run the benchmark: steps, epochs, evaluation, loader, memory, and growth with size."""

import logging
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abn_exp import models
from abn_exp.binarize import sign_ste
from abn_exp.data.prepare import ImageDataset
from abn_exp.errors import ConfigError
from abn_exp.models.build import initialize_
from abn_exp.models.cost import summarize
from abn_exp.norm import AttentionBatchNorm2d
from abn_exp.training import parallel
from abn_exp.training.parallel import random_data
from abn_exp.training.setup import configure_process
from benchmarks import measure
from benchmarks.configurations import BASE, EAGER, PLAIN, ROWS, WIDTHS, Effort, Row, configuration
from benchmarks.conventional import Binarize, ConventionalLoop, Norm, conventional
from benchmarks.measure import Quartiles, quartiles
from benchmarks.ours import OurLoop

log = logging.getLogger(__name__)
TRAIN_IMAGES, TEST_IMAGES = 50_000, 10_000  # of an epoch: CIFAR's
Loop = ConventionalLoop | OurLoop


@dataclass
class Findings:
    """Every number: (network, row, column) -> quartiles; (axis, row) -> its sizes, its times, its exponent."""

    columns: dict[tuple[str, str, str], Quartiles] = field(default_factory=dict)
    growth: dict[tuple[str, str], tuple[list[float], list[Quartiles], float]] = field(default_factory=dict)
    ratios: dict[tuple[str, str], Quartiles] = field(default_factory=dict)  # of the conventional step to a row's
    ceilings: measure.Ceilings | None = None
    ours: str = EAGER  # the row of ours whose growth is measured; fp32's where the device refuses exact16
    rates: dict[tuple[str, str, str], tuple[torch.dtype | None, list[float]]] = field(default_factory=dict)


class Benchmark:
    """Measures on one device; `workers` processes load the conventional loop's images."""

    def __init__(self, device: torch.device, effort: Effort, workers: int, rows: tuple[Row, ...] = ROWS) -> None:
        self.device, self.effort, self.workers, self.rows = device, effort, workers, rows
        self.found = Findings()
        try:
            OurLoop(configuration("resnet18_paper", 0.5, 2, ("precision=exact16",)), random_data(4, 2), device)
        except ConfigError as error:
            log.warning("exact16 is left out: %s", error)
            self.rows = tuple(row for row in rows if "precision=exact16" not in row.options)
            self.found.ours = PLAIN

    def loop(self, row: Row, model: str, width: float, batch_size: int, data: ImageDataset) -> Loop:
        if row.ours:
            return OurLoop(configuration(model, width, batch_size, row.options), data, self.device)
        # A graph that is kept from step to step cannot be compiled.
        norm = partial(Norm, detach=row.compile)
        network = initialize_(getattr(models, model)(10, 32, norm, width=width), 0)
        network = conventional(network)
        loop = ConventionalLoop(network, data, batch_size, self.device, self.workers, row.autocast)
        if row.compile:
            loop.network.compile()
        return loop

    def run(self) -> Findings:
        """Measure everything; log each step."""
        warnings.filterwarnings("ignore")  # of libraries; what matters is in the tables
        logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        highest = measure.ceilings(self.device, 5)
        for model in WIDTHS:
            self.network(model)
            highest = highest.or_higher(measure.ceilings(self.device, 5))
        self.chain()
        self.loaders()
        self.growth()
        self.found.ceilings = highest = highest.or_higher(measure.ceilings(self.device, 5))
        for key, (dtype, rates) in self.found.rates.items():
            ceiling = highest.copy if dtype is None else highest.products[dtype]
            self.found.columns[key] = quartiles([100 * rate / ceiling for rate in rates])
        return self.found

    def network(self, model: str) -> None:
        """Measure all that belongs to a network at the paper's width."""
        effort, width, size = self.effort, WIDTHS[model], self.effort.batch_size[model]
        data = random_data((effort.warm + effort.steps) * size * 4, (effort.steps + 1) * size)
        rows = [row for row in self.rows if model in effort.all_rows or row.name in (BASE, self.found.ours)]
        configure_process()  # for all loops alike
        compiled: dict[str, Loop] = {}
        steps: dict[str, list[float]] = {row.name: [] for row in rows}
        alone: dict[str, list[float]] = {row.name: [] for row in rows}
        for repetition in range(effort.repetitions):
            log.info("%s: %d of %d", model, repetition + 1, effort.repetitions)
            for row in rows:
                # Where other loops have fragmented the memory, the conventional one takes half as long again; so each
                # is built again, except those that would have to be compiled again.
                loop = compiled.get(row.name) or self.loop(row, model, width, size, data)
                if row.compile and row.name not in compiled:
                    compiled[row.name] = loop
                    loop.train(1, 1)
                steps[row.name].append(loop.train(effort.warm, effort.steps))
                step = partial(loop.step, self._batch(loop, size))
                alone[row.name].append(measure.seconds(step, self.device))
                if repetition == effort.repetitions - 1:
                    evaluation = loop.evaluate() * TEST_IMAGES
                    epochs = [t * TRAIN_IMAGES / size + evaluation for t in steps[row.name]]
                    self._add(model, row.name, "s/epoch", epochs)
                    self._once(model, width, size, row, loop)
                del loop, step
                measure.trim()
        for row in rows:
            name = row.name
            self._add(model, name, "step with data, images/s", [size / t for t in steps[name]])
            self._add(model, name, "step alone, images/s", [size / t for t in alone[name]])
            pairs = zip(steps[BASE], steps[name], strict=True)
            self.found.ratios[model, name] = quartiles([base / own for base, own in pairs])

    def _once(self, model: str, width: float, size: int, row: Row, loop: Loop) -> None:
        """Measure what does not vary from step to step: the time in products, and bytes."""
        batch = self._batch(loop, size)
        step = partial(loop.step, batch)
        products = measure.product_seconds(step, self.device)
        if products > 0:
            rate = 6 * size * self._macs(model, width) / products
            self.found.rates[model, row.name, "products, % of their ceiling"] = (self._type(row), [rate])
        saved = measure.saved_bytes(lambda: loop.loss(*batch)[0], loop.network)
        self._add(model, row.name, "saved for backward, MB/image", [saved / size / 1e6])
        self._add(model, row.name, "peak memory of a step, MB", [measure.peak_bytes(step, self.device) / 1e6])

    def _batch(self, loop: Loop, size: int) -> tuple[Tensor, Tensor]:
        images = torch.randn(size, 3, 32, 32, device=self.device)
        if isinstance(loop, ConventionalLoop) and loop.bf16:
            images = images.to(memory_format=torch.channels_last)
        return images, torch.arange(size, device=self.device) % 10

    def _type(self, row: Row) -> torch.dtype:
        """The type of a row's products; its ceiling is the one of that type."""
        return torch.bfloat16 if "precision=exact16" in row.options or row.autocast else torch.float32

    @staticmethod
    def _macs(model: str, width: float) -> int:
        with torch.device("meta"):
            totals = summarize(getattr(models, model)(10, 32, AttentionBatchNorm2d, width=width), 32).totals
        return totals["binary_macs"] + totals["real_macs"]

    def _add(self, place: str, row: str, column: str, values: list[float]) -> None:
        self.found.columns[place, row, column] = quartiles(values)

    def chain(self) -> None:
        """Measure norm, Hardtanh and sign alone, forward and backward, on a map of the ResNet's first stage."""
        log.info("norm chain")
        shape = (self.effort.batch_size["resnet18_paper"], 80, 32, 32)
        calls: dict[str, Callable[[], float]] = {}
        for row in self.rows:
            if row.options[:1] == ("precision=exact16",) and not row.compile:
                continue  # its chain is the one of fp32
            x = torch.randn(shape, device=self.device)
            if row.ours or row.autocast:
                x = x.to(memory_format=torch.channels_last)
            norm: nn.Module = AttentionBatchNorm2d(80) if row.ours else Norm(80, detach=row.compile)
            sign = sign_ste if row.ours else Binarize.apply
            call: Callable[[Tensor], Tensor] = partial(_chain, norm.to(self.device), sign)
            if row.compile:
                call = torch.compile(call)
            x = x.bfloat16() if row.autocast else x
            once = partial(_forward_backward, call, x)
            once()
            calls[row.name] = partial(measure.seconds, once, self.device)
        times = measure.interleaved(calls, self.effort.repetitions)
        for row in self.rows:
            if row.name not in times:
                continue
            size = torch.Size(shape).numel() * (2 if row.autocast else 4)
            self._add("chain", row.name, "norm + Hardtanh + sign, ms", [1e3 * t for t in times[row.name]])
            # Read x, write its sign; read the gradient and x, write the gradient of x.
            rates = [5 * size / t for t in times[row.name]]
            self.found.rates["chain", row.name, "five passes, % of the copy ceiling"] = (None, rates)

    def loaders(self) -> None:
        """Measure the loaders alone: one thread without workers, and as they are used."""
        log.info("loaders")
        data, size = random_data(10_000, 500), 256
        config = configuration("resnet18_paper", 0.5, size, ())
        ours = OurLoop(config, data, self.device).loaders["train"]
        few = random_data(1024, 500)
        network = nn.Linear(1, 1)

        def per_image(loader: Any, images: int) -> float:
            return measure.seconds(partial(deque, loader, maxlen=0), self.device) / images

        threads = torch.get_num_threads()
        for column, workers, used in (("one thread", 0, 1), ("1,024 images, workers started", self.workers, threads)):
            theirs = ConventionalLoop(network, few, size, self.device, workers).train_loader
            torch.set_num_threads(used)
            calls = {BASE: partial(per_image, theirs, 1024), "ours": partial(per_image, ours, 10_000)}
            times = measure.interleaved(calls, self.effort.repetitions)
            torch.set_num_threads(threads)
            for name, values in times.items():
                self._add("loader", name, f"loader alone, {column}, images/s", [1 / t for t in values])
            pairs = zip(times[BASE], times["ours"], strict=True)
            self.found.ratios[f"loader, {column}", "ours"] = quartiles([base / own for base, own in pairs])

    def growth(self) -> None:
        """Measure how the time grows with images, width and batch, and the memory of the host with steps."""
        effort, model = self.effort, "resnet18_paper"
        few = random_data(2 * max(effort.batches), 500)
        rows = [row for row in self.rows if row.name in (BASE, self.found.ours)]
        for row in rows:
            loop = self.loop(row, model, 1.0, 4, few)
            step = partial(loop.step, self._batch(loop, 4))
            growth = measure.host_growth(step, 40)
            self._add("host", row.name, "growth of host memory, kB/step", [growth / 1e3])

        def step_of(row: Row, width: float, size: int) -> Callable[[], float]:
            loop = self.loop(row, model, width, size, few)
            step = partial(loop.step, self._batch(loop, size))
            step()
            return partial(measure.seconds, step, self.device)

        def epoch_of(row: Row, images: int) -> Callable[[], float]:
            return self.loop(row, model, effort.growth_width, effort.growth_batch, random_data(images, 500)).epoch

        axes: dict[str, tuple[tuple[float, ...], Callable[[Row, Any], Callable[[], float]]]] = {
            "images": (effort.images, epoch_of),
            "width": (effort.widths, lambda row, width: step_of(row, width, effort.growth_batch)),
            "batch": (effort.batches, lambda row, size: step_of(row, effort.growth_width, size)),
        }
        for axis, (sizes, make) in axes.items():
            log.info("growth: %s", axis)
            calls = {(row.name, size): make(row, size) for row in rows for size in sizes}
            if axis != "images":  # whose epochs include the start, as a run's do
                for call in calls.values():
                    call()
            times = measure.interleaved(calls, 1 if axis == "images" else min(3, effort.repetitions))
            for row in rows:
                found = [quartiles(times[row.name, size]) for size in sizes]
                slope = measure.exponent([float(size) for size in sizes], [q.median for q in found])
                self.found.growth[axis, row.name] = ([float(size) for size in sizes], found, slope)
        if effort.seeds:
            self.seeds()

    def seeds(self) -> None:
        """Measure how the time of an epoch grows with the seeds that are trained at once, each in its process."""
        log.info("growth: seeds")
        effort = self.effort
        precision = "exact16" if self.found.ours == EAGER else "fp32"
        overrides = (f"precision={precision}", f"device={self.device.type}")
        config = configuration("resnet18_paper", effort.growth_width, effort.growth_batch, overrides)
        counts = parallel.candidates(effort.seeds, self.device, config.threads)
        rates = parallel.measure(config, "abn", counts, self.device)
        times = {count: count * effort.images[-1] / rate for count, rate in rates.items()}
        if len(times) > 1:
            sizes, values = list(map(float, times)), list(times.values())
            found = [quartiles([value]) for value in values]
            self.found.growth["seeds", self.found.ours] = (sizes, found, measure.exponent(sizes, values))


def _chain(norm: nn.Module, sign: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return sign(F.hardtanh(norm(x)))


def _forward_backward(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    x = x.detach().requires_grad_()
    y = call(x)
    y.backward(torch.ones_like(y))
