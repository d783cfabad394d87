"""Optional W&B logging; a failure inside W&B is a warning, since the record of a run is on disk.

Without a key a run is written offline; a server that cannot be reached costs one wait a process, and then everything
goes offline. W&B's step is the epoch, and a run that goes on logs all its epochs again, so that W&B has each once.
`upload` adds later what W&B lacks of the records. `wandb` is imported only where it is used.
"""

import base64
import csv
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from abn_exp.config import WandbConfig
from abn_exp.errors import ConfigError, DamagedFile, in_a_line
from abn_exp.files import run_lock, write_text_atomic
from abn_exp.models.cost import NetworkSummary
from abn_exp.results import Run, RunResult, find_runs, read_metrics
from abn_exp.trained_network import read_checkpoint, read_config

log = logging.getLogger(__name__)

INIT_TIMEOUT = 30  # seconds that a server which cannot be reached may cost, once a process
QUICK_TIMEOUT = 5  # seconds in which a server that is there says what it has of a run
FINISH_TIMEOUT = 25  # seconds that a run's end waits for uploads
Array = NDArray[np.int64]
MAX_TAG, MAX_NAME = 64, 128  # characters that W&B takes

_unreachable = False  # whether a server did not answer: this process does not ask again


class Tracker:
    """One W&B run as a context: an exception inside marks it as failed. Mode "disabled" makes every call a no-op.

    Raises ConfigError where `wandb.mode=online` was asked for and there is no key that the server takes.
    """

    def __init__(
        self,
        settings: WandbConfig,
        study: Path,
        *,
        directory: Path | None = None,
        keep_offline: bool = False,
        name: str,
        **init: Any,
    ) -> None:
        """`study` is the study's folder, results/NAME; `directory` is a training run's, which keeps the id, so that
        the same W&B run goes on. `keep_offline`: what it wrote offline before stays. `init` goes to `wandb.init`:
        group, job_type, tags, config.
        """
        self.run: Any = None
        self.command = f"python scripts/runs.py --upload {study}"  # uploads what could not be uploaded
        self.failed = False  # whether something could not be logged or uploaded
        self._epoch = 0  # the last one that W&B has
        self._network: dict[str, Any] = {}  # a table to be logged with the first epoch
        self._log_model = settings.log_model
        if (mode := _resolve_mode(settings.mode)) == "disabled":
            return
        arguments = {
            "project": settings.project,
            "entity": settings.entity,
            "dir": settings.dir,
            "notes": settings.notes,
            "name": _fit(name, MAX_NAME),
            **init,
            "group": _fit(settings.group if settings.group is not None else init["group"], MAX_NAME),
            "tags": [_fit(tag, MAX_TAG) for tag in dict.fromkeys([*init["tags"], *settings.tags])],
        }
        earlier = None
        if directory is not None and not _counts_from_zero(directory):
            earlier = _read_id(directory)
        if earlier is not None:
            arguments |= {"id": earlier, "resume": "allow"}
        elif "WANDB_SWEEP_ID" not in os.environ:  # an agent's run has the agent's id
            arguments["id"] = secrets.token_hex(8)  # not WANDB_RUN_ID, with which all runs of a multirun would be one
        self.run = _init(mode, arguments, settings)
        if self.run is None:
            return
        if directory is None:  # --upload is for training runs
            self.command = f"wandb sync {Path(self.run.dir).parent}"
        self._attempt(_define_axes)
        if directory is not None:
            write_text_atomic(directory / "wandb-run-id", self.run.id)
        if earlier is not None:
            if not keep_offline:
                _remove_earlier_segments(self.run, {earlier, self.run.id})
            if not self.run.offline:
                with suppress(Exception):  # else W&B's client leaves out what is there
                    self._epoch = _ask(self.run.project, self.run.entity, self.run.id).epoch
        if self.run.offline:
            log.info("W&B: offline, run %s; `%s` uploads it once you are logged in", self.run.id, self.command)
        else:
            log.info("W&B: %s", self.run.url)

    @property
    def run_id(self) -> str | None:
        return self.run.id if self.run is not None else None

    def log_network(self, summary: NetworkSummary) -> None:
        """Log what the network's layers hold and cost as a table, with the first epoch.

        Not before: of a run that is stopped in its first epoch, W&B would take the table for that epoch.
        """
        if self._epoch > 0:
            return
        rows = [{**vars(layer), "output_shape": "x".join(map(str, layer.output_shape))} for layer in summary.layers]
        values = [list(row.values()) for row in rows]
        self._attempt(lambda _: self._network.update(network=as_table(list(rows[0]), values)))

    def log_epoch(self, metrics: Mapping[str, Any]) -> None:
        """Log one epoch's numbers, unless W&B has them already."""
        epoch = metrics["epoch"]
        if epoch > self._epoch:
            self._epoch = epoch
            values = {**metrics, **self._network}
            self._network = {}
            self._attempt(lambda run: run.log(values, step=epoch, commit=True))

    def log_result(self, result: RunResult) -> None:
        """Write a finished run's headline numbers into the W&B run's summary.

        With `wandb.log_model`, its weights become an artifact: downloaded, a folder that `load_network` reads.
        """
        self._attempt(lambda run: run.summary.update(_headline(result)))
        if self._log_model and result.directory is not None:
            directory = result.directory
            self._attempt(lambda run: _log_model(run, directory))

    def log_class_accuracies(self, classes: Sequence[str], labels: Array, predicted: Array) -> None:
        """Write the test accuracy of each class; labels and predicted classes (N,)."""
        shares = {
            f"class_acc/{name}": float(np.mean(predicted[labels == index] == index))
            for index, name in enumerate(classes)
            if (labels == index).any()
        }
        self._attempt(lambda run: run.summary.update(shares))

    def log(self, values: Mapping[str, Any]) -> None:
        """Log tables and images that belong to no epoch."""
        self._attempt(lambda run: run.log(dict(values)))

    def log_report(self, folder: Path) -> None:
        """Log a report's tables and figures; with `wandb.log_model`, all its files as an artifact, too."""
        self._attempt(lambda run: _log_report(run, folder))
        if self._log_model:
            self._attempt(lambda run: _log_report_files(run, folder))

    def _attempt(self, act: Callable[[Any], object]) -> None:
        """Call `act` with the W&B run; the first exception is a warning, since the record is on disk."""
        global _unreachable
        if self.run is None:
            return
        try:
            act(self.run)
        except Exception as error:
            _unreachable = _unreachable or isinstance(error, TimeoutError)  # finish() has waited
            if not self.failed:
                kind = type(error).__name__
                log.warning("W&B: %s (%s); `%s` uploads what is missing there", in_a_line(error), kind, self.command)
            self.failed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish(exit_code=0 if kind is None else 1)

    def finish(self, exit_code: int) -> None:
        """Upload what is left and end the W&B run: else the next one of this process would be written into it."""
        self._attempt(lambda run: run.finish(exit_code=exit_code))


