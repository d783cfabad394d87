"""Files from strangers: archives, images, pickles in the place of weights.

Refused in words; nothing is written outside the command's own folders, and nothing in them is executed.
"""

import ast
import hashlib
import io
import json
import os
import pickle
import random
import re
import shutil
import stat
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from abn_exp.data.readers import read_tinyimagenet
from abn_exp.results import read_checkpoint
from tests.helpers.cli import Cli, Done
from tests.helpers.datasets import CIFAR10_NAMES, jpeg, pixels, python2_pickle, tinyimagenet_members, write_zip
from tests.helpers.faults import FULL, Account, differences, on_images
from tests.helpers.runs import REPOSITORY

# Notes every program that is started, every connection, and every change of a file outside the folders of the case.
GUARD = """
import atexit, os, sys
over = []
atexit.register(over.append, True)  # what the process cleans up at its end was there before
inside, notes = {inside!r}, os.open({notes!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def outside(path):
    if isinstance(path, int):
        return False
    path = os.path.abspath(os.fsdecode(path))
    return path != inside and not path.startswith((inside + "/", "/dev/null", "/dev/shm/", "/proc/self/"))
def hook(event, args):
    bad = event in ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "socket.connect", "pty.spawn")
    if event == "subprocess.Popen":
        bad = "git" not in os.path.basename(os.fsdecode(args[0]))  # whose commit a record holds
    elif event == "open":
        mode, flags = args[1], args[2]
        writes = set(mode) & set("wax+") if isinstance(mode, str) else flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        bad = bool(writes) and outside(args[0])
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.chown", "shutil.rmtree"):
        bad = outside(args[0])
    elif event in ("os.rename", "os.link", "os.symlink"):
        bad = outside(args[1]) or (event == "os.rename" and outside(args[0]))
    if bad and not over:
        os.write(notes, (event + " " + repr(args)[:300] + "\\n").encode())
sys.addaudithook(hook)
"""
CATALOGUED = """
from dataclasses import replace
from abn_exp.data.catalog import CATALOG
CATALOG[{name!r}] = replace(CATALOG[{name!r}], **{facts!r})
"""


