"""W&B from outside: what an offline run holds, read back with W&B's own reader, and that nothing there ends a run."""

import base64
import json
import logging
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Self

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock

from abn_exp.config import WandbConfig
from abn_exp.data.prepare import load
from abn_exp.errors import ConfigError
from abn_exp.identity import RunPlan
from abn_exp.results import read_metrics
from abn_exp.trained_network import load_network, read_checkpoint
from abn_exp.training import wandb_run as tracking
from abn_exp.training.wandb_run import Tracker
from tests.helpers.cli import FORKED_WORKERS, Cli
from tests.helpers.records import finish_run, start_run
from tests.helpers.runs import REPOSITORY, TINY, WEIGHTS, once
from tests.helpers.scripts import run_script

SECRET = "0123456789abcdef" * 2 + "76543210"  # as long as a key is


def records(cli: Cli, directory: Path) -> dict[str, list[Any]]:
    """Everything in an offline run's directory by type of record."""
    import wandb

    found: dict[str, list[Any]] = {}
    program = Path(wandb.__file__).parent / "__main__.py"
    done = cli.run("leet", "inspect", "--json", str(directory), program=program, env={"WANDB_MODE": None})
    assert done.code == 0, done.err
    for line in done.out.splitlines():
        record = json.loads(line)
        found.setdefault(record["type"], []).append(record[record["type"]])
    return found


def summary_of(record: dict[str, list[Any]]) -> dict[str, Any]:
    return {key: value for part in record["summary"] for key, value in part.get("update", {}).items()}


def settings(tmp_path: Path, mode: str = "offline") -> WandbConfig:
    return WandbConfig.model_validate({"mode": mode, "dir": str(tmp_path)})