class Uploaded(NamedTuple):
    """What W&B has of a run."""

    known: bool  # whether there is such a run; True where the project is not known either
    epoch: int  # the last one; 0 where there is none
    ended: bool  # whether it is not running there any more
    tested: bool  # whether its test accuracy is there


_HERE = {"mode": "online", "dir": os.environ.get("WANDB_DIR") or "."}  # where a run is uploaded, not where it trained


def upload(folder: Path) -> Iterator[str]:
    """Upload to W&B what it lacks of the runs below a folder; yield a line for each such run.

    It may be repeated: runs that are complete there are skipped. A study's report follows its runs.

    Raises ConfigError where there is no key, or no server that takes it, and at the end where runs are not uploaded
    whole; ValueError without runs.
    """
    global _unreachable
    folder = folder.resolve()
    runs = find_runs(folder)
    if not runs:
        raise ValueError(f"There are no runs in {folder}; give a folder that train.py wrote, results/NAME.")
    missing = failed = skipped = 0
    for run in runs:
        if run.status == "damaged" or not run.directory.is_dir():
            skipped += 1
            continue
        _unreachable = False  # whether the server answers is asked anew
        with run_lock(run.directory) as free:
            try:
                done = _upload(run) if free else "being trained, it logs its epochs itself"
            except (DamagedFile, NotUploaded) as error:
                done = str(error)
                failed += 1
        if done:
            missing += free
            yield f"{run.directory}: {done}"
    left_out = f"; {skipped} that are damaged or packed were not looked at" if skipped else ""
    yield f"{len(runs)} runs, {missing} of them lacked something in W&B{left_out}"
    if missing and (folder / "report.csv").is_file():
        whole = next(run for run in runs if run.status != "damaged")
        settings = WandbConfig.model_validate(read_config(whole.directory)["wandb"] | _HERE)
        with Tracker(settings, folder, **report_arguments(folder.name)) as tracker:
            tracker.log_report(folder)
    if failed:
        raise ConfigError(f"{failed} of the runs are not uploaded whole; their lines say why.")


