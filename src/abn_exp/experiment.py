"""One run, top to bottom: configuration -> data -> network -> training -> test -> record."""

import ctypes
import io
import logging
import math
import os
import re
import shutil
import statistics
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import current_process
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from filelock import FileLock, Timeout
from pytorch_lightning.plugins.environments import LightningEnvironment
from rich.console import Console
from rich.table import Table

from abn_exp import provenance
from abn_exp.callbacks import (
    AtomicCheckpointIO,
    Bar,
    Diverged,
    EpochRecord,
    StopTogether,
    checkpoints,
    usable_checkpoint,
)
from abn_exp.classifier import LitClassifier, Stage
from abn_exp.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Config,
    ConfigError,
    build_network,
    config_hash,
    in_a_line,
    science,
)
from abn_exp.data.loader import BatchLoader, Bundles
from abn_exp.data.prepare import ImageDataset, channel_statistics, load, stratified_split, stratified_subset
from abn_exp.exact16 import check_exact16, has_exact16, has_integer_conv2d, use_exact16_, use_float32_
from abn_exp.files import remove_parts, write_text_atomic
from abn_exp.models import initialize_
from abn_exp.plan import RunPlan
from abn_exp.results import (
    DamagedFile,
    RunResult,
    read_checkpoint,
    read_config,
    read_metrics,
    read_result,
    write_result,
)
from abn_exp.summary import NetworkSummary, summarize
from abn_exp.tracking import Tracker

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of mallopt(3)
BUNDLE = 20  # steps for which what Lightning costs, 0.3 ms and more, is spent once

log = logging.getLogger(__name__)
logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # "GPU available: ..." and tips, before every run
warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own use of torch
warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # what is logged has been summed over processes
warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # it is resumed from
warnings.filterwarnings("ignore", message="bf16 and fp16 are mixed")  # torch.compile, of exact16; both are meant
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # torch.compile on a CPU: "No CUDA runtime"


def run(this: RunPlan, command: str) -> RunResult:
    """Train and test one network, or go on with it, or show its result where it is already finished.

    Raises ConfigError for what the user can mend; whatever ends a run without a result is left in `FAILED`.
    """
    config, directory = this.config, this.directory
    if _rank(config) > 0:
        return _help(this)
    directory.mkdir(parents=True, exist_ok=True)
    with _owned(directory), _logged_to(directory / "train.log"):
        remove_parts(directory)
        remove_parts(directory / "checkpoints")
        if config.force:
            _start_anew(directory)
        finished = _check_same(this)
        if finished is not None:
            log.info("%s is finished (force=true runs it again)", directory)
            show(finished)
            return finished
        write_text_atomic(directory / "config.yaml", f"# {command}\n" + yaml.safe_dump(config.model_dump()))
        for name in ("result.json", "SHA256SUMS", "FAILED"):
            (directory / name).unlink(missing_ok=True)
        try:
            result = _train_and_test(this)
        except Exception as error:
            text = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
            write_text_atomic(directory / "FAILED", text.removeprefix("Diverged: ") + "\n")
            raise
        write_result(directory, result)
        log.info("%s", directory)
        show(result)
        return result


def _rank(config: Config) -> int:
    """Return which of a run's processes this is. Lightning starts the others with the command of the first, 0."""
    return int(os.environ.get("LOCAL_RANK", "0")) if config.devices > 1 else 0


def _help(this: RunPlan) -> RunResult:
    """Train and test as one of the processes that share a run; the first one writes, logs and reports."""
    logging.disable(logging.INFO)
    try:
        return _train_and_test(this)
    except Diverged:
        raise SystemExit(0) from None  # with any other code, Lightning would kill the first before it has said why