@pytest.fixture(scope="module")
def sweep(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep over two rates, the second of which diverges; a key lies in its environment.

    Beside its files what it printed and, as W&B's own reader has them, the records of its W&B runs.
    """

    def make(folder: Path) -> None:
        done = cli.run(
            *["-m", f"results_dir={folder / 'results'}", f"hydra.sweep.dir={folder}"],
            *[*TINY, "recipe.optimizer.name=sgd", "recipe.optimizer.lr=0.1,1e38", "seed=3"],
            *["wandb=offline", f"wandb.dir={folder}", "wandb.log_model=true"],
            env={"WANDB_MODE": None, "WANDB_API_KEY": SECRET, "HOME": str(folder)},
            inject=FORKED_WORKERS,
        )
        assert done.code == 1, done.err
        (folder / "printed").write_text(done.out + done.err)
        found = [records(cli, directory) for directory in (folder / "wandb").glob("offline-run-*")]
        (folder / "records.json").write_text(json.dumps(found))

    return once(tmp_path_factory, "wandb-sweep", make)


@pytest.fixture(scope="module")
def runs(sweep: Path) -> list[dict[str, list[Any]]]:
    """The records of its W&B runs in the order in which they began."""
    found = json.loads((sweep / "records.json").read_text())
    return sorted(found, key=lambda record: record["environment"][0]["started_at"])


def test_each_job_is_a_run_of_its_own(runs: list[dict[str, list[Any]]]) -> None:
    headers = [record["run"][0] for record in runs]
    assert [header["job_type"] for header in headers] == ["train", "train", "report"]
    assert len({header["run_id"] for header in headers}) == 3
    assert all(header["project"] == "abn_exp" for header in headers)
    assert headers[2]["display_name"] == "runs-report"


def test_a_run_is_found_by_group_name_and_tags(runs: list[dict[str, list[Any]]], sweep: Path) -> None:
    header = runs[0]["run"][0]
    variant = next((sweep / "results").rglob("result.json")).parent.parent.name
    cell = f"digits-binarynet-abn-{variant}"
    assert header["run_group"] == tracking._fit(f"runs-{cell}", tracking.MAX_NAME)
    assert f"runs-{cell}".startswith(header["run_group"][:100])
    assert header["display_name"].startswith("digits-binarynet-abn-fixed_")
    assert header["display_name"].endswith("-s3")
    assert sorted(header["tags"]) == ["abn", "binarynet", "digits"]
    config = header["config"]["update"]
    scalars = {
        "dataset": "digits",
        "model": "binarynet",
        "norm": "abn",
        "recipe": "fixed",
        "study": "runs",
        "seed": 3,
    }
    assert config.items() >= scalars.items()
    assert config["seed"] == config["cfg"]["seed"] == 3
    assert config["cfg"]["recipe"]["optimizer"]["lr"] == 0.1
    assert config["cfg"]["norm"]["gate"] == "full"


def test_the_epoch_is_the_x_axis(runs: list[dict[str, list[Any]]]) -> None:
    metrics = {metric.get("name", metric.get("glob_name")): metric for metric in runs[0]["metric"]}
    assert metrics["*"]["step_metric"] == "epoch"
    assert metrics["val/acc"]["step_metric"] == "epoch"
    history = [line["item"] for line in runs[0]["history"]]
    assert [line["epoch"] for line in history] == [1, 2]
    assert history[0]["network._type"] == "table-file"
    assert all({"train/loss", "train/acc", "val/acc", "lr", "bnn/flip_ratio/layer1.conv"} <= set(h) for h in history)


def test_the_summary_is_the_record(runs: list[dict[str, list[Any]]], sweep: Path) -> None:
    result = json.loads(next((sweep / "results").rglob("result.json")).read_text())
    summary = summary_of(runs[0])
    assert summary["final/test_acc"] == result["test_acc"]
    assert summary["best/val_acc"] == result["val_acc_best"]
    assert summary["best/epoch"] == result["best_epoch"]
    assert result["wandb_run_id"] == runs[0]["run"][0]["run_id"]
    assert "final/test_acc" not in summary_of(runs[1])


def test_the_summary_has_the_accuracy_of_each_class(runs: list[dict[str, list[Any]]], sweep: Path) -> None:
    result = json.loads(next((sweep / "results").rglob("result.json")).read_text())
    summary = summary_of(runs[0])
    shares = [summary[f"class_acc/{digit}"] for digit in range(10)]
    counts = np.bincount(load("digits", ".").test.labels.numpy())
    assert np.average(shares, weights=counts) == pytest.approx(result["test_acc"], abs=1e-6)
    assert len(set(shares)) > 1


def test_weights_and_reports_are_artifacts_where_asked_for(
    runs: list[dict[str, list[Any]]], sweep: Path, tmp_path: Path
) -> None:
    """What is in the model's artifact, put into a folder, is one that load_network reads."""
    named = [{artifact["type"]: artifact for artifact in run.get("artifact", [])} for run in runs]
    assert "model" not in named[1]
    names = {entry["path"] for entry in named[2]["report"]["manifest"]["contents"]}
    assert {"report.md", "report.csv", "runs.csv", "figures/learning_curves.png"} <= names
    for entry in named[0]["model"]["manifest"]["contents"]:
        (tmp_path / entry["path"]).parent.mkdir(exist_ok=True)
        shutil.copy(entry["local_path"], tmp_path / entry["path"])
    trained = next((sweep / "results").rglob("result.json")).parent
    for weights in WEIGHTS:
        ours, theirs = (load_network(folder, weights).state_dict() for folder in (trained, tmp_path))
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    kept = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert kept["optimizer_states"] == []


def test_a_failed_run_shows_as_failed(runs: list[dict[str, list[Any]]], sweep: Path) -> None:
    codes = [record["exit"][0].get("exit_code", 0) for record in runs]
    assert codes == [0, 1, 0]
    assert "DIVERGED" in (sweep / "printed").read_text()


def test_the_report_holds_tables(runs: list[dict[str, list[Any]]]) -> None:
    logged = set().union(*(line["item"] for line in runs[2]["history"]))
    assert {"report", "runs"} <= {key.split(".")[0] for key in logged}


def test_the_key_is_written_nowhere(sweep: Path) -> None:
    files = [path for path in sweep.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
    assert not list((sweep / "wandb").rglob("output.log"))


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """This process as one that has not used W&B yet, without a key of the machine's."""
    for key in [key for key in os.environ if key.startswith("WANDB")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(tracking, "_unreachable", False)
    yield
    import wandb

    wandb.teardown()


def open_run(tmp_path: Path, mode: str = "auto", **more: Any) -> Tracker:
    names: dict[str, Any] = {"group": "cell", "name": "cell-s0", "tags": ["abn"], **more}
    return Tracker(settings(tmp_path, mode), tmp_path / "results" / "study", **names)


@pytest.mark.usefixtures("own")
def test_without_a_key_auto_is_offline_and_online_a_sentence(tmp_path: Path) -> None:
    with open_run(tmp_path) as tracker:
        assert tracker.run.offline
    with pytest.raises(ConfigError, match=r"wandb\.mode=online needs a key: run `wandb login`"):
        open_run(tmp_path, "online")


@pytest.mark.usefixtures("own")
def test_a_key_that_is_too_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "tooshort")
    with caplog.at_level(logging.WARNING), open_run(tmp_path) as tracker:
        assert tracker.run.offline
    assert "the key cannot be used" in caplog.text
    assert "tooshort" not in caplog.text
    with pytest.raises(ConfigError, match=r"wandb\.mode=online needs a key"):
        open_run(tmp_path, "online")


@pytest.mark.usefixtures("own")
def test_a_server_that_never_answers_costs_one_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    silent = socket.create_server(("127.0.0.1", 0))  # accepts, and says nothing
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setattr(tracking, "INIT_TIMEOUT", 2)
    with silent, caplog.at_level(logging.WARNING):
        (tmp_path / "wandb-run-id").write_text("0123abcd")  # of a run that goes on, and keeps its id
        monkeypatch.setattr(tracking, "QUICK_TIMEOUT", 1)
        began = time.monotonic()
        with open_run(tmp_path, directory=tmp_path) as tracker:
            assert time.monotonic() - began < 30  # 2 s for the client, 1 s for the question, on a quiet machine
            assert tracker.run.offline
            assert tracker.run_id == "0123abcd"
        with open_run(tmp_path) as tracker:
            assert tracker.run.offline
        assert caplog.text.count("no connection") == 1


@pytest.mark.usefixtures("own")
def test_wandb_mode_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert open_run(tmp_path, "online").run is None
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    with open_run(tmp_path) as tracker:
        assert tracker.run.offline
    monkeypatch.setenv("WANDB_MODE", "of")
    with pytest.raises(ConfigError, match="WANDB_MODE=of is not allowed: it should be online, offline or disabled"):
        open_run(tmp_path)


def test_wandbs_variables_are_defaults_of_the_keys(
    make_plan: Callable[..., RunPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = make_plan().config.wandb
    assert (plain.project, plain.entity, plain.dir) == ("abn_exp", None, ".")
    assert (plain.group, plain.tags, plain.notes) == (None, [], None)
    values = {"PROJECT": "p", "ENTITY": "team", "DIR": "elsewhere", "RUN_GROUP": "g", "TAGS": "a, b c,,d"}
    for name, value in {**values, "NOTES": "why: [x], y"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    found = make_plan().config.wandb
    assert (found.project, found.entity, found.dir) == ("p", "team", "elsewhere")
    assert (found.group, found.tags, found.notes) == ("g", ["a", "b c", "d"], "why: [x], y")
    typed = make_plan("wandb.project=q", "wandb.tags=[e]", "wandb.notes=n", "wandb.group=h", "wandb.dir=.")
    assert (typed.config.wandb.project, typed.config.wandb.tags, typed.config.wandb.notes) == ("q", ["e"], "n")
    assert (typed.config.wandb.group, typed.config.wandb.dir, typed.config.wandb.entity) == ("h", ".", "team")
    assert typed.config_hash == make_plan().config_hash
    assert typed.directory == make_plan().directory
    for name in (*values, "NOTES"):
        monkeypatch.setenv(f"WANDB_{name}", "")
    assert make_plan().config.wandb == plain


@pytest.mark.usefixtures("own")
def test_group_tags_and_notes_of_the_settings(tmp_path: Path) -> None:
    chosen = settings(tmp_path).model_copy(update={"group": "mine", "tags": ["abn", "pilot"], "notes": "a note"})
    with Tracker(chosen, tmp_path, group="cell", name="cell-s0", tags=["digits", "abn"]) as tracker:
        assert (tracker.run.group, tracker.run.notes) == ("mine", "a note")
        assert sorted(tracker.run.tags) == ["abn", "digits", "pilot"]


@pytest.mark.usefixtures("own")
def test_long_names_fit(tmp_path: Path) -> None:
    long = "x" * 300
    with open_run(tmp_path, "offline", group=long, name=long + "-s3", tags=[long]) as tracker:
        run = tracker.run
        assert len(run.group) == len(run.name) == 128
        assert run.group != run.name
        assert run.name.endswith("-s3")
        assert [len(tag) for tag in run.tags] == [64]


@pytest.mark.usefixtures("own")
def test_what_fails_inside_wandb_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("the service is gone")

    with caplog.at_level(logging.WARNING), open_run(tmp_path, "offline") as tracker:
        for method in ("log", "finish"):
            monkeypatch.setattr(tracker.run, method, broken)
        for epoch in range(3):
            tracker.log_epoch({"epoch": epoch})
    assert caplog.text.count("the service is gone") == 1


@pytest.mark.usefixtures("own")
def test_a_folder_that_cannot_be_made_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING), open_run(tmp_path / "file" / "below", "offline") as tracker:
        tracker.log_epoch({"epoch": 0})
    assert tracker.run_id is None
    assert "going on without it" in caplog.text


@pytest.mark.usefixtures("own")
def test_a_run_that_goes_on_keeps_its_id_and_logs_all_its_epochs_again(
    cli: Cli, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), open_run(tmp_path, "offline", directory=tmp_path) as first:
        first.log_epoch({"epoch": 1, "val/acc": 0.5})
    assert f"`python scripts/runs.py --upload {tmp_path}/results/study` uploads it" in caplog.text
    with open_run(tmp_path, "offline", directory=tmp_path) as second:
        for epoch in (1, 2, 2, 3):
            second.log_epoch({"epoch": epoch, "val/acc": 0.5})
    assert second.run_id == first.run_id == (tmp_path / "wandb-run-id").read_text()
    (folder,) = (tmp_path / "wandb").glob(f"offline-run-*-{first.run_id}*")  # the first is removed
    history = [line["item"] for line in records(cli, folder)["history"]]
    assert [(line["_step"], line["epoch"]) for line in history] == [(1, 1), (2, 2), (3, 3)]


class Server(BaseHTTPRequestHandler):
    """Answers a GraphQL query with `answers[run id]`, a bucket or None; anything else with an error."""

    answers: ClassVar[dict[str, Any]] = {}
    projects: ClassVar[set[str]] = set()  # that are not there

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.headers["Authorization"] == "Basic " + base64.b64encode(f"api:{SECRET}".encode()).decode()
        name = body["variables"]["name"]
        found: dict[str, Any] = (
            {"data": {"model": {"bucket": self.answers[name]}}} if name in self.answers else {"errors": ["no"]}
        )
        if body["variables"]["project"] in self.projects:
            found = {"data": {"model": None}}
        content = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def test_what_a_server_has_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"_step": 4, "epoch": 4}), json.dumps({"_step": 5, "epoch": 5})]
    summary = {"epoch": 6, "final/test_acc": 0.5}
    Server.answers = {
        "tail": {"state": "crashed", "historyTail": json.dumps(lines), "summaryMetrics": json.dumps({"epoch": 4})},
        "summary": {"state": "finished", "historyTail": None, "summaryMetrics": json.dumps(summary)},
        "empty": {"state": "running", "historyTail": "[]", "summaryMetrics": "{}"},
        "none": None,
    }
    Server.projects = {"gone"}
    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(tracking, "_server", lambda _: (f"http://127.0.0.1:{server.server_port}", SECRET))
    try:
        found = {name: tuple(tracking._ask("abn_exp", None, name)) for name in Server.answers}
        found["project"] = tuple(tracking._ask("gone", None, "tail"))
        with pytest.raises(ValueError, match="no"):
            tracking._ask("abn_exp", None, "something else")
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert found == {
        "tail": (True, 5, True, False),
        "summary": (True, 6, True, True),
        "empty": (True, 0, False, False),
        "none": (False, 0, True, False),
        "project": (True, 0, True, False),  # one that is not there, or that the key may not see
    }
    with pytest.raises(OSError, match="refused"):
        tracking._ask("abn_exp", None, "tail")


class Recorder:
    """Stands for the Tracker: notes what is logged."""

    logged: ClassVar[list[tuple[Path, Any]]] = []
    failed = False

    def __init__(self, _: WandbConfig, study: Path, *, directory: Path | None = None, **arguments: Any) -> None:
        self.directory = directory if directory is not None else study
        self.run = SimpleNamespace(offline=False)
        self.logged.append((self.directory, arguments["job_type"]))

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *values, **more: self.logged.append((self.directory, name))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.logged.append((self.directory, "finish"))


def test_upload_brings_what_is_missing_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = yaml.safe_dump({"name": "study", "seed": 0, "wandb": {"mode": "disabled"}})
    study = tmp_path / "study"
    whole, cut, offline = (finish_run(study, norm, 0, 0.5, config=config) for norm in ("a", "b", "c"))
    killed = start_run(study, "d", 0, config=config)
    trained = start_run(study, "e", 0, config=config)
    for directory in (whole, cut, killed):
        (directory / "wandb-run-id").write_text(directory.parts[-3])
    _, second, _, last = (line["epoch"] for line in read_metrics(whole))
    there = {"a": tracking.Uploaded(True, last, True, True), "b": tracking.Uploaded(True, second, False, False)}
    there["d"] = tracking.Uploaded(True, last, False, False)
    monkeypatch.setattr(tracking, "_ask", lambda _, __, run_id: there[run_id])
    monkeypatch.setattr(tracking, "_resolve_mode", lambda _: "online")
    monkeypatch.setattr(tracking, "Tracker", Recorder)
    Recorder.logged = []
    with FileLock(trained / ".lock"):
        lines = list(tracking.upload(study))
    assert lines == [
        f"{cut}: 2 epochs, result",
        f"{offline}: 4 epochs, result",
        f"{killed}: 0 epochs",
        f"{trained}: being trained, it logs its epochs itself",
        "5 runs, 3 of them lacked something in W&B",
    ]
    per_run = ["train", "log_epoch", "log_epoch", "log_epoch", "log_epoch"]
    assert [what for directory, what in Recorder.logged if directory == cut] == [*per_run, "log_result", "finish"]
    assert [what for directory, what in Recorder.logged if directory == killed] == [*per_run, "finish"]
    assert {directory for directory, _ in Recorder.logged} == {cut, offline, killed}
    with pytest.raises(ValueError, match="There are no runs in"):
        list(tracking.upload(tmp_path / "nothing"))


def test_a_run_that_cannot_be_uploaded_holds_up_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one whose folder is not here is not said to be complete."""
    config = yaml.safe_dump({"name": "study", "seed": 0, "wandb": {"mode": "disabled"}})
    study = tmp_path / "study"
    refused, fine, damaged = (finish_run(study, norm, 0, 0.5, config=config) for norm in ("a", "b", "c"))
    (damaged / "result.json").write_text("{")
    monkeypatch.setattr(tracking, "_resolve_mode", lambda _: "offline" if tracking._unreachable else "online")
    monkeypatch.setattr(tracking, "Tracker", Recorder)

    def offline(self: Recorder, *_: Any, **__: Any) -> None:  # as where a deleted run's id is refused
        self.run = SimpleNamespace(offline=self.directory == refused)
        tracking._unreachable = self.directory == refused

    monkeypatch.setattr(Recorder, "log_result", offline, raising=False)
    lines: list[str] = []
    with pytest.raises(ConfigError, match="1 of the runs are not uploaded whole; their lines say why"):
        lines.extend(tracking.upload(study))
    assert lines == [
        f"{refused}: not uploaded whole; try again when the server answers",
        f"{fine}: 4 epochs, result",
        "3 runs, 2 of them lacked something in W&B; 1 that are damaged or packed were not looked at",
    ]


@pytest.mark.usefixtures("own")
def test_runs_of_one_command_are_not_one_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """WANDB_RUN_ID would be the id of each; an agent gives one to each command, and its command trains one run."""
    monkeypatch.setenv("WANDB_RUN_ID", "x")
    ids: set[str | None] = {"x"}
    for _ in range(2):
        with open_run(tmp_path, "offline") as tracker:
            ids.add(tracker.run_id)
    assert len(ids) == 3


def test_an_agent_s_command_trains_one_run(cli: Cli, tmp_path: Path) -> None:
    done = cli.run(*TINY, "seeds=three", f"results_dir={tmp_path}", env={"WANDB_SWEEP_ID": "x"})
    assert done.code == 1
    assert done.err.startswith("error: An agent of W&B has one run of W&B for a command")
    assert list(tmp_path.iterdir()) == []


class Refused:
    """Stands for W&B's module: of the runs that are asked for, those with an old id were deleted."""

    class errors:
        class Error(Exception):
            pass

        class AuthenticationError(Error):
            pass

    Settings = SimpleNamespace

    def teardown(self) -> None:
        pass

    def init(self, **arguments: Any) -> SimpleNamespace:
        if arguments["mode"] == "online" and arguments["id"] == "deleted":
            raise self.errors.Error("run deleted was previously created and deleted")
        return SimpleNamespace(**arguments)


def test_a_run_that_was_deleted_there_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is only not reached goes offline."""
    monkeypatch.setitem(sys.modules, "wandb", Refused())
    monkeypatch.setattr(tracking, "_unreachable", False)
    answers = [tracking.Uploaded(False, 0, True, False), tracking.Uploaded(True, 3, True, False)]
    monkeypatch.setattr(tracking, "_ask", lambda *_: answers.pop(0))
    arguments = {"dir": str(tmp_path), "id": "deleted", "resume": "allow"}
    run = tracking._init("online", arguments, settings(tmp_path, "auto"))
    assert (run.mode, run.resume) == ("online", None)
    assert run.id != "deleted"
    assert "run deleted was deleted there; it begins anew" in caplog.text
    run = tracking._init("online", arguments, settings(tmp_path, "auto"))
    assert (run.mode, run.id, tracking._unreachable) == ("offline", "deleted", True)
    assert answers == []


@pytest.mark.usefixtures("own")
def test_a_run_that_stops_in_its_first_epoch_logs_nothing_for_it(cli: Cli, tmp_path: Path) -> None:
    """The network's table comes with the epoch: alone, W&B would take it for the epoch, and refuse that later."""
    layer = SimpleNamespace(name="conv", output_shape=(3, 8, 8))
    summary: Any = SimpleNamespace(layers=[layer])
    for epochs in ([], [1, 2]):
        with open_run(tmp_path, "offline", directory=tmp_path) as tracker:
            tracker.log_network(summary)
            for epoch in epochs:
                tracker.log_epoch({"epoch": epoch})
        (folder,) = (tmp_path / "wandb").glob("offline-run-*")
        history = [line["item"] for line in records(cli, folder).get("history", [])]
        assert [line["_step"] for line in history] == epochs
    assert ["network._type" in line for line in history] == [True, False]


@pytest.mark.usefixtures("own")
def test_dashboard_shows_norms_with_their_spread(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb_workspaces")
    run_script(monkeypatch, "dashboard", "--dry-run", "--project", "p", "--entity", "e", "--name", "study-1")
    workspace = json.loads(capsys.readouterr().out)
    assert (workspace["entity"], workspace["project"]) == ("e", "p")
    sections = workspace["spec"]["section"]["panel_bank_config"]["sections"]
    panels = [panel["config"] for section in sections for panel in section["panels"]]
    curves = {panel["chart_title"]: panel for panel in panels if panel.get("x_axis") == "epoch"}
    shown = [metric for panel in curves.values() for metric in panel["metrics"] or [panel["metric_regex"]]]
    assert {"val/acc", "train/loss", "bnn/flip_ratio/.*", "bnn/latent_beyond_one/.*"} <= set(shown)
    for panel in curves.values():
        assert (panel["group_by"], panel["group_agg"], panel["group_area"]) == ("group", "mean", "stddev")
    assert "final/test_acc" in json.dumps([panel for panel in panels if panel not in curves.values()])
    assert "study-1" in json.dumps(workspace["spec"]["section"]["run_sets"])


@pytest.mark.usefixtures("own")
def test_dashboard_needs_a_key_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb_workspaces")
    with pytest.raises(SystemExit) as stop:
        run_script(monkeypatch, "dashboard")
    assert stop.value.code == "error: no W&B key: run `wandb login`, or look at the workspace with --dry-run."


def test_the_file_for_wandb_agents_composes(make_plan: Callable[..., RunPlan]) -> None:
    """Through W&B's own expansion of parameters into arguments."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    file = yaml.safe_load((REPOSITORY / "sweeps" / "wandb.yaml").read_text())
    assert (REPOSITORY / file["program"]).is_file()
    parameters = {key: options.get("values", [options.get("value")]) for key, options in file["parameters"].items()}
    seen = set()
    for values in product(*parameters.values()):
        chosen = {key: {"value": value} for key, value in zip(parameters, values, strict=True)}
        arguments = create_sweep_command_args({"args": chosen})["args_no_hyphens"]
        assert len(arguments) == len(parameters)
        plan = make_plan(*arguments, tiny=False)
        seen.add((plan.choices["norm"], plan.config.seed))
        assert (plan.choices["dataset"], plan.config.name) == ("cifar10", "wandb-sweep")
    assert len(seen) == 10
    assert create_sweep_command(file["command"])[1:4] == ["${interpreter}", "${program}", "${args_no_hyphens}"]
    assert file["metric"] == {"name": "final/val_acc", "goal": "maximize"}
