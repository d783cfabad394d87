"""Files that do harm: bombs, broken headers, pickles that execute something; and a command that meets one."""

import io
import os
import pickle
import re
import shutil
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from tests.helpers.cli import Cli, Done
from tests.helpers.datasets import CIFAR10_NAMES, pixels, python2_pickle
from tests.helpers.faults import on_images


def cifar10(member: tarfile.TarInfo | None = None, **change: bytes) -> bytes:
    """Return a small CIFAR-10 archive with a member more, or with other contents of its members."""
    batch = {b"data": pixels(10).reshape(10, -1), b"labels": list(range(10))}
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    members = {name: python2_pickle(batch) for name in names}
    members["batches.meta"] = python2_pickle({b"label_names": CIFAR10_NAMES})
    members |= {key.replace("batches_meta", "batches.meta"): content for key, content in change.items()}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=1) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        if member is not None:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return stream.getvalue()


def encoded(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def bomb_png(side: int) -> bytes:
    """Return a PNG that claims to be side x side black pixels; the pixels themselves are never asked for."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(9999))), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def npy(descr: str, shape: str, content: bytes = b"") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


class Calls:
    """What a pickle makes of it: a call."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[object, ...]:
        return self.call, self.arguments


def checkpoint_of(pickled: bytes) -> bytes:
    """Return a checkpoint in torch's format, a zip archive, with this pickle as its index."""
    stream, out = io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": {}}, stream)
    with zipfile.ZipFile(stream) as source, zipfile.ZipFile(out, "w") as target:
        for member in source.infolist():
            target.writestr(member.filename, pickled if member.filename.endswith("data.pkl") else source.read(member))
    return out.getvalue()


def payloads(marker: Path) -> dict[str, bytes]:
    """Return pickles each of which makes the folder `marker` when it is unpickled."""
    make = f"import os; os.mkdir({str(marker)!r})"
    plain = pickle.dumps(Calls(os.mkdir, str(marker)))
    line = str(marker).encode()
    return {
        "os.mkdir": pickle.dumps({"state_dict": {"w": Calls(os.mkdir, str(marker))}}, protocol=2),
        "os.mkdir by a name on the stack": plain,
        "os.system": pickle.dumps(Calls(os.system, f"mkdir {marker}"), protocol=0),
        "builtins.exec": pickle.dumps([Calls(exec, make)], protocol=2),
        "builtins.eval": pickle.dumps(Calls(eval, f"__import__('os').mkdir({str(marker)!r})"), protocol=5),
        "subprocess": pickle.dumps(Calls(subprocess.check_call, ["mkdir", str(marker)])),
        "a pickle in a pickle": pickle.dumps(Calls(pickle.loads, plain)),
        "torch.storage": pickle.dumps(Calls(torch.storage._load_from_bytes, checkpoint_of(plain)), protocol=2),
        "an INST opcode": b"(S'" + line + b"'\nios\nmkdir\n.",
        "an OBJ opcode": b"(cos\nmkdir\nS'" + line + b"'\no.",
    }


def outside(outer: Path, inner: Path) -> list[str]:
    return sorted(str(path) for path in outer.rglob("*") if not path.is_relative_to(inner))


def directory_of(folder: Path) -> Path:
    return next(folder.rglob("config.yaml")).parent


class Case:
    """A folder with something hostile in it, and a command that meets it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "inner" / "case"
        self.root, self.outer, self.marker = self.folder / "data", folder, folder / "marker"
        self.root.mkdir(parents=True)
        self.words: list[str] = []
        self.inject, self.said, self.code = "", "", 1

    def on(self, name: str, said: str) -> "Case":
        """Let the command read this data set from `root`."""
        self.words = [f"dataset={name}", f"dataset.root={self.root}", "dataset.download=false", "model.width=0.0625"]
        self.words += ["recipe.epochs=1", "recipe.batch_size=4", f"results_dir={self.folder / 'results'}"]
        if name == "tinyimagenet":
            self.words.append("dataset.num_classes=3")
        self.said = said
        return self

    def of_run(self, whole: Path, finished: bool = False) -> Path:
        """Let the command go on with a copy of a run; return its directory."""
        shutil.copytree(whole, self.folder, dirs_exist_ok=True)
        directory = directory_of(self.folder)
        if not finished:
            (directory / "result.json").unlink()
        self.words = on_images(whole.parent / "images", self.folder)
        return directory

    def meet(self, cli: Cli) -> tuple[Done, list[str]]:
        """Give the command; return what it did and what is wrong with that."""
        before, notes = outside(self.outer, self.folder), self.outer.parent / f"{self.outer.name}-notes"
        watch = (
            f"from tests.helpers.guard import watch_process; watch_process({str(self.folder)!r}, {str(notes)!r})\n"
        )
        done = cli.run(*self.words, inject=watch + self.inject, cwd=self.folder)
        text = done.err + done.out
        wrong = [f"it did: {line}" for line in notes.read_text().splitlines()]
        if self.marker.exists() or outside(self.outer, self.folder) != before:
            wrong.append(f"written outside: {set(outside(self.outer, self.folder)) ^ set(before)}")
        if "Traceback" in text or done.code != self.code:
            wrong.append(f"exit code {done.code}: {text[-1500:]}")
        elif self.code and not is_a_sentence(done.err, self.said):
            wrong.append(f"it does not say {self.said!r} in a line: {done.err!r}")
        elif self.said not in text:
            wrong.append(f"it does not say {self.said!r}: {text}")
        if any(not (c.isprintable() or c in "\n\r\t") for c in done.err):
            wrong.append(f"it sends to the terminal: {done.err!r}")
        return done, wrong


def is_a_sentence(err: str, said: str) -> bool:
    """Whether an error is told in one line, beside Lightning's and torch's own warnings of a moved or odd file."""
    lines = [line for line in err.splitlines() if not re.match(r"  |.*\.py:\d+: ", line)]
    return len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]
