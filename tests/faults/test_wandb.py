"""Whatever W&B does, the run is not kept waiting for more than a minute, ends, and its record is complete.

The tests with `server` compare the epochs on a server with `metrics.jsonl`. They need openwandb, a server that speaks
W&B's protocol on one machine, in an environment of its own: on the PATH, or named by ABN_EXP_OPENWANDB.
"""

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from abn_exp.results import read_metrics
from tests.helpers.cli import Cli, appears, until
from tests.helpers.faults import FULL, SMALL, Account, differences
from tests.helpers.runs import REPOSITORY

KEY = "0123456789abcdef" * 2 + "deadbeef"
SECRET = "swordfish-swordfish"
QUICK = "import abn_exp.training.wandb_run as t; t.INIT_TIMEOUT = 3; t.FINISH_TIMEOUT = 3"
BREAKS = """
import wandb.sdk.wandb_run as r
real, count = r.Run.log, []
def log(self, *rest, **more):
    count.append(1)
    if len(count) > 1:
        raise ConnectionError("the connection is gone")
    return real(self, *rest, **more)
r.Run.log = log
"""


class Refuses(BaseHTTPRequestHandler):
    """A server to which every key is wrong."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, str]]:
    """Return the addresses of a server that refuses, of one that never answers, and of none."""
    refusing = HTTPServer(("127.0.0.1", 0), Refuses)
    thread = threading.Thread(target=refusing.serve_forever)
    thread.start()
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:
        yield {
            "refuses": f"http://127.0.0.1:{refusing.server_port}",
            "silent": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "none": "http://127.0.0.1:9",
        }
    refusing.shutdown()
    thread.join()
    refusing.server_close()


@pytest.mark.slow
def test_wandb_fails(cli: Cli, tmp_path: Path, servers: dict[str, str], account: Account) -> None:
    words = [*SMALL, f"wandb.dir={tmp_path}", f"question={'?'}"]
    plain = {"WANDB_MODE": None, "FAULTS_SECRET": SECRET, "HOME": str(tmp_path)}
    started = time.monotonic()
    done = cli.run(*words, f"results_dir={tmp_path / 'whole'}", env={**plain, "WANDB_MODE": "disabled"})
    assert done.code == 0, done.err
    alone = time.monotonic() - started
    cases: dict[str, tuple[dict[str, str], str]] = {
        "no key": ({}, ""),
        "a key that is too short": ({"WANDB_API_KEY": "abc"}, ""),
        "a wrong key": ({"WANDB_API_KEY": KEY, "WANDB_BASE_URL": servers["refuses"]}, ""),
        "no server": ({"WANDB_API_KEY": KEY, "WANDB_BASE_URL": servers["none"]}, ""),
        "a server that never answers": ({"WANDB_API_KEY": KEY, "WANDB_BASE_URL": servers["silent"]}, ""),
        "a connection lost in training": ({"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}, BREAKS),
    }
    lost = []
    for number, (case, (env, inject)) in enumerate(cases.items()):
        folder = tmp_path / str(number)
        quick = "" if FULL else QUICK
        started = time.monotonic()
        done = cli.run(*words, f"results_dir={folder}", env={**plain, **env}, inject=f"{quick}\n{inject}")
        seconds = time.monotonic() - started - alone
        if done.code != 0 or "Traceback" in done.err + done.out:
            lost.append(f"{case}: exit code {done.code}: {done.err}")
            continue
        if seconds > (60 if FULL else 20):
            lost.append(f"{case}: waited {seconds:.0f} s")
        if "W&B" not in done.out:
            lost.append(f"{case}: not a word of it")
        lost += [
            f"{case}: {line}"
            for line in differences(
                *(next((tmp_path / n).rglob("result.json")).parent for n in ("whole", str(number)))
            )
        ]
    account(
        "W&B",
        "no key, wrong key, no server, no answer, connection lost: at most a minute, all recorded",
        len(cases),
        lost,
    )

    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".netrc"]
    assert any(path.suffix == ".wandb" for path in files)
    told = [str(path) for path in files if any(word.encode() in path.read_bytes() for word in (KEY, SECRET))]
    account("hostile", "the key or the environment in configuration, logs, records, W&B's files", len(files), told)


def test_online_that_cannot_be_is_refused(
    cli: Cli, tmp_path: Path, servers: dict[str, str], account: Account
) -> None:
    words = [*SMALL, f"wandb.dir={tmp_path}", f"results_dir={tmp_path / 'results'}", "wandb=online"]
    lost = []
    for env in ({}, {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": servers["refuses"]}):
        done = cli.run(*words, env={"WANDB_MODE": None, "HOME": str(tmp_path), **env}, inject=QUICK)
        if done.code == 0 and "going on offline" not in done.out:
            lost.append(f"{env}: exit code {done.code}: {done.out}")
        if done.code != 0 and not done.err.startswith("error: wandb.mode=online"):
            lost.append(f"{env}: exit code {done.code}: {done.err}")
    account("W&B", "wandb=online without a key that is taken: a sentence", 2, lost)


OPENWANDB = os.environ.get("ABN_EXP_OPENWANDB") or shutil.which("openwandb")
SIX = [*SMALL, "recipe.epochs=6", "name=study"]
SLOW = "import abn_exp.training.callbacks as c, time; c.EpochLogger._log_epoch = lambda *_: time.sleep(1)"
STOPS = """
import abn_exp.training.callbacks as c, time
c.EpochLogger._log_epoch = lambda logger, *_: time.sleep(60 if len(logger.lines) == 3 else 0)
"""


class Server:
    """A W&B server that can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        home = str(folder)
        address = {"WANDB_BASE_URL": f"http://127.0.0.1:{self.port}", "WANDB_API_KEY": "local" + 40 * "0"}
        self.env = {"WANDB_MODE": None, "HOME": home, **address}
        self.start()

    def start(self) -> None:
        command = [str(OPENWANDB), "serve", "--host", "127.0.0.1", "--port", str(self.port)]
        with open(self.folder / "log", "w") as log:
            self.process = subprocess.Popen(
                [*command, "--data-dir", str(self.folder / "data")], stdout=log, stderr=log
            )
        assert until(self._answers), (self.folder / "log").read_text()

    def _answers(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def epochs(self, run_id: str) -> list[tuple[int, float]]:
        """Return (step, epoch) of every line of a run there, in the order in which they came."""
        with sqlite3.connect(self.folder / "data" / "openwandb.db") as database:
            rows = database.execute("SELECT step, value FROM metrics WHERE run_id = ? AND key = 'epoch'", [run_id])
            return list(rows)

    def states(self) -> list[str]:
        with sqlite3.connect(self.folder / "data" / "openwandb.db") as database:
            return [state for (state,) in database.execute("SELECT state FROM runs")]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    if not OPENWANDB:
        pytest.skip("no W&B server here: no openwandb on the PATH or in ABN_EXP_OPENWANDB")
    (tmp_path / "server").mkdir()
    made = Server(tmp_path / "server")
    yield made
    made.kill()


def script(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    env |= {key: value for key, value in server.env.items() if value is not None}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False)


def upload(server: Server, folder: Path) -> list[str]:
    done = script(server, "scripts/runs.py", "--upload", str(folder / "study"))
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def complete(server: Server, folder: Path) -> bool:
    """Tell whether the server has each epoch of the one run below a folder once, and nothing else."""
    directory = next(folder.rglob("metrics.jsonl")).parent
    here = [line["epoch"] for line in read_metrics(directory)]
    assert len(here) == 6
    there = server.epochs((directory / "wandb-run-id").read_text())
    return there == [(epoch, epoch) for epoch in here]


@pytest.mark.parametrize("sent", [True, False])
def test_a_killed_run_has_all_its_epochs_there(cli: Cli, tmp_path: Path, server: Server, sent: bool) -> None:
    """Whether W&B's client had sent three of them when it was killed, or none: it sends every 15 seconds."""
    words = [*SIX, f"results_dir={tmp_path / 'results'}", f"wandb.dir={tmp_path}"]
    started = cli.start(*words, env=server.env, inject=STOPS)
    study = tmp_path / "results" / "study"
    assert until(lambda: any(len(read_metrics(path.parent)) == 3 for path in study.rglob("metrics.jsonl")))
    run_id = next(study.rglob("wandb-run-id")).read_text()
    assert until(lambda: bool(server.epochs(run_id)) == sent)
    os.kill(started.pid, 9)
    assert cli.wait(started).code == -9
    assert bool(server.epochs(run_id)) == sent
    done = cli.run(*words, env=server.env)
    assert done.code == 0, done.err
    assert complete(server, tmp_path / "results")
    assert upload(server, tmp_path / "results") == ["1 runs, 0 of them lacked something in W&B"]
    assert complete(server, tmp_path / "results")


def test_a_run_killed_offline_is_uploaded_whole(cli: Cli, tmp_path: Path, server: Server) -> None:
    words = [*SIX, f"results_dir={tmp_path / 'results'}", f"wandb.dir={tmp_path}", "wandb=offline"]
    killed = cli.run(*words, env=server.env, watch=tmp_path / "results", kill_at="best.ckpt")
    assert killed.code == -9
    done = cli.run(*words, env=server.env)
    assert done.code == 0, done.err
    assert "python scripts/runs.py --upload" in done.out
    assert upload(server, tmp_path / "results")[0].endswith(": 6 epochs, result")
    assert complete(server, tmp_path / "results")
    assert upload(server, tmp_path / "results") == ["1 runs, 0 of them lacked something in W&B"]
    assert complete(server, tmp_path / "results")
    assert server.states() == ["finished"]


def test_wandb_sync_of_a_run_killed_offline(cli: Cli, tmp_path: Path, server: Server) -> None:
    """W&B's own way, instead of the project's: the file that the killed process left does not hold it up."""
    words = [*SIX, f"results_dir={tmp_path / 'results'}", f"wandb.dir={tmp_path}", "wandb=offline"]
    assert cli.run(*words, env=server.env, watch=tmp_path / "results", kill_at="best.ckpt").code == -9
    assert cli.run(*words, env=server.env).code == 0
    segments = [str(path) for path in (tmp_path / "wandb").glob("offline-run-*")]
    done = script(server, "-m", "wandb", "sync", "--yes", *segments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert complete(server, tmp_path / "results")


def test_a_server_that_goes_away(cli: Cli, tmp_path: Path, server: Server) -> None:
    words = [*SIX, f"results_dir={tmp_path / 'results'}", f"wandb.dir={tmp_path}"]
    started = cli.start(*words, env=server.env, inject=f"{QUICK}\n{SLOW}")
    assert until(appears(tmp_path / "results", "metrics.jsonl"))
    server.kill()
    done = cli.wait(started)
    assert done.code == 0, done.err
    assert f"`python scripts/runs.py --upload {tmp_path}/results/study` uploads what is missing" in done.out
    refused = script(server, "scripts/runs.py", "--upload", str(tmp_path / "results"))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("W&B does not answer")
    assert "Traceback" not in refused.stderr
    server.start()
    assert upload(server, tmp_path / "results")[0].endswith("epochs, result")
    assert complete(server, tmp_path / "results")
    assert upload(server, tmp_path / "results") == ["1 runs, 0 of them lacked something in W&B"]
    assert server.states() == ["finished"]


def test_dashboard_on_a_server_that_refuses(server: Server) -> None:
    pytest.importorskip("wandb_workspaces")
    done = script(server, "scripts/dashboard.py", "--entity", "default")
    assert done.returncode == 1
    assert done.stderr.startswith("error: W&B: ")
    assert "Traceback" not in done.stderr