class Case:
    """A folder with one hostile thing in it, and a command that meets it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "inner" / "case"  # what leaves it by ../.. is still below the test's own folder
        self.folder.mkdir(parents=True)
        self.root, self.marker = self.folder / "data", folder / "marker"
        self.root.mkdir()
        self.outer = folder
        self.words: list[str] = []
        self.inject = ""
        self.code, self.fresh = 1, False
        self.said = ""

    def tree(self) -> list[str]:
        return sorted(str(path) for path in self.outer.rglob("*") if not path.is_relative_to(self.folder))

    def on(self, name: str, said: str = "", **facts: Any) -> "Case":
        """Let the command read this data set from `root`; its catalogued facts can be others."""
        self.fresh = not (self.root / f"{name}.npz").exists()
        self.words = [f"dataset={name}", f"dataset.root={self.root}", "dataset.download=false", "model.width=0.0625"]
        self.words += ["recipe.epochs=1", "recipe.batch_size=4", f"results_dir={self.folder / 'results'}"]
        if name == "tinyimagenet":
            self.words.append("dataset.num_classes=3")
        self.inject, self.said = CATALOGUED.format(name=name, facts=facts), said
        return self

    def meet(self, cli: Cli) -> tuple[Done, list[str]]:
        """Give the command; return what it did and what is wrong with that."""
        before, notes = self.tree(), self.outer.parent / f"{self.outer.name}-notes"
        guard = GUARD.format(inside=str(self.folder), notes=str(notes))
        done = cli.run(*self.words, inject=self.inject + guard, cwd=self.folder)
        text = done.err + done.out
        wrong = [f"it did: {line}" for line in notes.read_text().splitlines()]
        if self.marker.exists() or self.tree() != before:
            wrong.append(f"written outside: {set(self.tree()) ^ set(before)}")
        if "Traceback" in text or done.code != self.code:
            wrong.append(f"exit code {done.code}: {text[-1500:]}")
        elif self.code and not is_a_sentence(done.err, self.said):
            wrong.append(f"it does not say {self.said!r} in a line: {done.err!r}")
        elif self.said not in text:
            wrong.append(f"it does not say {self.said!r}: {text}")
        if any(not (c.isprintable() or c in "\n\r\t") for c in done.err):
            wrong.append(f"it sends to the terminal: {done.err!r}")
        if self.fresh and list(self.root.glob("*.npz*")):
            wrong.append("it was converted")
        return done, wrong


def is_a_sentence(err: str, said: str) -> bool:
    """Whether an error is told in one line, beside Lightning's and torch's own warnings of a moved or odd file."""
    lines = [line for line in err.splitlines() if not re.match(r"  |.*\.py:\d+: ", line)]
    return len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0]


def share_of(cases: list[Any], short: int) -> list[Any]:
    return cases if FULL else random.Random(0).sample(cases, min(short, len(cases)))


# --- Archives ---


def cifar10(extra: list[tuple[tarfile.TarInfo, bytes]], **change: bytes) -> bytes:
    """Return a small CIFAR-10 archive with other contents of its members, and with more members."""
    batch = {b"data": pixels(10).reshape(10, -1), b"labels": list(range(10))}
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    members = {name: python2_pickle(batch) for name in names}
    members["batches.meta"] = python2_pickle({b"label_names": CIFAR10_NAMES})
    members |= {key.replace("batches_meta", "batches.meta"): content for key, content in change.items()}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=9) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for info, content in extra:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def tar_members(outer: Path) -> dict[str, tuple[tarfile.TarInfo, bytes]]:
    """Return members that no archive should have."""

    def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", content: bytes = b"") -> Any:
        info = tarfile.TarInfo(name)
        info.type, info.linkname, info.mode = kind, link, 0o7777
        return info, content

    return {
        "a path upwards": member("../../evil", content=b"x"),
        "a path up from inside": member("cifar-10-batches-py/../../../evil", content=b"x"),
        "an absolute path": member(f"{outer}/evil", content=b"x"),
        "a path with backslashes": member("..\\..\\evil", content=b"x"),
        "a name that commands a terminal": member("\x1b]0;evil\x07\x1b[2J\nerror: all is well", content=b"x"),
        "a symlink upwards": member("cifar-10-batches-py/data_batch_1", tarfile.SYMTYPE, "../../../evil"),
        "an absolute symlink": member("cifar-10-batches-py/up", tarfile.SYMTYPE, str(outer)),
        "a symlink to itself": member("cifar-10-batches-py/test_batch", tarfile.SYMTYPE, "test_batch"),
        "a hard link upwards": member("cifar-10-batches-py/data_batch_1", tarfile.LNKTYPE, "../../../etc/passwd"),
        "a hard link to itself": member("cifar-10-batches-py/a", tarfile.LNKTYPE, "cifar-10-batches-py/a"),
        "a character device": member("cifar-10-batches-py/zero", tarfile.CHRTYPE),
        "a block device": member("cifar-10-batches-py/sda", tarfile.BLKTYPE),
        "a pipe": member("cifar-10-batches-py/data_batch_2", tarfile.FIFOTYPE),
        "a bomb of a thousand times its size": member("cifar-10-batches-py/readme", content=bytes(200 * 2**20)),
    }


def test_archives_of_cifar(cli: Cli, tmp_path: Path, account: Account) -> None:
    """Each is tried with the wrong checksum, which is enough, and as if the publisher's own were like this."""
    lost, tried = [], 0
    for number, kind in enumerate(share_of(list(tar_members(tmp_path)), 4)):
        for known in (False, True) if FULL else (True,):
            case = Case(tmp_path / f"{number}{known}")
            content = cifar10([tar_members(case.outer)[kind]])
            (case.root / "cifar-10-python.tar.gz").write_bytes(content)
            facts = {"md5": hashlib.md5(content).hexdigest()} if known else {}
            case.on("cifar10", "get the original" if known else "is not the original: its md5 is", **facts)
            lost += [f"{kind}: {line}" for line in case.meet(cli)[1]]
            tried += 1
    account("hostile", "CIFAR archive: paths upwards, absolute, links, devices, pipe, bomb", tried, lost)

    broken = {"cut": content[:-50], "empty": b"", "garbage": random.Random(0).randbytes(9999), "a page": b"<html/>"}
    broken["one bit"] = bytes([*content[:99], content[99] ^ 1, *content[100:]])
    lost, tried = [], 0
    for kind, content in share_of(list(broken.items()), 2):
        for known in (False, True):
            case = Case(tmp_path / f"{kind}{known}")
            (case.root / "cifar-10-python.tar.gz").write_bytes(content)
            facts = {"md5": hashlib.md5(content).hexdigest()} if known else {}
            case.on("cifar10", "cannot be read" if known else "is not the original: its md5 is", **facts)
            lost += [f"{kind}: {line}" for line in case.meet(cli)[1]]
            tried += 1
    account("hostile", "CIFAR archive: wrong checksum, cut, empty, garbage, one bit, a web page", tried, lost)


