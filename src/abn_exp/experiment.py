"""One run, top to bottom: configuration -> data -> network -> training -> test -> record."""

import io
import logging
import platform
import shutil
import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import current_process
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml
from filelock import FileLock, Timeout
from hydra import compose
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from abn_exp.callbacks import AtomicCheckpointIO, Bar, EpochRecord, checkpoints, usable_checkpoint
from abn_exp.classifier import LitClassifier, Stage
from abn_exp.config import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Config,
    ConfigError,
    build_network,
    config_hash,
    read,
    science,
)
from abn_exp.data.loader import BatchLoader
from abn_exp.data.prepare import ImageDataset, channel_statistics, load, stratified_split, stratified_subset
from abn_exp.models import initialize_
from abn_exp.results import (
    RunResult,
    read_metrics,
    read_result,
    variant_name,
    write_result,
    write_text_atomic,
)
from abn_exp.summary import NetworkSummary, summarize
from abn_exp.tracking import Tracker

log = logging.getLogger(__name__)
logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # "GPU available: ..." and tips, before every run
warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own use of torch
warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # it is resumed from

GROUPS = ("dataset", "model", "norm", "recipe")


@dataclass(frozen=True)
class RunPlan:
    """A checked configuration and the names that follow from it."""

    config: Config
    choices: dict[str, str]  # dataset, model, norm, recipe: the chosen option of each group
    variant: str  # the recipe and whatever else was overridden

    @property
    def cell(self) -> str:
        """The cell's name, e.g. "cifar10-resnet18-abn-fixed"."""
        return "-".join([*(self.choices[group] for group in ("dataset", "model", "norm")), self.variant])

    @property
    def directory(self) -> Path:
        parts = [self.choices[group] for group in ("dataset", "model", "norm")]
        return Path(self.config.results_dir, self.config.name, *parts, self.variant, f"seed-{self.config.seed}")


def plan(cfg: DictConfig, choices: dict[str, str]) -> RunPlan:
    """Check a composed configuration and name its cell: the recipe, and whatever differs from the groups' own.

    Raises ConfigError with one sentence for each mistake.
    """
    config = read(cfg)
    choices = {group: choices[group] for group in GROUPS}
    own = compose("config", [f"{group}={choice}" for group, choice in choices.items()])
    plain = OmegaConf.to_container(own, resolve=True)
    assert isinstance(plain, dict)
    default = science({str(key): value for key, value in plain.items()})
    changes = {key: v for key, v in science(config.model_dump()).items() if key not in default or default[key] != v}
    return RunPlan(config, choices, variant_name(choices["recipe"], changes))


def run(this: RunPlan, command: str) -> RunResult:
    """Train and test one network, or go on with it, or show its result where it is already finished.

    Raises ConfigError for what the user can mend; whatever ends a run without a result is left in `FAILED`.
    """
    config, directory = this.config, this.directory
    directory.mkdir(parents=True, exist_ok=True)
    with _owned(directory), _logged_to(directory / "train.log"):
        if config.force:
            _start_anew(directory)
        finished = _check_same(this)
        if finished is not None:
            log.info("%s is finished (force=true runs it again)", directory)
            show(finished)
            return finished
        write_text_atomic(directory / "config.yaml", f"# {command}\n" + yaml.safe_dump(config.model_dump()))
        (directory / "FAILED").unlink(missing_ok=True)
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


def _train_and_test(this: RunPlan) -> RunResult:
    config, directory = this.config, this.directory
    recipe = config.recipe
    torch.set_num_threads(config.threads)
    device = _device(config)

    data = _load_data(config)
    loaders = loaders_of(config, data, device)
    norm = "" if recipe.paired_init else f"/{this.choices['norm']}"
    network = build_network(config.model, config.norm, len(data.classes), config.dataset.image_size)
    initialize_(network, config.seed, f"init{norm}")
    network.to(memory_format=torch.channels_last)  # a fifth faster on a CPU, and what tensor cores want
    summary = summarize(network, config.dataset.image_size)
    log.info("%s seed %d on %s\n%s", this.cell, config.seed, _device_name(device, config), as_text(summary.table()))

    stages = tuple(
        stage for stage in ("val", "test") if stage in loaders and (stage == "val" or recipe.test_every_epoch)
    )
    classifier = LitClassifier(network, recipe, config.seed, len(data.classes), stages)
    with Tracker(config.wandb, **_wandb_arguments(this)) as tracker:
        write_text_atomic(directory / "wandb-run-id", tracker.run_id or "")
        trainer = _trainer(config, device, directory, tracker, stages)
        last = usable_checkpoint(directory / "checkpoints" / "last.ckpt")
        if last is not None:
            log.info("going on from %s", last)
        trainer.fit(classifier, loaders["train"], [loaders[stage] for stage in stages] or None, ckpt_path=last)
        result = _test(this, trainer, classifier, loaders["test"], summary, tracker.run_id)
        tracker.summarize({f"final/{key}": value for key, value in vars(result).items() if "acc" in key})
    return result


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