class NotUploaded(Exception):
    """Something of one run could not be uploaded."""


def _upload(run: Run) -> str:
    """Upload what is missing of one run; return what that was, empty where it was nothing."""
    config, lines = read_config(run.directory), read_metrics(run.directory)
    settings = WandbConfig.model_validate(config["wandb"] | _HERE)
    if (mode := _resolve_mode(settings.mode)) != "online":  # without a key that is refused there
        raise ConfigError(f"W&B is {mode} here, so nothing can be uploaded; unset WANDB_MODE.")
    run_id = _read_id(run.directory)
    there = Uploaded(False, 0, False, False)
    if run_id is not None:
        try:
            there = _ask(settings.project, _entity(settings), run_id)
        except (OSError, ValueError) as error:
            raise ConfigError(f"W&B does not answer: {in_a_line(error)}.") from error
    if there.epoch > 0 and _counts_from_zero(run.directory):  # an older version's, whole when it was logged
        return ""
    complete = bool(lines) and there.epoch >= lines[-1]["epoch"] and (run.result is None or there.tested)
    if not lines or (complete and there.ended):
        return ""
    recipe = run.result.recipe if run.result is not None else run.variant.split("_")[0]
    # What a run wrote offline has what only training can log, such as each class's accuracy.
    tracker = Tracker(settings, **run_arguments(run.directory, recipe, config), keep_offline=True)
    for line in lines:
        tracker.log_epoch(line)
    if run.result is not None:
        tracker.log_result(run.result)
    tracker.finish(exit_code=0 if run.result is not None else 1)
    if tracker.run is None or tracker.run.offline or tracker.failed:
        raise NotUploaded("not uploaded whole; try again when the server answers")
    return f"{sum(line['epoch'] > there.epoch for line in lines)} epochs" + (", result" if run.result else "")