def zip_entry(name: str, kind: int = stat.S_IFREG, content: bytes = b"x") -> tuple[zipfile.ZipInfo, bytes]:
    info = zipfile.ZipInfo(name)
    info.external_attr, info.create_system, info.compress_type = (kind | 0o7777) << 16, 3, zipfile.ZIP_DEFLATED
    return info, content


def zip_members(outer: Path) -> dict[str, tuple[zipfile.ZipInfo, bytes]]:
    top, photo = "tiny-imagenet-200", jpeg(np.zeros((64, 64), np.uint8))
    return {
        "a path upwards": zip_entry("../../evil"),
        "an image by a path upwards": zip_entry("../../train/n01/images/evil.JPEG", content=photo),
        "an absolute path": zip_entry(f"{outer}/train/n01/images/evil.JPEG", content=photo),
        "a path with backslashes": zip_entry("..\\..\\evil"),
        "a name that commands a terminal": zip_entry(f"{top}/train/n01/images/\x1b[2J\nerror: fine.JPEG"),
        "a symlink": zip_entry(f"{top}/train/n01/images/up.JPEG", stat.S_IFLNK, b"../../../../etc/passwd"),
        "a character device": zip_entry(f"{top}/zero", stat.S_IFCHR, b""),
        "a block device": zip_entry(f"{top}/sda", stat.S_IFBLK, b""),
        "a pipe": zip_entry(f"{top}/pipe", stat.S_IFIFO, b""),
        "a socket": zip_entry(f"{top}/socket", stat.S_IFSOCK, b""),
        "a bomb of a thousand times its size": zip_entry(f"{top}/bomb", content=bytes(200 * 2**20)),
        "a bomb as an image": zip_entry(f"{top}/train/n01/images/bomb.JPEG", content=bytes(200 * 2**20)),
    }


def forged(content: bytes) -> bytes:
    """Return a zip whose largest member claims to take up as much room packed as it does unpacked."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    sizes = [n.to_bytes(4, "little") for n in (largest.compress_size, largest.file_size)]
    assert content.count(b"".join(sizes)) == 2
    return content.replace(b"".join(sizes), sizes[1] * 2)


def tiny_zip(file: Path, entry: tuple[zipfile.ZipInfo, bytes]) -> None:
    write_zip(file, tinyimagenet_members())
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr(*entry)


WRONG_IMAGES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "wrong size": ("64 x 65 pixels", lambda: jpeg(np.zeros((65, 64), np.uint8))),
    "one pixel": ("1 x 1 pixels", lambda: jpeg(np.zeros((1, 1), np.uint8))),
    "16 bits": ("more than 8 bits", lambda: encoded(Image.fromarray(np.zeros((64, 64), np.uint16)), "PNG")),
    "floats": ("more than 8 bits", lambda: encoded(Image.fromarray(np.zeros((64, 64), np.float32)), "TIFF")),
    "bomb": ("pixels", lambda: bomb_png(12_000)),
    "larger bomb": ("is not a readable image", lambda: bomb_png(60_000)),
    "text": ("is not a readable image", lambda: b"not an image"),
    "empty": ("is not a readable image", lambda: b""),
    "cut": ("is not a readable image", lambda: jpeg(np.full((64, 64), 9, np.uint8))[:300]),
    "postscript": (
        "is not a readable image",
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n",
    ),
    "vector drawing": ("is not a readable image", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "pickle": ("is not a readable image", lambda: pickle.dumps(print)),
}


def encoded(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def bomb_png(side: int) -> bytes:
    """Return a PNG that claims to be side x side black pixels; the pixels themselves are never asked for."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(9999)))
        + chunk(b"IEND", b"")
    )


