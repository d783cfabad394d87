"""One run, top to bottom: configuration -> data -> network -> training -> test -> record."""

import io
import logging
import math
import os
import platform
import shutil
import signal
import statistics
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from multiprocessing import current_process
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from hydra.utils import get_object
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.utilities.exceptions import SIGTERMException
from rich.console import Console
from rich.table import Table

from abn_exp import provenance
from abn_exp.config import Config
from abn_exp.data.loader import BatchGroups, BatchLoader
from abn_exp.errors import ConfigError, DamagedFile, Diverged, NotContinued, Stopped
from abn_exp.files import modified, remove_temporary_files, run_lock, write_text_atomic, writing
from abn_exp.identity import RunPlan, restore_quoted
from abn_exp.models.cost import NetworkSummary, summarize
from abn_exp.report.progress import clock, speed_text
from abn_exp.results import (
    RunResult,
    read_metrics,
    read_result,
    remove_run,
    restore_replaced,
    set_aside,
    write_result,
)
from abn_exp.trained_network import (
    InputFormat,
    load_predictions,
    read_checkpoint,
    read_config,
    write_config,
    write_input_format,
    write_predictions,
)
from abn_exp.training.callbacks import EpochLogger, IgnoreSigterm, KillAllRanks, StepProgressBar
from abn_exp.training.checkpoints import AtomicCheckpointIO, checkpoints, keep_weights, previous, usable_checkpoint
from abn_exp.training.classifier import LitClassifier, Stage
from abn_exp.training.extend import begin_with_shorter_run
from abn_exp.training.setup import (
    BATCHES_PER_GROUP,
    compile_,
    configure_process,
    device_errors_explained,
    load_data,
    make_loaders,
    make_network,
    normalization,
    process_rank,
    select_device,
    time_against_fp32,
    trainer_options,
)
from abn_exp.training.wandb_run import Tracker, run_arguments
from abn_exp.training.watch import Counter, epoch_reached, watching

RECORD = ("result.json", "SHA256SUMS", "FAILED", "metrics.jsonl", "input.json", "config.yaml")  # not what is large
PATIENCE = 1.0  # seconds for whoever looks at the run's lock just now
SLOWER = 1.1  # warn where a precision takes this many times as long as fp32

log = logging.getLogger(__name__)
logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # "GPU available: ..." and tips, before every run
warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own use of torch
warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # what is logged has been summed over processes
warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")  # it is resumed from
warnings.filterwarnings("ignore", message="bf16 and fp16 are mixed")  # torch.compile, of exact16; both are meant
warnings.filterwarnings("ignore", message="GPU available but not used")  # device=cpu means that
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # torch.compile on a CPU: "No CUDA runtime"


def run(plan: RunPlan, command: str, steps: Counter | None = None, patience: float = PATIENCE) -> RunResult:
    """Train and test one network, or go on with it, or show its result where it is already finished.

    `steps` is a counter that another process watches; without it, this process watches the run itself. `patience` is
    for how many seconds to wait for another process that trains the run; negative: until it has ended.

    Raises ConfigError for what the user can correct; where training had not begun, the run's folder is removed, or is
    again what it was before `force`. Any other error is recorded in `FAILED`.
    """
    config, directory = plan.config, plan.directory
    if process_rank(config) > 0:
        return _run_worker_rank(plan)
    device = select_device(config)
    source = restore_quoted(plan)
    directory.mkdir(parents=True, exist_ok=True)
    with run_lock(directory, patience) as free, _log_to(directory / "train.log"):
        if not free:
            raise ConfigError(f"{directory} is being written by another process; wait for it or stop it.")
        remove_temporary_files(directory)
        remove_temporary_files(directory / "checkpoints")
        restore_replaced(directory)  # of a process that was killed
        if config.force:
            set_aside(directory)
        finished = _check_same_config(plan)
        if source is not None:
            log.info("taken from %s", source)
        if finished is not None:
            if read_config(directory).get("keep") == "weights" and list(directory.glob("checkpoints/previous-*")):
                keep_weights(directory)  # stopped between writing the record and this
            log.info("finished before; force=true runs it again")
            show(directory, finished)
            return finished
        _log_last_attempt(plan)
        last = directory / "checkpoints" / "last.ckpt"
        earlier, begun = _take_record(directory), modified(last)
        write_config(directory, config.model_dump(), command)
        write_text_atomic(directory / "RUNNING", f"process {os.getpid()} on {platform.node()}\n")
        try:
            new = not (config.force or last.exists() or previous(last).exists())
            copied = new and begin_with_shorter_run(plan, device)
            begun = modified(last) if copied else begun
            with device_errors_explained(device):
                result = _train_and_test(plan, device, steps, copied)
        except NotContinued:  # nothing has failed
            _give_back(directory, earlier, begun)
            raise
        except ConfigError as error:
            if not _give_back(directory, earlier, begun):
                if _has_trained(directory):
                    write_text_atomic(directory / "FAILED", f"{error}\n")
                elif not restore_replaced(directory):
                    remove_run(directory)
            raise
        except Exception as error:
            if not _give_back(directory, earlier, begun):
                text = f"{type(error).__name__}: {error}"
                write_text_atomic(directory / "FAILED", text.removeprefix("Diverged: ") + "\n")
            raise
        except (Stopped, SIGTERMException) as error:
            stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGTERM)  # of a launcher's own process
            _log_stop(plan, stopped)
            _give_back(directory, earlier, begun)
            restore_replaced(directory)
            raise stopped from None
        finally:
            with suppress(OSError):
                (directory / "RUNNING").unlink(missing_ok=True)
        write_result(directory, result)
        restore_replaced(directory)
        if config.keep == "weights":
            keep_weights(directory)
        show(directory, result)
        return result


