"""Build what a run needs: its device, data loaders, network and trainer options."""

import ctypes
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import current_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from abn_exp.binarize import BinaryConv2d, BinaryLinear
from abn_exp.config import IMAGENET_MEAN, IMAGENET_STD, Config, published_start_differs
from abn_exp.data.catalog import CATALOG
from abn_exp.data.loader import BatchLoader
from abn_exp.data.prepare import ImageDataset, channel_statistics, load
from abn_exp.data.splits import stratified_split, stratified_subset
from abn_exp.errors import ConfigError, in_a_line
from abn_exp.exact16 import check_exact16, has_integer_conv2d, use_exact16_
from abn_exp.models.build import build_network, channels_last_, initialize_
from abn_exp.seeding import derive_seed
from abn_exp.trained_network import InputFormat, load_input_format
from abn_exp.warm_start import load_initial_weights_

if TYPE_CHECKING:
    from abn_exp.training.classifier import Stage  # with Lightning, which analyses need not import

PASS = 0.1  # seconds of a pass that is long enough to compare precisions by
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of mallopt(3)
NVIDIA_DRIVER = (  # one of them is there where a driver is loaded; the last is that of Windows in WSL 2
    Path("/proc/driver/nvidia"),
    Path("/dev/nvidia0"),
    Path("/usr/lib/wsl/lib/libcuda.so.1"),
)
EVALUATED = 500  # images in a batch of validation and test
BATCHES_PER_GROUP = 20  # steps that share Lightning's overhead of 0.3 ms or more

log = logging.getLogger(__name__)


def process_rank(config: Config) -> int:
    """Return which of a run's processes this is. Lightning starts the others with the command of the first, 0."""
    return int(os.environ.get("LOCAL_RANK", "0")) if config.devices > 1 else 0