def test_archives_of_tinyimagenet(cli: Cli, tmp_path: Path, account: Account) -> None:
    lost, kinds = [], share_of(list(zip_members(tmp_path)), 4)
    for kind in [*kinds, "a bomb that hides its size"]:
        case = Case(tmp_path / kind.replace(" ", "-"))
        file = case.root / "tiny-imagenet-200.zip"
        tiny_zip(
            file, zip_members(case.outer).get(kind, zip_members(case.outer)["a bomb of a thousand times its size"])
        )
        if kind == "a bomb that hides its size":
            file.write_bytes(forged(file.read_bytes()))
        lost += [f"{kind}: {line}" for line in case.on("tinyimagenet", "get the original").meet(cli)[1]]
    account("hostile", "TinyImageNet archive: paths upwards, absolute, links, devices, bombs", len(kinds) + 1, lost)

    lost, top = [], "tiny-imagenet-200/"
    wrong = [(name, f"{top}train/n01/images/x.JPEG", make(), said) for name, (said, make) in WRONG_IMAGES.items()]
    note = f"{top}val/val_annotations.txt"
    wrong += [
        (
            "a class too many",
            f"{top}train/n04/images/x.JPEG",
            jpeg(np.zeros((64, 64), np.uint8)),
            "4 classes instead",
        ),
        ("an unknown test image", f"{top}val/images/x.JPEG", b"", "does not say what"),
        ("a box of 2**99 pixels", note, b"val_0.JPEG\tn01\t0\t0\t1\t%d" % 2**99, "is not inside the image"),
        ("a box outside", note, b"val_0.JPEG\tn01\t0\t-9\t1\t1", "is not inside the image"),
        ("a number of 5000 digits", note, b"val_0.JPEG\tn01\t0\t0\t1\t" + b"9" * 5000, "line 1 is not FILE CLASS"),
        ("bytes that are no text", note, b"\xff\xfe\x00", "can't decode"),
    ]
    wrong = share_of(wrong, 4)
    for number, (kind, name, content, said) in enumerate(wrong):
        case = Case(tmp_path / f"wrong-{number}")
        write_zip(case.root / "tiny-imagenet-200.zip", tinyimagenet_members() | {name: content})
        lost += [f"{kind}: {line}" for line in case.on("tinyimagenet", said).meet(cli)[1]]
    account("hostile", "TinyImageNet archive: images of wrong size, mode, count, bombs, no images", len(wrong), lost)


def test_one_flipped_bit_of_an_archive_is_found_or_harmless(tmp_path: Path, account: Account) -> None:
    """A part of TinyImageNet has no checksum of its own: the archive's have to do."""
    file, chance, lost = tmp_path / "tiny-imagenet-200.zip", random.Random(0), []
    write_zip(file, tinyimagenet_members())
    content, whole = file.read_bytes(), read_tinyimagenet(file)
    count = 2000 if FULL else 60
    for _ in range(count):
        flipped, place = bytearray(content), chance.randrange(len(content))
        flipped[place] ^= 1 << chance.randrange(8)
        file.write_bytes(flipped)
        try:
            arrays = read_tinyimagenet(file)
        except ValueError as error:
            if str(file) not in str(error) or "\n" in str(error):
                lost.append(f"byte {place}: {error}")
        except Exception as error:
            lost.append(f"byte {place}: {type(error).__name__}: {error}")
        else:
            if any(not np.array_equal(arrays[key], whole[key]) for key in whole):
                lost.append(f"byte {place}: other images")
    account("hostile", "TinyImageNet archive: one flipped bit is found, or the same images", count, lost)