def _train_and_test(this: RunPlan) -> RunResult:
    config, directory = this.config, this.directory
    recipe, rank = config.recipe, _rank(config)
    torch.set_num_threads(config.threads)
    waste_nothing()
    if config.devices > 1:
        os.environ["OMP_NUM_THREADS"] = str(config.threads)  # else Lightning takes all cores
    device = device_of(config)

    data = _load_data(config)
    loaders = loaders_of(config, data, device, rank=rank, world_size=config.devices)
    network = network_of(config, this.choices["norm"], len(data.classes), device)
    summary = summarize(network, config.dataset.image_size)
    log.info(
        "%s seed %d on %s\n%s",
        this.cell,
        config.seed,
        _place(config, device, network),
        as_text(summary.table()),
    )

    stages = tuple(
        stage for stage in ("val", "test") if stage in loaders and (stage == "val" or recipe.test_every_epoch)
    )
    if config.compile:
        network.compile()
    steps = len(loaders["train"])
    classifier = LitClassifier(network, recipe, config.seed, len(data.classes), steps, stages, config.sync_norm)
    window = config.wandb if rank == 0 else config.wandb.model_copy(update={"mode": "disabled"})
    with Tracker(window, **_wandb_arguments(this)) as tracker:
        if tracker.run_id is not None:
            write_text_atomic(directory / "wandb-run-id", tracker.run_id)
        trainer = _trainer(config, device, directory, tracker, stages)
        last = usable_checkpoint(directory / "checkpoints" / "last.ckpt")
        if last is not None:
            log.info("going on from %s", last)
        bundles = Bundles(loaders["train"], BUNDLE)
        trainer.fit(classifier, bundles, [loaders[stage] for stage in stages] or None, ckpt_path=last)
        place = _place(config, device, network)
        result = _test(this, trainer, classifier, loaders["test"], summary, place, tracker.run_id)
        tracker.summarize(_headline(result))
    return result


def waste_nothing() -> None:
    """Let the process leave out work that no number depends on."""
    # Deterministic kernels write every value of a result: filling it with NaN first is a pass for nothing.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # A step frees its maps and the next one takes as many. Giving them back to the system in between, to get them
    # anew and filled with zeros, is up to a third of a narrow network's step on a CPU.
    with suppress(OSError, AttributeError):  # another C library than glibc
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
            libc.mallopt(option, value)