def select_device(config: Config) -> torch.device:
    """Return the device of a run. Raises ConfigError where there are not as many of that kind as are asked for."""
    works = config.device != "cpu" and cuda_works()
    kind = ("cuda" if works else "cpu") if config.device == "auto" else config.device
    if kind == "cuda" and not works:
        raise ConfigError(
            f"device=cuda, but torch sees no CUDA device ({_cuda_build()}); use device=cpu or device=auto."
        )
    if (
        kind == "cuda"
        and config.precision in ("exact16", "bf16")
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise ConfigError(f"precision={config.precision}, but this GPU has no bfloat16; use precision=fp32.")
    if kind == "cpu":
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        if config.device == "auto" and not hidden and any(path.exists() for path in NVIDIA_DRIVER):
            log.warning(
                "This machine has an NVIDIA device, but torch sees none (%s), so the run is on the CPU; README.md "
                "says under Install which build needs which driver.",
                _cuda_build(),
            )
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if config.devices > count:
        raise ConfigError(f"devices={config.devices}, but torch sees {count} CUDA devices; choose fewer.")
    # A run's own processes take one GPU each; the workers of a sweep on one machine take turns.
    worker = re.search(r"-(\d+)$", current_process().name)
    turn = process_rank(config) if config.devices > 1 else int(worker[1]) - 1 if worker else 0
    return torch.device("cuda", turn % count)


def cuda_works() -> bool:
    """Tell whether torch can use a GPU. With Lightning, `is_available` counts what the driver knows, which may be too
    old for torch."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.init()
    except (RuntimeError, torch.cuda.DeferredCudaCallError):
        return False
    return True


def _cuda_build() -> str:
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return f"torch {torch.__version__} is built {built}"


def configure_process() -> None:
    """Save time that changes no result, and let no result depend on what ran in this process before."""
    # Deterministic kernels write every value of a result: filling it with NaN first is a pass for nothing.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # A product in 16 bits that is split between thread blocks would be rounded in between, which exact16 forbids.
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    # A step frees its feature maps and the next one allocates as many. Returning the memory to the system in between,
    # which fills it with zeros, is up to a third of a narrow network's step on a CPU.
    with suppress(OSError, AttributeError):  # another C library than glibc
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
            libc.mallopt(option, value)


def compile_(network: torch.nn.Module) -> None:
    """Let torch.compile make the network's training step, in place.

    What a process compiled before would decide which of its graphs is taken, and after eight that none is: so that is
    forgotten. Each shape of a batch has a graph of its own, in the first epoch and after a run goes on alike.
    """
    torch._dynamo.reset()
    network.compile(dynamic=False)


@contextmanager
def device_errors_explained(device: torch.device) -> Iterator[None]:
    """Raise ConfigError where the memory of a GPU is used up inside, or where torch.compile cannot compile."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        why = in_a_line(error).partition(". ")[0]
        what = f"the memory of {device} is used up ({why})"
        raise ConfigError(f"{what}; use a smaller recipe.batch_size, or fewer seeds_at_once.") from error
    except RuntimeError as error:
        from torch._dynamo.exc import TorchDynamoException  # seconds, for what only trains

        if not isinstance(error, TorchDynamoException):
            raise
        why = in_a_line(error).split(" Set TORCHDYNAMO_VERBOSE")[0]  # no C++ compiler, say
        raise ConfigError(f"compile=true, but torch.compile cannot here ({why}); use compile=false.") from error


def load_data(config: Config) -> ImageDataset:
    options = config.dataset
    try:
        data = load(**options.source)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    classes = len(data.classes)
    if options.num_classes not in (None, classes):
        raise ConfigError(f"dataset.num_classes={options.num_classes}, but {options.name} has {classes} classes.")
    info, held = CATALOG.get(options.name), [len(data.train.labels), len(data.test.labels)]
    expected = options.images or ([info.train_count, info.test_count] if info is not None else held)
    if held != expected:  # it was not there when the run was named
        then = "now that this is known, the same command begins a run of that set."
        if info is not None and not info.archive:
            then = "correct the counts of its entry in CATALOG."
        raise ConfigError(
            f"{options.name} has {held[0]} + {held[1]} images here, not {expected[0]} + {expected[1]}; {then}"
        )
    return data


def normalization(config: Config, data: ImageDataset) -> tuple[Sequence[float], Sequence[float]]:
    """Return the channels' mean and standard deviation that normalise a run's images, for pixels in [0, 1]."""
    options = config.dataset
    if config.recipe.normalization == "imagenet":
        return IMAGENET_MEAN, IMAGENET_STD
    if options.mean is not None and options.std is not None:
        return options.mean, options.std
    mean, std = channel_statistics(data.train.images)
    if 0 in std:
        raise ConfigError(
            f"{options.name} has a colour channel with the same value in every pixel, whose standard deviation is 0: "
            "give dataset.mean=[...] and dataset.std=[...]."
        )
    return mean, std


def trained_input_format(directory: Path, data: ImageDataset) -> InputFormat:
    """Return the input of a trained network. Raises ConfigError where the data set has other classes than then, and
    what `load_input_format` raises."""
    found = load_input_format(directory)
    if found.classes not in (None, tuple(data.classes)):
        raise ConfigError(f"{data.name} has other classes now than when {directory} was trained.")
    return found


def make_loaders(
    config: Config, data: ImageDataset, device: torch.device, *, rank: int = 0, world_size: int = 1
) -> "dict[Stage, BatchLoader]":
    """Return the loaders of the training, validation (where there is a split) and test images.

    Of `world_size` processes, the one with `rank` gets its share of every batch.
    """
    recipe, options = config.recipe, config.dataset
    mean, std = normalization(config, data)
    common: dict[str, Any] = {"mean": mean, "std": std, "device": device, "rank": rank, "world_size": world_size}
    try:
        indices = torch.arange(len(data.train.labels))
        if options.train_images is not None:
            indices = stratified_subset(data.train.labels, options.train_images, recipe.split_seed)
        chosen, held_out = stratified_split(data.train.labels[indices], recipe.val_fraction, recipe.split_seed)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    train, val = indices[chosen], indices[held_out]
    if len(train) < recipe.batch_size:
        raise ConfigError(
            f"recipe.batch_size={recipe.batch_size} is larger than the set, {len(train)} training images; "
            "choose a smaller one."
        )
    loaders: dict[Stage, BatchLoader] = {
        "train": BatchLoader(
            data.train,
            train,
            recipe.batch_size,
            seed=config.seed,
            shuffle=True,
            padding=options.padding,
            flip=options.flip,
            **common,
        ),
        "test": BatchLoader(data.test, torch.arange(len(data.test.labels)), EVALUATED, **common),
    }
    if len(val):
        loaders["val"] = BatchLoader(data.train, val, EVALUATED, **common)
    return loaders


def make_network(config: Config, norm: str, num_classes: int, device: torch.device) -> torch.nn.Module:
    """Return the network that a run trains, on its device, at its start: precision and memory format are set.

    `norm` is the norm's name, on which the initial weights depend where they are not paired.
    """
    size = config.dataset.image_size
    purpose = "init" if config.recipe.paired_init else f"init/{norm}"
    with torch.random.fork_rng(devices=[]):  # of modules without reset_parameters, which draw in their constructors
        torch.default_generator.manual_seed(derive_seed(config.seed, purpose))
        network = build_network(config.model, config.norm, num_classes, size)
    published = published_start_differs(config.model_dump())
    initialize_(network, config.seed, purpose, config.recipe.init if published else "torch")
    if config.init_from is not None:
        load_initial_weights_(network, config)
    channels_last_(network.to(device))
    if config.precision == "exact16":
        # What the trainer will set, too: the check is of the kernels that will be used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, at the first matrix product
        torch.use_deterministic_algorithms(config.deterministic)
        torch.backends.cudnn.benchmark = not config.deterministic
        dtype = torch.bfloat16 if device.type == "cpu" else torch.float16
        use_exact16_(network, dtype, integers=has_integer_conv2d(device))
        batch = config.recipe.batch_size // config.devices
        try:
            for count in (batch,) if device.type == "cpu" else (batch, EVALUATED):  # cuDNN chooses kernels by shape
                check_exact16(network, torch.zeros(count, 3, size, size).to(device))
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError) as error:  # RuntimeError: the device has no such kernel
            raise ConfigError(f"precision=exact16, but {in_a_line(error)}; use precision=fp32.") from error
    return network