def loaders_of(config: Config, data: ImageDataset, device: torch.device) -> dict[Stage, BatchLoader]:
    """Return the loaders of the training, validation (where there is a split) and test images."""
    recipe, options = config.recipe, config.dataset
    if recipe.normalization == "imagenet":
        mean, std = IMAGENET_MEAN, IMAGENET_STD
    elif options.mean is not None and options.std is not None:
        mean, std = options.mean, options.std
    else:
        mean, std = map(list, channel_statistics(data.train.images))
    common: dict[str, Any] = {"mean": mean, "std": std, "device": device}
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
    alone = sys.stdout.isatty() and current_process().name == "MainProcess"
    show_bar = config.progress == "bar" or (config.progress == "auto" and alone)
    callbacks = [EpochRecord(directory, tracker), *checkpoints(directory, keep_best="val" in stages)]
    return pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=config.devices,
        max_epochs=config.recipe.epochs,
        precision="bf16-mixed" if config.precision == "bf16" else "32-true",
        deterministic=config.deterministic,
        benchmark=not config.deterministic,
        callbacks=[*callbacks, Bar()] if show_bar else callbacks,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=directory,
        logger=False,
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if stages else 0,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _test(
    this: RunPlan,
    trainer: pl.Trainer,
    classifier: LitClassifier,
    loader: BatchLoader,
    summary: NetworkSummary,
    wandb_run_id: str | None,
) -> RunResult:
    """Read the test set with the last epoch's weights and, where there is a validation split, with the best one's."""
    directory, config = this.directory, this.config
    metrics = read_metrics(directory)
    test = trainer.test(classifier, loader, verbose=False)[0]
    val = [line["val/acc"] for line in metrics if "val/acc" in line]
    test_best = None
    if val:
        best = directory / "checkpoints" / "best.ckpt"
        if usable_checkpoint(best) is None:
            raise ConfigError(f"{best} is damaged or missing; force=true runs the run again from its start.")
        state = torch.load(best, weights_only=True, map_location="cpu")["state_dict"]
        classifier.load_state_dict(state)
        test_best = trainer.test(classifier, loader, verbose=False)[0]["test/acc"]
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
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("abn_exp", "torch", "torchvision", "pytorch-lightning", "numpy")},
        },
        git_commit=git_commit(),
        device=_device_name(torch.device(trainer.strategy.root_device), config),
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


@contextmanager
def _logged_to(path: Path) -> Iterator[None]:
    """Append to a file whatever is logged inside."""
    handler = logging.FileHandler(path, encoding="utf-8")
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
    for name in ("result.json", "FAILED", "config.yaml", "metrics.jsonl", "wandb-run-id"):
        (directory / name).unlink(missing_ok=True)


def _check_same(this: RunPlan) -> RunResult | None:
    """Return the directory's result if there is one; refuse a directory that another configuration has written."""
    path = this.directory / "config.yaml"
    if not path.is_file():
        return None
    before = yaml.safe_load(path.read_text(encoding="utf-8"))
    ours = science(this.config.model_dump())
    theirs = science(before)
    if different := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
        raise ConfigError(
            f"{this.directory} was made by another configuration (different: {', '.join(different)}); "
            "choose another name=, or force=true to replace it."
        )
    return read_result(this.directory)


def _device(config: Config) -> torch.device:
    kind = config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no CUDA device; use device=cpu or device=auto.")
    if kind == "cuda" and config.precision == "bf16" and not torch.cuda.is_bf16_supported():
        raise ConfigError("precision=bf16, but this GPU has no bfloat16; use precision=fp32.")
    return torch.device(kind)


def _device_name(device: torch.device, config: Config) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {config.threads} thread{'s' if config.threads > 1 else ''})"


def _wandb_arguments(this: RunPlan) -> dict[str, object]:
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
        "config": {**this.choices, "variant": this.variant, "seed": config.seed, "cfg": config.model_dump()},
    }


def git_commit() -> str | None:
    """Return the commit of the code that runs, "-dirty" where it was changed since, or None outside a checkout."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "*.py", "*.yaml"], cwd=here, check=False)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("-dirty" if changed.returncode else "")