# --- Image folders ---


def test_image_folders(cli: Cli, images: Path, tmp_path: Path, account: Account) -> None:
    def put(name: str, content: bytes) -> Callable[[Path], object]:
        return lambda folder: (folder / "train" / "ant" / name).write_bytes(content)

    readable = {"wrong size", "one pixel"}  # they are scaled
    wrong: dict[str, tuple[str, Callable[[Path], object]]] = {
        kind: (said, put("x.png", make())) for kind, (said, make) in WRONG_IMAGES.items() if kind not in readable
    }
    ant = ("train", "ant")
    wrong |= {
        "a pipe": ("is not a file", lambda folder: os.mkfifo(folder.joinpath(*ant, "x.png"))),
        "a link to a device": ("is not a file", lambda folder: folder.joinpath(*ant, "x").symlink_to("/dev/zero")),
        "a link to itself": (
            "Too many levels of symbolic links",
            lambda folder: folder.joinpath(*ant, "x").symlink_to("x"),
        ),
        "a link to no image": (
            "is not a readable image",
            lambda folder: folder.joinpath(*ant, "x").symlink_to("/etc/passwd"),
        ),
        "a folder as an image": ("is not a file", lambda folder: folder.joinpath(*ant, "x.png").mkdir()),
        "a name that commands a terminal": ("is not a readable image", put("\x1b[2J\nerror: fine", b"")),
        "a name that is no text": ("is not a readable image", put("\udcff", b"")),
        "a class too many": (
            "but only test has 'cat'",
            lambda folder: shutil.copytree(folder / "test" / "ant", folder / "test" / "cat"),
        ),
        "an empty class": ("is empty", lambda folder: (folder / "train" / "cat").mkdir()),
    }
    lost, kinds = [], share_of(list(wrong), 5)
    for number, kind in enumerate(kinds):
        case = Case(tmp_path / str(number))
        shutil.copytree(images, case.folder / "images")
        case.said = wrong[kind][0]
        wrong[kind][1](case.folder / "images")
        case.words = on_images(case.folder / "images", case.folder)
        lost += [f"{kind}: {line}" for line in case.meet(cli)[1]]
    account(
        "hostile", "image folder: bombs, no images, pipes, links, names that command a terminal", len(kinds), lost
    )


def test_the_largest_images_that_are_allowed_are_decoded_one_at_a_time(
    cli: Cli, images: Path, tmp_path: Path, account: Account
) -> None:
    count, side = 8 if FULL else 4, 9_000
    shutil.copytree(images, tmp_path / "images")
    content = encoded(Image.new("L", (side, side)), "PNG")
    assert side * side > 500 * len(content)
    for number in range(count):
        (tmp_path / "images" / "train" / "ant" / f"{number}.png").write_bytes(content)
    peak = "import os, resource, atexit, concurrent.futures as c; c.ThreadPoolExecutor.__init__.__defaults__\n"
    peak += "real = c.ThreadPoolExecutor.__init__\n"
    peak += f"c.ThreadPoolExecutor.__init__ = lambda self, *a, **k: real(self, {count})\n"
    peak += "import abn_exp.data.readers as s; s.CHUNK = 1\n"
    peak += "rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; before = rss()\n"
    peak += f"atexit.register(lambda: open({str(tmp_path / 'peak')!r}, 'w').write(str((rss() - before) * 1024)))"
    done = cli.run(*on_images(tmp_path / "images", tmp_path), inject=peak)
    assert done.code == 0, done.err
    bytes_each = 4 * side * side + side * side  # as colours and as they were
    grown = int((tmp_path / "peak").read_text())
    lost = [] if grown < 1.5 * bytes_each + 300e6 else [f"{grown / 1e6:.0f} MB for images of {bytes_each / 1e6:.0f}"]
    account("hostile", "image folder: images of 500 times their size at once, memory stays that of one", count, lost)