def run_arguments(directory: Path, recipe: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a training run's Tracker; the folder says what the run is one of."""
    dataset, model, norm, variant, _ = directory.parts[-5:]
    cell = "-".join([dataset, model, norm, variant])
    choices = {"dataset": dataset, "model": model, "norm": norm, "recipe": recipe, "variant": variant}
    scalars = {"study": config["name"], "seed": config["seed"]}
    return {
        "study": directory.parents[4],
        "directory": directory,
        "group": f"{config['name']}-{cell}",
        "name": f"{cell}-s{config['seed']}",
        "job_type": "train",
        "tags": [dataset, model, norm],
        "config": {**choices, **scalars, "cfg": dict(config)},
    }


def report_arguments(study: str) -> dict[str, Any]:
    """Return the arguments of the Tracker of a study's report."""
    return {"group": study, "name": f"{study}-report", "job_type": "report", "tags": ["report"]}


def _headline(result: RunResult) -> dict[str, float]:
    """Return a run's headline numbers; those that the recipe does not ask for are left out."""
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


def _read_id(directory: Path) -> str | None:
    """Return the id of the W&B run that a training run's folder has, if it has one."""
    path = directory / "wandb-run-id"
    return (path.read_text(encoding="utf-8").strip() or None) if path.is_file() else None


def _counts_from_zero(directory: Path) -> bool:
    """Return whether an older version of this program, which counted epochs from 0, wrote the run's epochs."""
    path = directory / "metrics.jsonl"
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.readline().startswith(b'{"epoch": 0,')


def _remove_earlier_segments(run: Any, ids: set[str]) -> None:
    """Remove what an earlier process wrote offline of the same run: whatever is logged now begins at its start.

    A process that was killed leaves a file that ends `wandb sync`, even an upload of the other files.
    """
    own = Path(run.dir).parent
    for folder in own.parent.glob("offline-run-*"):  # W&B adds -1 where two began in one second
        if folder != own and any(re.fullmatch(rf".*-{re.escape(run_id)}(-\d+)?", folder.name) for run_id in ids):
            shutil.rmtree(folder, ignore_errors=True)


QUERY = """query RunResumeStatus($project: String, $entity: String, $name: String!) {
  model(name: $project, entityName: $entity) {
    bucket(name: $name, missingOk: true) { state historyTail summaryMetrics }
  }
}"""


def _ask(project: str, entity: str | None, run_id: str, timeout: int = INIT_TIMEOUT) -> Uploaded:
    """Ask the server what it has of a run, with the query by which W&B's own client resumes one.

    Raises OSError where it does not answer, ValueError where the answer is not one to this question.
    """
    url, key = _server(timeout)
    variables = {"project": project, "entity": entity, "name": run_id}
    body = {"query": QUERY, "operationName": "RunResumeStatus", "variables": variables}
    login = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/graphql", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=timeout) as response:
        answer = json.load(response)
    if not isinstance(answer.get("data"), dict):
        raise ValueError(f"{url} answers {answer}")
    project_there = answer["data"]["model"]  # None where there is none, or none that the key may see
    bucket = (project_there or {}).get("bucket") or {}
    tail = json.loads(bucket.get("historyTail") or "[]")
    summary = json.loads(bucket.get("summaryMetrics") or "{}")
    last = json.loads(tail[-1]) if tail else summary
    ended, tested = bucket.get("state") != "running", "final/test_acc" in summary
    return Uploaded(project_there is None or bool(bucket), last.get("epoch", 0), ended, tested)


@cache
def _server(timeout: int) -> tuple[str, str | None]:
    """Return the server's address and the key. Raises OSError where it does not answer, or does not take the key."""
    import wandb

    try:
        api = wandb.Api(timeout=timeout)
    except wandb.errors.Error as error:
        raise OSError(in_a_line(error)) from error
    return api.settings["base_url"], api.api_key


def _entity(settings: WandbConfig) -> str | None:
    """Return the entity that `wandb.init` takes; None: the key's own."""
    return settings.entity or os.environ.get("WANDB_ENTITY") or None


def _fit(text: str, limit: int) -> str:
    """Return `text`; where it is longer than `limit`, its beginning, a digest of all of it, and its end."""
    if len(text) <= limit:
        return text
    return f"{text[: limit - 15]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}{text[-8:]}"


def as_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Any:
    """Return a table as W&B has it."""
    import wandb

    return wandb.Table(columns=list[str | int](header), data=list(rows))


def _define_axes(run: Any) -> None:
    run.define_metric("epoch")
    run.define_metric("*", step_metric="epoch")
    run.define_metric("val/acc", step_metric="epoch", summary="max,last")


def _log_report(run: Any, folder: Path) -> None:
    import wandb

    for name in ("report", "runs"):
        with open(folder / f"{name}.csv", encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
        run.log({name: as_table(header, rows)})
    figures = sorted((folder / "figures").glob("*.png"))
    run.log({f"figures/{path.stem}": wandb.Image(str(path)) for path in figures})


def _log_report_files(run: Any, folder: Path) -> None:
    import wandb

    artifact = wandb.Artifact(f"report-{folder.name}", type="report")
    for path in sorted([*folder.glob("report.*"), *folder.glob("*.csv"), *folder.glob("figures/*.png")]):
        artifact.add_file(str(path), name=str(path.relative_to(folder)))
    run.log_artifact(artifact)


def _log_model(run: Any, directory: Path) -> None:
    import torch
    import wandb

    artifact = wandb.Artifact(f"model-{run.id}", type="model")
    for path in sorted((directory / "checkpoints").glob("[!p]*.ckpt")):  # not previous-last.ckpt
        with artifact.new_file(f"checkpoints/{path.name}", mode="wb") as file:
            torch.save({**read_checkpoint(path), "optimizer_states": [], "lr_schedulers": []}, file)
    for name in ("config.yaml", "input.json"):
        artifact.add_file(str(directory / name))
    run.log_artifact(artifact)


def _resolve_mode(mode: str) -> str:
    """Resolve "auto" without a prompt: online with a key, else offline; WANDB_MODE=disabled wins over everything."""
    variable = os.environ.get("WANDB_MODE", "")
    variable = {"dryrun": "offline", "run": "online"}.get(variable, variable)  # W&B's own older names
    if "disabled" in (mode, variable):
        return "disabled"
    if mode == "auto" and variable:
        if variable not in ("online", "offline"):
            raise ConfigError(f"WANDB_MODE={variable} is not allowed: it should be online, offline or disabled.")
        mode = variable
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ["WANDB_ERROR_REPORTING"] = "false"  # W&B's own telemetry waits 20 s for a server that is silent
    if mode == "offline" or _unreachable:
        return "offline"
    import wandb

    why = ""
    try:
        has_key = bool(wandb.login(prompt=False, verify=False))
    except wandb.errors.Error as error:
        has_key, why = False, f" ({in_a_line(error)})"
    if has_key:
        return "online"
    if mode == "online":
        raise ConfigError(
            f"wandb.mode=online needs a key{why}: run `wandb login`, or take wandb=auto or wandb=offline."
        )
    if why:
        log.warning("W&B: the key cannot be used%s; going on offline", why)
    return "offline"


def _init(mode: Any, arguments: dict[str, Any], chosen: WandbConfig) -> Any:
    """Start the run, offline where the server does not answer in time; None where not even that is possible.

    A run that was deleted on the server begins anew there: its id is refused for ever.
    """
    import wandb

    global _unreachable
    settings = wandb.Settings(
        init_timeout=INIT_TIMEOUT,
        finish_timeout=FINISH_TIMEOUT,
        finish_timeout_raises=True,
        x_graphql_retry_max=1,  # a table's request would be repeated for hours, and hold up the end for as long
        x_graphql_timeout_seconds=10,
        console="off",
        silent=True,
    )
    try:
        Path(arguments["dir"]).mkdir(parents=True, exist_ok=True)
        if mode == "online":
            try:
                return wandb.init(mode="online", settings=settings, **arguments)
            except wandb.errors.Error as error:
                if chosen.mode == "online" and isinstance(error, wandb.errors.AuthenticationError):
                    raise ConfigError(f"wandb.mode=online, but the key is refused: {in_a_line(error)}.") from error
                if _is_gone(chosen, arguments):
                    log.warning("W&B: run %s was deleted there; it begins anew", arguments["id"])
                    return _init(mode, arguments | {"id": secrets.token_hex(8), "resume": None}, chosen)
                _unreachable = True
                log.warning("W&B: no connection (%s); going on offline", in_a_line(error))
                wandb.teardown()  # else the id of the run is in use
        return wandb.init(mode="offline", settings=settings, **arguments)
    except ConfigError:
        raise
    except Exception as error:
        log.warning("W&B: %s (%s); going on without it", in_a_line(error), type(error).__name__)
        return None


def _is_gone(settings: WandbConfig, arguments: Mapping[str, Any]) -> bool:
    """Return whether the server answers that it has no run of the id with which one was to go on."""
    if arguments.get("resume") is None:
        return False
    try:
        return not _ask(settings.project, _entity(settings), arguments["id"], QUICK_TIMEOUT).known
    except (OSError, ValueError):
        return False
