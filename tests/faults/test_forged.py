"""Runs from strangers: checkpoints and configurations that are pickles, records that are forged.

Refused in words or made again; nothing is written outside the folder at hand, and nothing in a file is executed.
"""

import ast
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from abn_exp.trained_network import read_checkpoint
from tests.helpers.cli import Cli
from tests.helpers.faults import FULL, Account, differences, on_images
from tests.helpers.hostile import Case, checkpoint_of, directory_of, payloads
from tests.helpers.runs import REPOSITORY


@pytest.fixture(scope="module")
def whole(cli: Cli, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run with its data, beside its images."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(images, folder / "images")
    done = cli.run(*on_images(folder / "images", folder / "run"), "keep=all")
    assert done.code == 0, done.err
    return folder / "run"


CALL = "!!python/object/apply:pickle.loads [!!python/bytes {}]\n"
IN_RUN: dict[str, Callable[[bytes], bytes]] = {
    "last.ckpt": bytes,
    "last.ckpt, in torch's archive": checkpoint_of,
    "best.ckpt": bytes,
    "best.ckpt, in torch's archive": checkpoint_of,
    "config.yaml": lambda pickled: (
        b"!!python/object/apply:pickle.loads [!!python/bytes %s]\n" % pickled.hex().encode()
    ),
}


@pytest.mark.parametrize("place", IN_RUN)
def test_a_pickle_in_a_run_is_not_executed(
    cli: Cli, whole: Path, tmp_path: Path, account: Account, place: str
) -> None:
    number, name = list(IN_RUN).index(place), place.split(",")[0]
    kinds = list(payloads(tmp_path))
    for kind in kinds if FULL else [kinds[number]]:
        case = Case(tmp_path / kind.replace(" ", "-"))
        directory = case.of_run(whole)
        path = directory / name if name == "config.yaml" else directory / "checkpoints" / name
        path.write_bytes(IN_RUN[place](payloads(case.marker)[kind]))
        if name == "config.yaml":
            with path.open("a") as file:
                file.write(f"a: !!python/object/apply:os.mkdir [{case.marker}]\n")
            case.said = "config.yaml is damaged"
        else:
            case.said = f"{name} is damaged: it is not a whole checkpoint of weights"
        case.code = 0 if name == "last.ckpt" else 1  # the one before it is there, and is gone on from
        wrong = case.meet(cli)[1]
        if not wrong and case.code == 0:
            wrong = differences(directory_of(whole), directory)
        what = "weights" if ".ckpt" in name else "data, images, configuration"
        account(
            "hostile", f"a pickle that executes code in place of {what}", 1, [f"{kind}: {line}" for line in wrong]
        )


def test_a_checkpoint_that_names_other_peoples_files(cli: Cli, whole: Path, tmp_path: Path, account: Account) -> None:
    """Lightning keeps in a checkpoint which file is to be removed for the next best one."""
    lost, victims = [], ["file", "folder"]
    for victim in victims:
        case = Case(tmp_path / victim)
        path = case.outer / "precious" / victim
        (path / "inside" if victim == "folder" else path.parent).mkdir(parents=True)
        if victim == "file":
            path.touch()
        folder = case.of_run(whole) / "checkpoints"
        last = read_checkpoint(folder / "previous-last.ckpt")
        named = f"{folder}/{os.path.relpath(path, folder)}"
        for state in last["callbacks"].values():
            if "best_model_path" in state:
                state |= {"dirpath": str(folder), "kth_best_model_path": named, "best_model_path": named}
                state |= {"best_k_models": {named: torch.tensor(-1.0)}, "kth_value": torch.tensor(-1.0)}
        torch.save(last, folder / "last.ckpt")
        case.code = 0
        lost += [f"{victim}: {line}" for line in case.meet(cli)[1]]
        if not path.exists():
            lost.append(f"{victim}: removed")
    account("hostile", "a checkpoint that has other people's files removed", len(victims), lost)


# What a forged record says, in which file; the exit code, and what the command says.
RECORDS: dict[str, tuple[str, dict[str, Any] | str, int, str]] = {
    "an accuracy that is text": ("result.json", {"test_acc": "99 %"}, 0, "is damaged"),
    "an accuracy that is no number": ("result.json", {"test_acc": float("nan")}, 0, "is damaged"),
    "a seed that is a list": ("result.json", {"seed": [0]}, 0, "is damaged"),
    "brackets a hundred thousand deep": ("result.json", "[" * 10**5, 0, "is damaged"),
    "a number of 5000 digits": ("result.json", '{"schema": ' + "9" * 5000 + "}", 0, "is damaged"),
    "brackets in the metrics": ("metrics.jsonl", "[" * 10**5 + "\n{}\n", 0, ""),
    "a configuration that is brackets": ("config.yaml", "[" * 10**4, 1, "is damaged"),
    "a configuration that is a name": ("config.yaml", "\x1b[2J", 1, "is damaged"),
    "a run of W&B that is a path": ("wandb-run-id", "../../../evil", 0, "going on without it"),
}
SHORT = ("a seed that is a list", "a configuration that is brackets", "a run of W&B that is a path")


@pytest.mark.parametrize("kind", RECORDS if FULL else SHORT)
def test_forged_records(cli: Cli, whole: Path, tmp_path: Path, account: Account, kind: str) -> None:
    """A record without checksums, from elsewhere: it is made again, or refused, never believed and never a trace."""
    case = Case(tmp_path / "case")
    name, content, case.code, case.said = RECORDS[kind]
    directory = case.of_run(whole, finished=name != "wandb-run-id")
    (directory / "SHA256SUMS").unlink()
    if isinstance(content, dict):
        content = json.dumps(json.loads((directory / name).read_text()) | content)
    (directory / name).write_text(content)
    if name == "wandb-run-id":
        case.inject = f"import os; os.environ['WANDB_MODE'] = 'offline'; os.chdir({str(case.folder)!r})\n"
    account("hostile", "records with forged types, depths, names", 1, case.meet(cli)[1])


# --- The source ---


def unsafe_calls(source: str) -> Iterator[str]:
    """Name the calls by which bytes of a file could become code, and the imports that would hide them."""
    shady = {"pickle", "cPickle", "_pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.ImportFrom)
            and node.module in (*shady, "torch")
            and node.names[0].name.startswith("load")
        ):
            yield f"line {node.lineno}: from {node.module} import {node.names[0].name}"
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        module, _, attribute = name.rpartition(".")
        bad = (
            (name == "torch.load" and keywords.get("weights_only") != "True")
            or (module in shady and attribute in ("load", "loads", "Unpickler", "open"))
            or (attribute == "load_from_checkpoint")
            or (name in ("eval", "exec", "os.system", "os.popen", "tarfile.extractall", "shutil.unpack_archive"))
            or (attribute in ("extract", "extractall"))
            or (
                module in ("np", "numpy") and attribute == "load" and keywords.get("allow_pickle", "False") != "False"
            )
            or (attribute == "read_array" and keywords.get("allow_pickle") != "False")
            or (name == "yaml.load" and [ast.unparse(argument) for argument in node.args[1:]] != ["SafeLoader"])
            or (attribute in ("unsafe_load", "full_load"))
            or keywords.get("shell") == "True"
        )
        if bad:
            yield f"line {node.lineno}: {ast.unparse(node)[:80]}"


def test_the_source_unpickles_nothing(account: Account) -> None:
    planted = ["torch.load(x)", "torch.load(x, weights_only=False)", "pickle.load(f)", "from torch import load"]
    planted += ["from pickle import loads", "np.load(f, allow_pickle=True)", "yaml.load(f)", "yaml.load(f, Loader)"]
    planted += ["tar.extractall()"]
    assert all(list(unsafe_calls(line)) for line in planted)
    assert not list(unsafe_calls("torch.load(x, weights_only=True); json.load(f); np.load(f)"))
    files = [REPOSITORY / "train.py", *(REPOSITORY / "scripts").rglob("*.py"), *(REPOSITORY / "src").rglob("*.py")]
    assert len(files) > 20
    found = {path.name: list(unsafe_calls(path.read_text(encoding="utf-8"))) for path in files}
    lost = [f"{name}, {line}" for name, lines in found.items() for line in lines]
    account(
        "hostile", "source files: torch.load with weights only, no pickle, no unpacking to disk", len(files), lost
    )