def network_of(config: Config, norm: str, num_classes: int, device: torch.device) -> torch.nn.Module:
    """Return the network that a run trains, on its device, at its start: precision and memory format are set.

    `norm` is the norm's name, on which the initial weights depend where they are not paired.
    """
    size = config.dataset.image_size
    network = build_network(config.model, config.norm, num_classes, size)
    initialize_(network, config.seed, "init" if config.recipe.paired_init else f"init/{norm}")
    # A fifth faster on a CPU, and what tensor cores want.
    network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if precision_of(config, device) == "exact16":
        # What the trainer will set, too: the check is of the kernels that will be used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, at the first matrix product
        torch.use_deterministic_algorithms(config.deterministic)
        torch.backends.cudnn.benchmark = not config.deterministic
        dtype = torch.bfloat16 if device.type == "cpu" else torch.float16
        use_exact16_(network, dtype, integers=has_integer_conv2d(device))
        try:
            check_exact16(network, torch.zeros(config.recipe.batch_size // config.devices, 3, size, size).to(device))
        except (ValueError, RuntimeError) as error:  # RuntimeError: the device has no such kernel
            if config.precision == "exact16":
                raise ConfigError(f"precision=exact16, but {in_a_line(error)}; use precision=fp32.") from error
            log.warning("precision=auto is fp32 here: %s", in_a_line(error))
            use_float32_(network)
    return network


def _place(config: Config, device: torch.device, network: torch.nn.Module) -> str:
    """Return the device's name, with the precision where that is the device's choice and not fp32."""
    name = provenance.device_name(device, config.threads)
    return f"{name}, exact16" if config.precision == "auto" and has_exact16(network) else name


def precision_of(config: Config, device: torch.device) -> str:
    """Return what `precision=auto` stands for on a device; any other choice is itself."""
    if config.precision != "auto":
        return config.precision
    return "exact16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def _load_data(config: Config) -> ImageDataset:
    options = config.dataset
    try:
        data = load(
            options.name,
            options.root,
            path=options.path,
            image_size=options.image_size,
            download=options.download,
        )
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    if options.num_classes not in (None, len(data.classes)):
        raise ConfigError(
            f"dataset.num_classes={options.num_classes}, but {options.name} has {len(data.classes)} classes."
        )
    return data


def _headline(result: RunResult) -> dict[str, float]:
    """Return the numbers a W&B run is remembered by; those the recipe does not ask for are left out."""
    values = {
        "final/test_acc": result.test_acc,
        "final/test_acc_top5": result.test_acc_top5,
        "final/test_loss": result.test_loss,
        "final/test_acc_best_val": result.test_acc_best_val,
        "final/test_acc_peak": result.test_acc_peak,
        "final/val_acc": result.val_acc_last,
        "best/val_acc": result.val_acc_best,
        "best/epoch": result.best_epoch,
    }
    return {key: value for key, value in values.items() if value is not None}


def loaders_of(
    config: Config, data: ImageDataset, device: torch.device, *, rank: int = 0, world_size: int = 1
) -> dict[Stage, BatchLoader]:
    """Return the loaders of the training, validation (where there is a split) and test images.

    Of `world_size` processes, the one with `rank` gets its share of every batch.
    """
    recipe, options = config.recipe, config.dataset
    if recipe.normalization == "imagenet":
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    elif options.mean is not None and options.std is not None:
        mean, std = options.mean, options.std
    else:
        mean, std = map(list, channel_statistics(data.train.images))
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
        "test": BatchLoader(data.test, torch.arange(len(data.test.labels)), 500, **common),
    }
    if len(val):
        loaders["val"] = BatchLoader(data.train, val, 500, **common)
    return loaders


def _trainer(
    config: Config, device: torch.device, directory: Path, tracker: Tracker, stages: tuple[Stage, ...]
) -> pl.Trainer:
    alone = sys.stdout.isatty() and current_process().name == "MainProcess" and _rank(config) == 0
    show_bar = config.progress == "bar" or (config.progress == "auto" and alone)
    callbacks = [EpochRecord(directory, tracker), *checkpoints(directory, keep_best="val" in stages)]
    if config.devices > 1:
        callbacks.append(StopTogether())
    return pl.Trainer(
        **trainer_options(config, device),
        strategy="ddp" if config.devices > 1 else "auto",
        max_epochs=config.recipe.epochs,
        callbacks=[*callbacks, Bar()] if show_bar else callbacks,
        plugins=[AtomicCheckpointIO(), LightningEnvironment()],  # SLURM and the like start runs, not their parts
        default_root_dir=directory,
        limit_val_batches=1.0 if stages else 0,
    )


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


def _test(
    this: RunPlan,
    trainer: pl.Trainer,
    classifier: LitClassifier,
    loader: BatchLoader,
    summary: NetworkSummary,
    place: str,
    wandb_run_id: str | None,
) -> RunResult:
    """Read the test set with the last epoch's weights and, where there is a validation split, with the best one's."""
    directory, config = this.directory, this.config
    metrics = read_metrics(directory)
    trainer.test(classifier, loader, verbose=False)
    test = classifier.evaluated
    if not math.isfinite(test["test/loss"]):
        raise Diverged(f"diverged in epoch {config.recipe.epochs}: test/loss is not finite")
    val = [line["val/acc"] for line in metrics if "val/acc" in line]
    test_best = None
    if "val" in classifier.eval_stages:
        best = directory / "checkpoints" / "best.ckpt"
        try:
            classifier.load_state_dict(read_checkpoint(best)["state_dict"])
        except (DamagedFile, OSError) as error:
            raise ConfigError(f"{error}; force=true runs the run again from its start.") from error
        trainer.test(classifier, loader, verbose=False)
        test_best = classifier.evaluated["test/acc"]
    peaks = [line["test/acc"] for line in metrics if "test/acc" in line]
    return RunResult(
        dataset=this.choices["dataset"],
        model=this.choices["model"],
        norm=this.choices["norm"],
        recipe=this.choices["recipe"],
        variant=this.variant,
        seed=config.seed,
        config_hash=config_hash(config),
        epochs=config.recipe.epochs,
        train_seconds=round(sum(line["seconds"] for line in metrics), 2),
        images_per_second=round(statistics.median(line["images_per_second"] for line in metrics), 1),
        val_acc_last=val[-1] if val else None,
        val_acc_best=max(val, default=None),
        best_epoch=val.index(max(val)) + 1 if val else None,
        test_acc=test["test/acc"],
        test_acc_top5=test["test/acc_top5"],
        test_loss=test["test/loss"],
        test_acc_best_val=test_best,
        test_acc_peak=max(peaks, default=None),
        parameters=summary.totals,
        versions=provenance.versions(),
        git_commit=provenance.git_commit(),
        device=place,
        wandb_run_id=wandb_run_id,
    )


def show(result: RunResult) -> None:
    """Print a finished run's numbers as a table."""
    log.info("%s, seed %d", "-".join(result.cell), result.seed)
    table = Table("", "top-1")
    rows = {
        "test, last epoch (headline)": result.test_acc,
        "test, best validation epoch": result.test_acc_best_val,
        "test, peak over epochs (peeking)": result.test_acc_peak,
        "validation, last epoch": result.val_acc_last,
        f"validation, best epoch ({result.best_epoch})": result.val_acc_best,
    }
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, f"{100 * value:.2f} %")
    table.caption = f"{result.epochs} epochs in {result.train_seconds:.0f} s, {result.images_per_second:.0f} images/s"
    log.info(as_text(table))


