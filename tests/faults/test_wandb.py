"""Whatever W&B does, the run is not kept waiting for more than a minute, ends, and its record is complete."""

import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.faults.conftest import FULL, SMALL, Account, Cli, differences

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