def _take_record(directory: Path) -> dict[str, bytes]:
    """Remove how a run ended, a damaged record or a failure, which it will write again; return it, and what else of
    the record is written at a run's start."""
    taken = {name: path.read_bytes() for name in RECORD if (path := directory / name).is_file()}
    for name in RECORD[:3]:
        (directory / name).unlink(missing_ok=True)
    return taken


def _give_back(directory: Path, taken: Mapping[str, bytes], begun: int | None) -> bool:
    """Put back what `_take_record` took, where it was a record or a divergence and no epoch has ended since, that is,
    `last.ckpt` is still of `begun`; tell whether it was put back."""
    if modified(directory / "checkpoints" / "last.ckpt") != begun:
        return False
    if not ("result.json" in taken or taken.get("FAILED", b"").startswith(b"diverged")):
        return False
    for name in reversed(RECORD):  # a record is whole once its result is there
        if name in taken:
            with writing(directory / name) as file:
                file.write(taken[name])
    return True


def _has_trained(directory: Path) -> bool:
    metrics = directory / "metrics.jsonl"
    return (metrics.is_file() and metrics.stat().st_size > 0) or (directory / "checkpoints" / "last.ckpt").exists()


def _log_last_attempt(plan: RunPlan) -> None:
    """Log how the last attempt at this run ended, where it left no result."""
    try:
        for name, sentence in (("RUNNING", "was killed {where} (it was {what})"), ("FAILED", "failed: {what}")):
            path = plan.directory / name
            if path.is_file():
                what = path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
                log.warning("the last attempt %s", sentence.format(where=epoch_reached(plan), what=what))
    except (OSError, DamagedFile) as error:
        log.warning("%s", error)


def _log_stop(plan: RunPlan, stopped: Stopped) -> None:
    """Log what is done and how it goes on."""
    stopped.reported = True
    try:
        done, where = len(read_metrics(plan.directory)), epoch_reached(plan)
    except DamagedFile as error:
        log.warning("stopped by %s; %s", stopped.signal, error)
        return
    how = f"goes on from the end of epoch {done}" if done else "begins the run again"
    if done and plan.config.force:
        how = f"begins the run again, and without force=true {how}"
    log.warning("stopped by %s %s; the same command %s", stopped.signal, where, how)


def _run_worker_rank(plan: RunPlan) -> RunResult:
    """Train and test as one of the processes that share a run; the first one writes, logs and reports."""
    logging.disable(logging.INFO)
    try:
        return _train_and_test(plan, select_device(plan.config), None)
    except Diverged:
        raise SystemExit(0) from None  # with any other code, Lightning would kill the first process before it reports