def as_text(table: Table) -> str:
    """Return a table as plain text, for a terminal and a log alike."""
    out = io.StringIO()
    Console(file=out, width=120).print(table)
    return out.getvalue()


@contextmanager
def _owned(directory: Path) -> Iterator[None]:
    """Keep a run's directory to one process."""
    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(f"{directory} is being written by another process; wait for it or stop it.") from error
    try:
        yield
    finally:
        lock.release()


class RunLog(logging.FileHandler):
    """A log that says once, in a sentence, that it cannot be written: no traces on a full disk."""

    def handleError(self, record: logging.LogRecord) -> None:
        print(f"{self.baseFilename} cannot be written: {sys.exception()}", file=sys.stderr)
        logging.getLogger().removeHandler(self)


@contextmanager
def _logged_to(path: Path) -> Iterator[None]:
    """Append to a file whatever is logged inside."""
    handler = RunLog(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


def _start_anew(directory: Path) -> None:
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    for name in ("result.json", "SHA256SUMS", "FAILED", "config.yaml", "metrics.jsonl", "wandb-run-id"):
        (directory / name).unlink(missing_ok=True)


def _check_same(this: RunPlan) -> RunResult | None:
    """Return the directory's result if there is one; refuse a directory that another configuration has written.

    A damaged record is made again: the checkpoint, which has checksums of its own, holds all that it says.
    """
    directory, finished = this.directory, None
    if not (directory / "config.yaml").is_file():
        return None
    try:
        try:
            finished = read_result(directory)
        except DamagedFile as error:
            log.warning("%s; the record is made again, from the last checkpoint if there is one", error)
        theirs = science(read_config(directory))
    except (DamagedFile, KeyError) as error:
        what = error if isinstance(error, DamagedFile) else f"{directory / 'config.yaml'} lacks {error}"
        raise ConfigError(f"{what}; force=true runs the run again from its start.") from error
    ours = science(this.config.model_dump())
    if different := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
        raise ConfigError(
            f"{directory} was made by another configuration (different: {', '.join(different)}); "
            "choose another name=, or force=true to replace it."
        )
    return finished


def device_of(config: Config) -> torch.device:
    """Return the device of a run. Raises ConfigError where there are not as many of that kind as are asked for."""
    kind = config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no CUDA device; use device=cpu or device=auto.")
    if kind == "cuda" and config.precision in ("exact16", "bf16") and not torch.cuda.is_bf16_supported():
        raise ConfigError(f"precision={config.precision}, but this GPU has no bfloat16; use precision=fp32.")
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if config.devices > count:
        raise ConfigError(f"devices={config.devices}, but torch sees {count} CUDA devices; choose fewer.")
    # A run's own processes take one GPU each; the workers of a launcher on one machine (joblib) take turns.
    worker = re.search(r"-(\d+)$", current_process().name)
    turn = _rank(config) if config.devices > 1 else int(worker[1]) - 1 if worker else 0
    return torch.device("cuda", turn % count)


def _wandb_arguments(this: RunPlan) -> dict[str, Any]:
    config = this.config
    earlier = this.directory / "wandb-run-id"
    run_id = earlier.read_text(encoding="utf-8").strip() if earlier.is_file() else ""
    return {
        "id": run_id or None,
        "resume": "allow" if run_id else None,
        "group": this.cell,
        "job_type": "train",
        "name": f"{this.cell}-s{config.seed}",
        "tags": [this.choices["dataset"], this.choices["model"], this.choices["norm"]],
        "config": {
            **this.choices,
            "variant": this.variant,
            "study": config.name,
            "seed": config.seed,
            "cfg": config.model_dump(),
        },
    }