# --- Pickles ---


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


def places(whole: Path) -> dict[str, Callable[[Case, bytes], object]]:
    """Return where a pickle can lie in wait, each as what puts it there and names the command that meets it."""

    def of_cifar(member: str) -> Callable[[Case, bytes], object]:
        def put(case: Case, pickled: bytes) -> None:
            content = cifar10([], **{member: pickled})
            (case.root / "cifar-10-python.tar.gz").write_bytes(content)
            case.on("cifar10", "cannot be read: it asks for", md5=hashlib.md5(content).hexdigest())

        return put

    def unverified(case: Case, pickled: bytes) -> None:
        (case.root / "cifar-10-python.tar.gz").write_bytes(cifar10([], data_batch_1=pickled))
        case.on("cifar10", "is not the original: its md5 is")

    def whole_archive(name: str, file: str, said: str) -> Callable[[Case, bytes], object]:
        return lambda case, pickled: (case.on(name, said).root / file).write_bytes(pickled)

    def array_of_objects(case: Case, pickled: bytes) -> None:
        header = b"{'descr': '|O', 'fortran_order': False, 'shape': (4,), }"
        array = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + pickled
        with zipfile.ZipFile(case.root / "cifar10.npz", "w") as archive:
            archive.writestr("train_images.npy", array)
        case.on("cifar10", "cifar10.npz is damaged (Object arrays cannot be loaded")

    def npz(case: Case, pickled: bytes) -> None:
        (case.root / "cifar10.npz").write_bytes(pickled)
        case.on("cifar10", "cifar10.npz is damaged")

    def image(case: Case, pickled: bytes) -> None:
        shutil.copytree(whole.parent / "images", case.folder / "images")
        (case.folder / "images" / "train" / "ant" / "x.png").write_bytes(pickled)
        case.words, case.said = on_images(case.folder / "images", case.folder), "is not a readable image"

    def of_run(name: str, packed: Callable[[bytes], bytes]) -> Callable[[Case, bytes], object]:
        def put(case: Case, pickled: bytes) -> None:
            shutil.copytree(whole, case.folder, dirs_exist_ok=True)
            directory = directory_of(case.folder)
            (directory / "result.json").unlink()
            (directory / "checkpoints" / name).write_bytes(packed(pickled))
            case.words = on_images(whole.parent / "images", case.folder)
            case.said = f"{name} is damaged: it is not a whole checkpoint of weights"
            case.code = 0 if name == "last.ckpt" else 1  # the one before it is there, and is gone on from

        return put

    def config(case: Case, pickled: bytes) -> None:
        of_run("last.ckpt", lambda _: b"")(case, pickled)
        text = f"!!python/object/apply:pickle.loads [!!python/bytes {pickled.hex()}]\n"
        text += f"a: !!python/object/apply:os.mkdir [{case.marker}]\n"
        (directory_of(case.folder) / "config.yaml").write_text(text)
        case.code, case.said = 1, "config.yaml is damaged"

    found = {f"CIFAR's {name}, with the right checksum": of_cifar(name) for name in ("data_batch_1", "batches_meta")}
    found |= {
        "CIFAR's data_batch_1": unverified,
        "CIFAR's archive": whole_archive("cifar10", "cifar-10-python.tar.gz", "is not the original: its md5 is"),
        "TinyImageNet's archive": whole_archive("tinyimagenet", "tiny-imagenet-200.zip", "is cut or damaged"),
        "an array of converted data": array_of_objects,
        "converted data": npz,
        "an image": image,
        "config.yaml": config,
    }
    for name in ("last.ckpt", "best.ckpt"):
        found |= {
            f"{name}, as it is": of_run(name, bytes),
            f"{name}, in torch's archive": of_run(name, checkpoint_of),
        }
    return found


def directory_of(folder: Path) -> Path:
    return next(folder.rglob("config.yaml")).parent