def _train_and_test(plan: RunPlan, device: torch.device, steps: Counter | None, copied: bool = False) -> RunResult:
    """Train and test. `copied`: the checkpoints that are there are a shorter run's."""
    config, directory = plan.config, plan.directory
    recipe, rank = config.recipe, process_rank(config)
    torch.set_num_threads(config.threads)
    configure_process()
    if config.devices > 1:
        os.environ["OMP_NUM_THREADS"] = str(config.threads)  # else Lightning takes all cores

    data = load_data(config)
    loaders = make_loaders(config, data, device, rank=rank, world_size=config.devices)
    network = make_network(config, plan.choices["norm"], len(data.classes), device)
    if rank == 0 and config.precision != "fp32" and (times := time_against_fp32(config, network, device)) > SLOWER:
        what = f"precision={config.precision} is slower than fp32 on this device"
        log.warning("%s: a pass takes %.1f times as long", what, times)
    summary = summarize(network, config.dataset.image_size)
    targets = _targets([config.norm, config.model, config.recipe.optimizer.model_dump()])
    modules = targets | {type(layer).__module__ for layer in network.modules()}
    made_with = {  # read before training, so that an error here cannot end a run after its last epoch
        "versions": provenance.versions() | provenance.own_code(modules),
        "git_commit": provenance.git_commit(),
        "device": provenance.device_name(device, config.threads),
        "threads": config.threads,
        "code": provenance.code_digest(),
    }
    mean, std = normalization(config, data)
    inputs = InputFormat(config.dataset.image_size, tuple(mean), tuple(std), tuple(data.classes), data.digest)
    if rank > 0:  # the first process has looked at it, before it started this one
        last = usable_checkpoint(directory / "checkpoints" / "last.ckpt")
    else:
        last = _checkpoint_to_go_on_from(directory, inputs, copied)
        write_input_format(directory, inputs)
    where = f"{' '.join(plan.cell[:3])}, seed {config.seed}\n{plan.variant}\n{made_with['device']}"
    log.info("%s\n%s", where, as_text(summary.table()))

    evaluated: tuple[Stage, ...] = ("val", "test") if recipe.test_every_epoch else ("val",)
    stages = tuple(stage for stage in evaluated if stage in loaders)
    if config.compile:
        compile_(network)
    classifier = LitClassifier(
        network, recipe, config.seed, len(data.classes), len(loaders["train"]), stages, config.sync_norm
    )
    classifier.inputs, classifier.made_with = asdict(inputs), [made_with]
    if steps is not None:
        classifier.begun = steps
    wandb_config = config.wandb if rank == 0 else config.wandb.model_copy(update={"mode": "disabled"})
    watched = nullcontext() if steps is not None else watching(plan, classifier.begun)
    arguments = run_arguments(directory, plan.choices["recipe"], config.model_dump())
    with watched, Tracker(wandb_config, **arguments) as tracker:
        tracker.log_network(summary)
        trainer = _trainer(config, device, directory, tracker, stages)
        if last is not None:
            log.info("going on from %s", last.name)
        groups = BatchGroups(loaders["train"], BATCHES_PER_GROUP)
        trainer.fit(classifier, groups, [loaders[stage] for stage in stages] or None, ckpt_path=last)
        result = _test(plan, trainer, classifier, loaders["test"], summary, made_with, tracker.run_id)
        tracker.log_result(result)
        if tracker.run_id is not None:
            predicted = load_predictions(directory).last.astype(np.int64)
            tracker.log_class_accuracies(data.classes, loaders["test"].labels.cpu().numpy(), predicted)
    return result


def _targets(parts: Iterable[Any]) -> set[str]:
    """Return the modules that the `_target_`s of a configuration are named by, and those that they are defined in."""
    found = set()
    for part in (part for part in parts if isinstance(part, dict)):
        if "_target_" in part:
            found |= {part["_target_"].rpartition(".")[0], get_object(part["_target_"]).__module__}
        found |= _targets(part.values())
    return found


def _checkpoint_to_go_on_from(directory: Path, inputs: InputFormat, copied: bool) -> Path | None:
    """Return the run's last whole checkpoint, None where there is none.

    Those of a folder's images may have changed since: a run does not go on with others, and of a shorter run that was
    (`copied`) nothing is taken.
    """
    last = usable_checkpoint(directory / "checkpoints" / "last.ckpt")
    begun = read_checkpoint(last).get("inputs") if last is not None else None
    if begun is None or asdict(inputs) | begun == asdict(inputs):  # of an older version it has no digest
        return last
    if copied:
        log.info("which was trained on other images: training begins at the start")
        shutil.rmtree(directory / "checkpoints")
        return None
    raise NotContinued(
        f"The images have changed since {directory} was begun (their pixels, labels, order, mean, std or class names "
        "differ). Restore them, or choose another name=, or force=true to begin the run again."
    )