def time_against_fp32(config: Config, network: torch.nn.Module, device: torch.device) -> float:
    """Return how many times as long as in fp32 a pass takes, forward and back, in the run's precision.

    Of a batch on a GPU; on a CPU of four images or, where these take less than PASS seconds, which is mostly the time
    of starting kernels, of as many as that allows. The least of three passes each, in turn, in evaluation mode; the
    network is left as it was. 1 where a pass in fp32 does not fit into the memory of a GPU, as the run's own may.
    """
    batch = config.recipe.batch_size // config.devices
    size = config.dataset.image_size
    layers = {m: m.product for m in network.modules() if isinstance(m, BinaryConv2d | BinaryLinear)}
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    training = {module: module.training for module in network.modules()}

    def seconds(images: torch.Tensor, own: bool) -> float:
        for layer, product in layers.items():
            layer.product = product if own else None
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=own and config.precision == "bf16"):
            logits = network.forward(images)
        torch.autograd.grad(logits.sum(), parameters, allow_unused=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    def compare(count: int) -> tuple[float, float]:
        images = torch.zeros(count, 3, size, size, device=device).to(memory_format=torch.channels_last)
        seconds(images, False), seconds(images, True)  # kernels are made at their first use
        turns = [(seconds(images, False), seconds(images, True)) for _ in range(3)]
        return min(fp32 for fp32, _ in turns), min(own for _, own in turns)

    network.eval()
    try:
        fp32, own = compare(batch if device.type == "cuda" else min(batch, 4))
        if device.type == "cpu" and fp32 < PASS and batch > 4:
            fp32, own = compare(min(batch, round(4 * PASS / fp32)))
    except torch.OutOfMemoryError:
        return 1.0
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()
        for layer, product in layers.items():
            layer.product = product
        for module, flag in training.items():
            module.training = flag
    return own / fp32


def trainer_options(config: Config, device: torch.device) -> dict[str, Any]:
    """Return those of the trainer's options that decide how a step is computed, and those that keep it quiet."""
    return {
        "accelerator": "gpu" if device.type == "cuda" else device.type,
        "devices": [device.index] if device.type == "cuda" and config.devices == 1 else config.devices,
        "precision": "bf16-mixed" if config.precision == "bf16" else "32-true",
        "deterministic": config.deterministic,
        "benchmark": not config.deterministic,
        "logger": False,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