@pytest.fixture(scope="module")
def whole(cli: Cli, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run with its data, beside its images."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(images, folder / "images")
    done = cli.run(*on_images(folder / "images", folder / "run"), "keep=all")
    assert done.code == 0, done.err
    return folder / "run"


def test_each_payload_would_have_run(tmp_path: Path) -> None:
    for kind, content in payloads(tmp_path / "marker").items():
        pickle.loads(content)
        assert (tmp_path / "marker").is_dir(), kind
        (tmp_path / "marker").rmdir()
    torch.load(io.BytesIO(checkpoint_of(payloads(tmp_path / "marker")["os.mkdir"])), weights_only=False)
    assert (tmp_path / "marker").is_dir()


def test_the_guard_sees_what_is_done(cli: Cli, tmp_path: Path) -> None:
    case = Case(tmp_path / "case").on("cifar10")
    acts = "\nimport os, socket; os.system('true'); open({0!r}, 'w').close(); os.remove({0!r})\n"
    real, case.inject = GUARD.format(inside=str(case.folder), notes=str(tmp_path / "case-notes")), ""
    case.inject = real + acts.format(str(tmp_path / "elsewhere"))
    wrong = case.meet(cli)[1]
    assert [line.split()[2] for line in wrong if line.startswith("it did")][:3] == ["os.system", "open", "os.remove"]


@pytest.mark.parametrize("half", range(2))
def test_pickles_are_not_executed(cli: Cli, whole: Path, tmp_path: Path, account: Account, half: int) -> None:
    names = list(places(whole))
    kinds = list(payloads(tmp_path))
    tried = [(place, kind) for i, place in enumerate(names) for kind in (kinds if FULL else [kinds[i % len(kinds)]])]
    lost: dict[str, list[str]] = {"checkpoint": [], "data": []}
    count = dict.fromkeys(lost, 0)
    for number, (place, kind) in enumerate(tried[half::2]):
        case = Case(tmp_path / str(number))
        places(whole)[place](case, payloads(case.marker)[kind])
        what = "checkpoint" if ".ckpt" in place else "data"
        count[what] += 1
        wrong = case.meet(cli)[1]
        if not wrong and case.code == 0:
            wrong = differences(directory_of(whole), directory_of(case.folder))
        lost[what] += [f"{kind} in {place}: {line}" for line in wrong]
    account("hostile", "a pickle that executes code in place of weights", count["checkpoint"], lost["checkpoint"])
    account(
        "hostile", "a pickle that executes code in place of data, images, configuration", count["data"], lost["data"]
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
        shutil.copytree(whole, case.folder, dirs_exist_ok=True)
        directory = directory_of(case.folder)
        (directory / "result.json").unlink()
        folder = directory / "checkpoints"
        last = read_checkpoint(folder / "previous-last.ckpt")
        named = f"{folder}/{os.path.relpath(path, folder)}"
        for state in last["callbacks"].values():
            if "best_model_path" in state:
                state |= {"dirpath": str(folder), "kth_best_model_path": named, "best_model_path": named}
                state |= {"best_k_models": {named: torch.tensor(-1.0)}, "kth_value": torch.tensor(-1.0)}
        torch.save(last, folder / "last.ckpt")
        case.words, case.code = on_images(whole.parent / "images", case.folder), 0
        lost += [f"{victim}: {line}" for line in case.meet(cli)[1]]
        if not path.exists():
            lost.append(f"{victim}: removed")
    account("hostile", "a checkpoint that has other people's files removed", len(victims), lost)


# --- Converted data and records that contradict themselves ---


def npy(descr: str, shape: str, content: bytes = b"") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


def test_forged_converted_data(cli: Cli, tmp_path: Path, account: Account) -> None:
    split = {"images": pixels(8), "labels": np.arange(8)}
    good = {f"{part}_{key}": array for part in ("train", "test") for key, array in split.items()}
    good["classes"] = np.array(sorted("abcdefghij"))
    forgeries: dict[str, dict[str, np.ndarray | bytes | None]] = {
        "classes that are no list": {"classes": np.array("abcdefghij")},
        "classes that are numbers": {"classes": np.arange(10)},
        "labels that are no list": {"train_labels": np.array(1)},
        "images that are one number": {"train_images": np.array(1, np.uint8)},
        "labels of another byte order": {"test_labels": np.arange(8).astype(">i8")},
        "labels out of range": {"test_labels": np.arange(8) * 2**40},
        "boxes that are text": {"test_boxes": np.array(["x"] * 8)},
        "boxes for others": {"test_boxes": np.zeros((9, 4), np.int64)},
        "an array more": {"train_more": np.array(["x"])},
        "an array less": {"test_images": None},
        "10**30 images": {"train_images": npy("'|u1'", f"({10**30},)")},
        "a terabyte of images": {"train_images": npy("'|u1'", f"({2**40},)")},
        "a negative count": {"train_images": npy("'|u1'", "(-1,)")},
        "a header that is code": {"train_images": npy("__import__('os').mkdir('X')", "(1,)")},
        "a header a hundred deep": {"train_images": npy("(" * 100, "1")},
        "a header without an end": {"train_images": npy("'''", "(")},
        "a type of nothing": {"train_images": npy("'|V0'", "(4,)")},
    }
    lost, kinds = [], share_of(list(forgeries), 5)
    for number, kind in enumerate(kinds):
        case = Case(tmp_path / str(number))
        with zipfile.ZipFile(case.root / "cifar10.npz", "w") as archive:
            for key, array in (good | forgeries[kind]).items():
                if isinstance(array, np.ndarray):
                    stream = io.BytesIO()
                    np.save(stream, array)
                    array = stream.getvalue()
                if array is not None:
                    archive.writestr(f"{key}.npy", array)
        case.on("cifar10", "cifar10.npz is ")
        lost += [f"{kind}: {line}" for line in case.meet(cli)[1]]
    account("hostile", "converted data with forged headers, types, shapes", len(kinds), lost)


def test_forged_records(cli: Cli, whole: Path, tmp_path: Path, account: Account) -> None:
    """A record without checksums, from elsewhere: it is made again, or refused, never believed and never a trace."""
    record = json.loads((directory_of(whole) / "result.json").read_text())
    forgeries = {
        "an accuracy that is text": ("result.json", json.dumps(record | {"test_acc": "99 %"})),
        "an accuracy that is no number": ("result.json", json.dumps(record | {"test_acc": float("nan")})),
        "a seed that is a list": ("result.json", json.dumps(record | {"seed": [0]})),
        "brackets a hundred thousand deep": ("result.json", "[" * 10**5),
        "a number of 5000 digits": ("result.json", '{"schema": ' + "9" * 5000 + "}"),
        "a run of W&B that is a path": ("wandb-run-id", "../../../evil"),
        "brackets in the metrics": ("metrics.jsonl", "[" * 10**5 + "\n{}\n"),
        "a configuration that is brackets": ("config.yaml", "[" * 10**4),
        "a configuration that is a name": ("config.yaml", "\x1b[2J"),
    }
    lost, kinds = [], share_of(list(forgeries), 3)
    for number, kind in enumerate(kinds):
        case = Case(tmp_path / str(number))
        shutil.copytree(whole, case.folder, dirs_exist_ok=True)
        directory = directory_of(case.folder)
        (directory / "SHA256SUMS").unlink()
        name, text = forgeries[kind]
        if name == "wandb-run-id":
            (directory / "result.json").unlink()
            case.inject = f"import os; os.environ['WANDB_MODE'] = 'offline'; os.chdir({str(case.folder)!r})\n"
        (directory / name).write_text(text)
        case.words, case.said = on_images(whole.parent / "images", case.folder), "is damaged"
        if name == "config.yaml":
            case.code = 1
        elif name == "wandb-run-id":
            case.code, case.said = 0, "going on without it"
        else:
            case.code, case.said = 0, "is damaged" if name == "result.json" else ""
        lost += [f"{kind}: {line}" for line in case.meet(cli)[1]]
    account("hostile", "records with forged types, depths, names", len(kinds), lost)


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