def _trainer(
    config: Config, device: torch.device, directory: Path, tracker: Tracker, stages: tuple[Stage, ...]
) -> pl.Trainer:
    alone = current_process().name == "MainProcess" and process_rank(config) == 0
    show_bar = config.progress == "bar" or (config.progress == "auto" and alone and sys.stdout.isatty())
    callbacks = [EpochLogger(directory, tracker, brief=not alone), *checkpoints(directory, keep_best="val" in stages)]
    if config.devices > 1:
        callbacks.append(KillAllRanks())
    if os.environ.get("SUBMITIT_EXECUTOR") == "slurm":
        callbacks.append(IgnoreSigterm())
    return pl.Trainer(
        **trainer_options(config, device),
        strategy="ddp" if config.devices > 1 else "auto",
        max_epochs=config.recipe.epochs,
        callbacks=[*callbacks, StepProgressBar()] if show_bar else callbacks,
        plugins=[AtomicCheckpointIO(), LightningEnvironment()],  # SLURM and the like start runs, not their parts
        default_root_dir=directory,
        limit_val_batches=1.0 if stages else 0,
    )


def _test(
    plan: RunPlan,
    trainer: pl.Trainer,
    classifier: LitClassifier,
    loader: BatchLoader,
    summary: NetworkSummary,
    made_with: dict[str, Any],
    wandb_run_id: str | None,
) -> RunResult:
    """Read the test set with the last epoch's weights and, where there is a validation split, with the best one's."""
    directory, config = plan.directory, plan.config
    metrics = read_metrics(directory)
    trainer.test(classifier, loader, verbose=False)
    test = classifier.evaluated
    if not math.isfinite(test["test/loss"]):
        raise Diverged(f"diverged in epoch {config.recipe.epochs}: test/loss is not finite")
    last, predicted_best, test_best = classifier.predicted.cpu().numpy(), None, None
    val = [line["val/acc"] for line in metrics if "val/acc" in line]
    if "val" in classifier.eval_stages:
        best = directory / "checkpoints" / "best.ckpt"
        try:
            classifier.load_state_dict(read_checkpoint(best)["state_dict"])
        except (DamagedFile, OSError) as error:
            raise ConfigError(f"{error}; force=true runs the run again from its start.") from error
        trainer.test(classifier, loader, verbose=False)
        test_best, predicted_best = classifier.evaluated["test/acc"], classifier.predicted.cpu().numpy()
    if trainer.is_global_zero:
        write_predictions(directory, loader.labels.cpu().numpy(), last, predicted_best)
    peaks = [line["test/acc"] for line in metrics if "test/acc" in line]
    return RunResult(
        dataset=plan.choices["dataset"],
        model=plan.choices["model"],
        norm=plan.choices["norm"],
        recipe=plan.choices["recipe"],
        variant=plan.variant,
        seed=config.seed,
        config_hash=plan.config_hash,
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
        **made_with,
        earlier=classifier.made_with[:-1],
        wandb_run_id=wandb_run_id,
        directory=directory,
    )


def show(directory: Path, result: RunResult) -> None:
    """Print where a finished run lies, and its numbers as a table."""
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
    speed = speed_text(result.images_per_second)
    table.caption = f"{result.epochs} epochs in {clock(result.train_seconds)}, {speed}"
    log.info("%s\n%s", directory, as_text(table))


def as_text(table: Table) -> str:
    """Return a table as plain text, for a terminal and a log alike."""
    out = io.StringIO()
    Console(file=out, width=80).print(table)
    return out.getvalue()


class RunLog(logging.FileHandler):
    """A log file that reports once, in one line, that it cannot be written: no tracebacks on a full disk."""

    def handleError(self, record: logging.LogRecord) -> None:
        print(f"{self.baseFilename} cannot be written: {sys.exception()}", file=sys.stderr)
        logging.getLogger().removeHandler(self)


@contextmanager
def _log_to(path: Path) -> Iterator[None]:
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


def _check_same_config(plan: RunPlan) -> RunResult | None:
    """Return the directory's result if there is one; refuse a directory that another configuration has written.

    A damaged record is written again: the checkpoint, with checksums of its own, holds all of it.
    """
    directory, finished = plan.directory, None
    if not (directory / "config.yaml").is_file():
        return None
    try:
        try:
            finished = read_result(directory)
        except DamagedFile as error:
            log.warning("%s; the record is made again, from the last checkpoint if there is one", error)
        different = plan.differing(directory)
    except ValueError as error:  # damaged, or of a later version
        raise ConfigError(f"{error}; force=true runs the run again from its start.") from error
    if different:
        raise ConfigError(
            f"{directory} was made by another configuration (different: {', '.join(different)}); "
            "choose another name=, or force=true to replace it."
        )
    return finished
