"""Full disks, damaged files, folders that cannot be written, two processes at once."""

import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from abn_exp.errors import DamagedFile
from abn_exp.report import build as report
from abn_exp.results import find_runs, load_runs, read_metrics
from abn_exp.trained_network import load_network, read_checkpoint
from abn_exp.training.callbacks import append_line
from abn_exp.training.checkpoints import usable_checkpoint
from tests.helpers.cli import Cli, appears, until
from tests.helpers.faults import FULL, SMALL, Account, differences, on_images


def directory_of(folder: Path) -> Path:
    return next(folder.rglob("config.yaml")).parent


@pytest.fixture(scope="module")
def whole(cli: Cli, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run with its data."""
    folder = tmp_path_factory.mktemp("whole")
    done = cli.run(*on_images(images, folder), "keep=all")
    assert done.code == 0, done.err
    return folder


def in_a_sentence(err: str, *parts: str) -> bool:
    """Whether an error is told without a trace, in a line that has all the parts."""
    return "Traceback" not in err and any(all(part in line for part in parts) for line in err.splitlines())


# --- Full disk ---

# What a full disk does to one file: half of it is written, then nothing more.
FULL_DISK = """
import builtins, errno, io, os
real = builtins.open
class Full(io.FileIO):
    left = {left}
    def write(self, content):
        if len(content) > Full.left:
            super().write(bytes(content)[: Full.left])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        Full.left -= len(content)
        return super().write(content)
def opened(file, mode="r", buffering=-1, *rest, **options):
    if isinstance(file, (str, os.PathLike)) and "{name}" in str(file) and set(mode) & set("wax") and "b" in mode:
        raw = Full(file, mode.replace("b", ""))
        return raw if buffering == 0 else io.BufferedWriter(raw)
    return real(file, mode, buffering, *rest, **options)
builtins.open = io.open = opened
"""


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt", "metrics.jsonl", "result.json", "config.yaml", ".npz"])
def test_disk_full_at_one_file(
    cli: Cli, images: Path, tmp_path: Path, whole: Path, account: Account, name: str
) -> None:
    lost = []
    # At once, and for the two that are written again and again, after the first epoch.
    starts: list[int | None] = [0, 100] if FULL else [100]  # both end in the same write
    if name in ("last.ckpt", "metrics.jsonl") or FULL:
        size = sum(path.stat().st_size for path in whole.rglob(f"*{name}"))
        starts.append(size - 50)  # times in it have a digit more or less
    for left in starts:
        folder = tmp_path / str(left)
        folder.mkdir()
        done = cli.run(*on_images(images, folder), inject=FULL_DISK.format(name=name, left=left))
        if done.code != 1 or not in_a_sentence(done.err, "error: ", "No space left on device", name):
            lost.append(f"{name}, {left} bytes left: exit code {done.code}: {done.err}")
        lost += [f"{name}: left {path}" for path in folder.rglob("*.part")]
        lost += [f"{name}, {left}: {line}" for line in not_whole(folder)]
        done = cli.run(*on_images(images, folder))
        if done.code != 0:
            lost.append(f"{name}: exit code {done.code} with the disk free again: {done.err}")
        lost += differences(directory_of(whole), directory_of(folder))
    account("disk", "full disk while writing checkpoint, record, metrics, converted data", len(starts), lost)


def not_whole(folder: Path) -> list[str]:
    """Name the files under final names that are not whole."""
    bad = []
    for path in folder.rglob("*.ckpt"):
        try:
            read_checkpoint(path)
        except DamagedFile as error:
            bad.append(str(error))
    for path in folder.rglob("metrics.jsonl"):
        if len(read_metrics(path.parent)) != path.read_text().count("\n"):
            bad.append(f"{path} has half a line")
    return bad + [run.reason or "" for run in find_runs(folder) if run.status == "damaged"]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Return a function that mounts a small file system, where that is allowed."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], capture_output=True, check=False
        )
        if done.returncode != 0:
            pytest.skip("mounting is not allowed here")
        mounted.append(folder)
        return folder

    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting needs root")
    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_small_file_system(cli: Cli, images: Path, whole: Path, disk: Callable[..., Path], account: Account) -> None:
    need = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    shares = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9] if FULL else [0.1, 0.7]
    lost = []
    for share in shares:
        folder = disk(f"size={int(need * share)}")
        done = cli.run(*on_images(images, folder))
        if done.code != 1 or not in_a_sentence(done.err, "No space left on device"):
            lost.append(f"{share}: exit code {done.code}: {done.err}")
        lost += not_whole(folder)
        subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
        done = cli.run(*on_images(images, folder))
        if done.code != 0:
            lost.append(f"{share}, exit code {done.code} with room again: {done.err}")
        lost += differences(directory_of(whole), directory_of(folder))
    account("disk", "full file system (tmpfs), then room again", len(shares), lost)


def test_a_line_is_appended_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    append_line(path, "first")
    scope: dict[str, object] = {}
    with monkeypatch.context() as patch:
        import builtins
        import io

        patch.setattr(io, "open", io.open)
        patch.setattr(builtins, "open", builtins.open)
        exec(FULL_DISK.format(name="lines", left=3), scope)
        with pytest.raises(OSError, match=r"No space left on device: '.*lines'"):
            append_line(path, "second")
    assert path.read_text() == "first\n"


def test_folders_that_cannot_be_written(
    cli: Cli, tmp_path: Path, disk: Callable[..., Path], account: Account
) -> None:
    lost = []
    cases = [disk("size=1m,ro") / "results", tmp_path / "file", tmp_path / "file" / "below"]
    (tmp_path / "file").write_text("in the way")
    commands = [[f"results_dir={case}"] for case in cases] + [["-m", "seed=0,1", f"results_dir={cases[0]}"]]
    for command in commands:
        done = cli.run(*command, *SMALL, cwd=tmp_path)
        where = command[-1].split("=")[1].removesuffix("/below")
        if done.code != 1 or where not in done.err + done.out or "Traceback" in done.err + done.out:
            lost.append(f"{command}: exit code {done.code}: {done.out} {done.err}")
    account("disk", "read-only file system, a file in the way", len(commands), lost)


# --- Damaged files ---


def damage(path: Path, kind: str, seed: int = 0) -> None:
    content = bytearray(path.read_bytes())
    chance = random.Random(f"{path.name}{kind}{seed}")
    if kind == "empty":
        content = bytearray()
    elif kind == "cut":
        content = content[: chance.randrange(1, len(content))]
    elif kind == "garbage":
        content = bytearray(chance.randbytes(len(content)))
    else:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


KINDS = ["empty", "cut", "garbage", "one bit"]
# Which file is damaged, whether the run was finished, and whether the command must mend it or may refuse.
FILES = [
    ("last.ckpt", False, True),
    ("last.ckpt and the one before", False, True),
    ("best.ckpt", False, False),
    ("metrics.jsonl", False, True),
    ("config.yaml", False, False),
    ("result.json", True, True),
    ("metrics.jsonl", True, True),
    ("SHA256SUMS", True, True),
    ("config.yaml", True, False),
    ("input.json", True, True),
    ("*.npz", False, False),
]


@pytest.mark.parametrize(("name", "finished", "mended"), FILES)
def test_damaged_file(
    cli: Cli, images: Path, tmp_path: Path, whole: Path, account: Account, name: str, finished: bool, mended: bool
) -> None:
    lost = []
    cases = [(kind, seed) for kind in KINDS for seed in range(6 if FULL and kind in ("cut", "one bit") else 1)]
    if not FULL:  # all kinds of damage, over the files
        cases = [cases[-1], cases[FILES.index((name, finished, mended)) % 3]]
    for number, (kind, seed) in enumerate(cases):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        directory = directory_of(folder)
        if not finished:
            (directory / "result.json").unlink()
            (directory / "SHA256SUMS").unlink()
        for pattern in ("last.ckpt", "previous-last.ckpt") if " and " in name else (name,):
            damage(next(folder.rglob(pattern)), kind, seed)
        before = find_runs(folder)
        if finished and before[0].status != "damaged":
            lost.append(f"{kind}: it is {before[0].status}")
        done = cli.run(*on_images(images, folder))
        case = f"{name}, {'finished' if finished else 'unfinished'}, {kind} {seed}"
        if done.code == 0:
            lost += [f"{case}: {line}" for line in differences(directory_of(whole), directory_of(folder))]
            if (finished or ".ckpt" in name) and "damaged" not in done.out and kind != "one bit":
                lost.append(f"{case}: mended without a word: {done.out}")
            continue
        told = in_a_sentence(done.err, "error: ", name.removeprefix("*"))
        if name == "config.yaml":  # one bit can make another configuration of it
            told = told or in_a_sentence(done.err, "error: ", "another configuration")
        if mended or done.code != 1 or not told:
            lost.append(f"{case}: exit code {done.code}: {done.err}")
    state = "a finished" if finished else "an unfinished"
    account("damage", f"{name} of {state} run: empty, cut, garbage, one bit", len(cases), lost)


def test_every_flipped_bit_of_a_checkpoint_is_found_or_harmless(
    whole: Path, tmp_path: Path, account: Account
) -> None:
    source = next(whole.rglob("best.ckpt"))
    content = source.read_bytes()
    expected = read_checkpoint(source)["state_dict"]
    chance, lost = random.Random(0), []
    # Half of them in the archive's own tables, where nothing has a checksum.
    ends = [*range(400), *range(len(content) - 3000, len(content))]
    places = [chance.choice(ends) if i % 2 else chance.randrange(len(content)) for i in range(3000 if FULL else 150)]
    found = 0
    for place in places:
        flipped = bytearray(content)
        flipped[place] ^= 1 << chance.randrange(8)
        (tmp_path / "last.ckpt").write_bytes(flipped)
        try:
            state = read_checkpoint(tmp_path / "last.ckpt")["state_dict"]
        except DamagedFile as error:
            found += 1
            if not re.match(r".*last\.ckpt is damaged: [^\n]+$", str(error)):
                lost.append(f"byte {place}: {error}")
        else:
            if state.keys() != expected.keys() or any(not state[key].equal(expected[key]) for key in expected):
                lost.append(f"byte {place}: other weights")
    assert found > len(places) / 3
    account("damage", "one flipped bit of a checkpoint: found, or the same weights", len(places), lost)


def test_an_older_checkpoint_is_used_and_a_newer_is_not_invented(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(directory_of(whole) / "checkpoints", tmp_path / "c")
    last, before = tmp_path / "c" / "last.ckpt", tmp_path / "c" / "previous-last.ckpt"
    assert usable_checkpoint(last) == last
    damage(last, "cut")
    assert usable_checkpoint(last) == before
    damage(before, "cut")
    assert usable_checkpoint(last) is None


def test_a_damaged_run_does_not_end_the_report(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, account: Account
) -> None:
    monkeypatch.setattr(report, "draw", lambda _: {})
    results = tmp_path / "results"
    shutil.copytree(whole / "results", results)
    seed = directory_of(results)
    names = ["result.json", "metrics.jsonl", "config.yaml", "SHA256SUMS"]
    kinds = [(name, kind) for name in names for kind in KINDS]
    for number, (name, kind) in enumerate(kinds, 1):
        shutil.copytree(seed, seed.with_name(f"seed-{number}"))
        damage(seed.with_name(f"seed-{number}") / name, kind)
    (seed.with_name("seed-of-nothing")).mkdir()
    report.write_report(results / "runs")
    text = (results / "runs" / "report.md").read_text()
    lost = [f"{kind} {name} is not in the report" for name, kind in kinds if f"{name} is damaged" not in text]
    with caplog.at_level("WARNING"):
        assert len(load_runs(results)) == 1
    assert caplog.text.count("left out") == len(kinds)
    # The first of a cell may be the damaged one.
    damage(seed / "config.yaml", "garbage")
    report.write_report(results / "runs")
    account(
        "damage", "a damaged run among others: shown with its reason, the report is written", len(kinds) + 1, lost
    )


def test_a_network_of_another_configuration_is_refused(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(directory_of(whole), tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("width: 0.0625", "width: 0.125"))
    with pytest.raises(DamagedFile, match=r"last\.ckpt is damaged: it does not fit the network in config\.yaml"):
        load_network(tmp_path / "run")


# --- Two at once ---


def test_two_processes_on_one_run(cli: Cli, tmp_path: Path, account: Account) -> None:
    words = [*SMALL, "recipe.epochs=5000", f"results_dir={tmp_path}"]
    first = cli.start(*words)
    assert until(appears(tmp_path, "last.ckpt")), first.err.read_text()
    lost = []
    for more in ([], ["force=true"]):
        second = cli.run(*words, *more)
        if second.code != 1 or not in_a_sentence(second.err, "error: ", "is being written by another process"):
            lost.append(f"{more}: exit code {second.code}: {second.err}")
    os.kill(first.pid, signal.SIGKILL)
    cli.wait(first)
    assert not_whole(tmp_path) == []
    account("two at once", "two processes on one run: the second refuses", 2, lost)


def test_two_processes_on_one_data_set(cli: Cli, images: Path, tmp_path: Path, account: Account) -> None:
    slow = (
        "import time, abn_exp.data.prepare as p; real = p._check\np._check = lambda *a: (time.sleep(0.5), real(*a))"
    )
    words = on_images(images, tmp_path)
    started = [cli.start(*words, f"seed={seed}", inject=slow) for seed in range(3)]
    done = [cli.wait(one) for one in started]
    lost = [one.err for one in done if one.code != 0]
    if sum("Decoding" in one.out for one in done) != 1 or len(list((tmp_path / "data").glob("*.npz"))) != 1:
        lost.append("more than one converted")
    account("two at once", "three processes on one data set: one converts, the others wait", 3, lost)
