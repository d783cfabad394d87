"""Data from strangers: archives, images, converted data, pickles in their place.

Refused in words; nothing is written outside the folder at hand, and nothing in a file is executed.
"""

import hashlib
import io
import os
import pickle
import random
import re
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from abn_exp.data.catalog import CATALOG
from abn_exp.data.prepare import load
from abn_exp.data.readers import read_tinyimagenet
from tests.helpers.cli import Cli
from tests.helpers.datasets import jpeg, pixels, tinyimagenet_members, write_zip
from tests.helpers.faults import FULL, Account, on_images
from tests.helpers.guard import watched
from tests.helpers.hostile import Case, bomb_png, checkpoint_of, cifar10, encoded, npy, outside, payloads

Put = Callable[[Path], object]  # puts something hostile into the folder in which a data set is looked for


def complaints(
    tmp_path: Path, name: str, put: Put, said: str, *, known: bool = False, shape: dict[str, Any] | None = None
) -> list[str]:
    """Put something hostile in the place of a data set, load it, and say what is wrong with how it is refused.

    `known`: the catalog has the archive's checksum, as if the publisher's own were like this.
    """
    inner = tmp_path / "inner" / "case"  # what leaves it by ../.. is still below the test's own folder
    root = inner / "data"
    root.mkdir(parents=True)
    put(root)
    before, converted = outside(tmp_path, inner), list(root.glob("*.npz*"))
    options = {"image_size": 32, "num_classes": 10} if shape is None else shape
    with watched(inner) as notes, pytest.MonkeyPatch.context() as patch:
        if known:
            md5 = hashlib.md5((root / CATALOG[name].archive).read_bytes()).hexdigest()
            patch.setitem(CATALOG, name, replace(CATALOG[name], md5=md5))
        try:
            load(name, root, download=False, **options)
            text = "it was taken"
        except (ValueError, OSError) as error:
            text = str(error)
    wrong = [f"it did: {note}" for note in notes]
    if outside(tmp_path, inner) != before:
        wrong.append(f"written outside: {set(outside(tmp_path, inner)) ^ set(before)}")
    if not re.search(said, text) or not text.isprintable():
        wrong.append(f"it does not say {said!r} in a line: {text!r}")
    if list(root.glob("*.npz*")) != converted:
        wrong.append("it was converted")
    return wrong


# --- Archives ---

MIB = 2**20
CIFAR = "cifar-10-batches-py/"
# The member's name, its kind, where it points to, how many zeros it holds; and what is said of it.
PATH, NO_FILE, BOMB = "its member .* is not a path inside it", "a link, a device or a pipe", "would unpack to more"
TAR_MEMBERS: dict[str, tuple[str, bytes, str, int, str]] = {
    "a path upwards": ("../../evil", tarfile.REGTYPE, "", 1, PATH),
    "an absolute path": ("{outer}/evil", tarfile.REGTYPE, "", 1, PATH),
    "a path with backslashes": ("..\\..\\evil", tarfile.REGTYPE, "", 1, PATH),
    "a name that commands a terminal": ("\x1b]0;evil\x07\x1b[2J\nerror: all is well", tarfile.REGTYPE, "", 1, PATH),
    "a symlink upwards": (CIFAR + "data_batch_1", tarfile.SYMTYPE, "../../../evil", 0, NO_FILE),
    "a hard link upwards": (CIFAR + "data_batch_1", tarfile.LNKTYPE, "../../../etc/passwd", 0, NO_FILE),
    "a device": (CIFAR + "zero", tarfile.CHRTYPE, "", 0, NO_FILE),
    "a pipe": (CIFAR + "data_batch_2", tarfile.FIFOTYPE, "", 0, NO_FILE),
    "a bomb of a thousand times its size": (CIFAR + "readme", tarfile.REGTYPE, "", 200 * MIB, BOMB),
}


def put_tar(kind: str, root: Path) -> None:
    name, kind_of_file, link, size, _ = TAR_MEMBERS[kind]
    info = tarfile.TarInfo(name.format(outer=root.parents[2]))
    info.type, info.linkname, info.mode, info.size = kind_of_file, link, 0o7777, size
    (root / "cifar-10-python.tar.gz").write_bytes(cifar10(info))


@pytest.mark.parametrize("kind", TAR_MEMBERS)
def test_a_member_that_no_tar_should_have(tmp_path: Path, account: Account, kind: str) -> None:
    lost = complaints(tmp_path, "cifar10", partial(put_tar, kind), TAR_MEMBERS[kind][-1], known=True)
    account("hostile", "CIFAR archive: paths upwards, absolute, links, devices, pipe, bomb", 1, lost)


TINY = "tiny-imagenet-200/"
ZIP_MEMBERS: dict[str, tuple[str, int, int, str]] = {
    "a path upwards": ("../../train/n01/images/evil.JPEG", stat.S_IFREG, 1, PATH),
    "an absolute path": ("{outer}/train/n01/images/evil.JPEG", stat.S_IFREG, 1, PATH),
    "a path with backslashes": ("..\\..\\evil", stat.S_IFREG, 1, PATH),
    "a name that commands a terminal": (TINY + "train/n01/images/\x1b[2J\nfine.JPEG", stat.S_IFREG, 1, PATH),
    "a symlink": (TINY + "train/n01/images/up.JPEG", stat.S_IFLNK, 1, NO_FILE),
    "a device": (TINY + "zero", stat.S_IFCHR, 0, NO_FILE),
    "a pipe": (TINY + "pipe", stat.S_IFIFO, 0, NO_FILE),
    "a socket": (TINY + "socket", stat.S_IFSOCK, 0, NO_FILE),
    "a bomb of a thousand times its size": (TINY + "bomb", stat.S_IFREG, 200 * MIB, BOMB),
    "a bomb as an image": (TINY + "train/n01/images/bomb.JPEG", stat.S_IFREG, 200 * MIB, BOMB),
    "a bomb that hides its size": (TINY + "bomb", stat.S_IFREG, 200 * MIB, BOMB),
}


def put_zip(kind: str, root: Path) -> None:
    name, kind_of_file, size, _ = ZIP_MEMBERS[kind]
    info, file = zipfile.ZipInfo(name.format(outer=root.parents[2])), root / "tiny-imagenet-200.zip"
    info.external_attr, info.create_system = (kind_of_file | 0o7777) << 16, 3
    info.compress_type = zipfile.ZIP_DEFLATED
    write_zip(file, tinyimagenet_members())
    with zipfile.ZipFile(file, "a", compresslevel=1) as archive:
        archive.writestr(info, bytes(size), compresslevel=1)
        packed = archive.infolist()[-1].compress_size
    if kind == "a bomb that hides its size":  # it claims to take up as much room packed as it does unpacked
        sizes = [n.to_bytes(4, "little") for n in (packed, size)]
        assert file.read_bytes().count(b"".join(sizes)) == 2
        file.write_bytes(file.read_bytes().replace(b"".join(sizes), sizes[1] * 2))


@pytest.mark.parametrize("kind", ZIP_MEMBERS)
def test_a_member_that_no_zip_should_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, account: Account, kind: str
) -> None:
    """Refused before any member is read."""

    def put(root: Path) -> None:
        put_zip(kind, root)
        monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("read"))

    lost = complaints(tmp_path, "tinyimagenet", put, ZIP_MEMBERS[kind][-1], shape=TINY_SHAPE)
    account("hostile", "TinyImageNet archive: paths upwards, absolute, links, devices, bombs", 1, lost)


def put_tiny(root: Path, members: dict[str, bytes | None]) -> None:
    """Write a small TinyImageNet with other members, or without those that are None."""
    found: dict[str, bytes | None] = {**tinyimagenet_members(), **{TINY + name: c for name, c in members.items()}}
    write_zip(root / "tiny-imagenet-200.zip", {name: c for name, c in found.items() if c is not None})


TINY_SHAPE = {"image_size": 64, "num_classes": 3}
BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[:-50],
    "empty": lambda content: b"",
    "garbage": lambda content: random.Random(0).randbytes(9999),
    "a web page": lambda content: b"<html/>",
    "one bit": lambda content: bytes([*content[:99], content[99] ^ 1, *content[100:]]),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize(
    ("name", "known", "said"),
    [
        ("cifar10", False, "is not the original: its md5 is"),
        ("cifar10", True, "cannot be read"),
        ("tinyimagenet", False, "is cut or damaged .* delete it and get the original"),
    ],
    ids=["CIFAR", "CIFAR, known", "TinyImageNet"],
)
def test_a_broken_archive(tmp_path: Path, account: Account, name: str, known: bool, said: str, kind: str) -> None:
    def put(root: Path) -> None:
        if name == "tinyimagenet":
            put_tiny(root, {})
        else:
            (root / CATALOG[name].archive).write_bytes(cifar10())
        file = root / CATALOG[name].archive
        file.write_bytes(BROKEN[kind](file.read_bytes()))

    shape = TINY_SHAPE if name == "tinyimagenet" else None
    lost = complaints(tmp_path, name, put, said, known=known, shape=shape)
    account("hostile", "archives: wrong checksum, cut, empty, garbage, one bit, a web page", 1, lost)


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
    "postscript": ("is not a readable image", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"),
    "vector drawing": ("is not a readable image", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "pickle": ("is not a readable image", lambda: pickle.dumps(print)),
}


GREY = jpeg(np.zeros((64, 64), np.uint8))
NOTE = "val/val_annotations.txt"
TINY_CONTENTS: dict[str, tuple[str, str, bytes | None]] = {
    "a class too many": ("4 classes instead of 3", "train/n04/images/x.JPEG", GREY),
    "an unknown test image": ("does not say what val/images/x.JPEG shows", "val/images/x.JPEG", b""),
    "no annotations": ("has no val/val_annotations.txt", NOTE, None),
    "a class without images": ("line 1: 'n77' has no training images", NOTE, b"val_0.JPEG\tn77\t0\t0\t1\t1\n"),
    "a box of three numbers": ("line 1 has 3 coordinates", NOTE, b"val_0.JPEG\tn01\t0\t0\t1\n"),
    "a line without tabs": ("line 1 is not FILE CLASS", NOTE, b"val_0.JPEG n01\n"),
    "a number of 5000 digits": ("line 1 is not FILE CLASS", NOTE, b"val_0.JPEG\tn01\t0\t0\t1\t" + b"9" * 5000),
    "a box of 2**99 pixels": ("is not inside the image", NOTE, b"val_0.JPEG\tn01\t0\t0\t1\t%d" % 2**99),
    "a box outside": ("is not inside the image", NOTE, b"val_0.JPEG\tn01\t0\t-9\t1\t1"),
    "bytes that are no text": ("can't decode", NOTE, b"\xff\xfe\x00"),
    **{kind: (said, "train/n01/images/x.JPEG", make()) for kind, (said, make) in WRONG_IMAGES.items()},
}


@pytest.mark.parametrize("kind", TINY_CONTENTS)
def test_an_archive_with_wrong_contents(tmp_path: Path, account: Account, kind: str) -> None:
    said, name, content = TINY_CONTENTS[kind]
    lost = complaints(tmp_path, "tinyimagenet", partial(put_tiny, members={name: content}), said, shape=TINY_SHAPE)
    account("hostile", "TinyImageNet archive: images of wrong size, mode, count, bombs, no images", 1, lost)


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


def put_image(name: str, content: bytes) -> Put:
    return lambda folder: (folder / "train" / "ant" / name).write_bytes(content)


def link_image(target: str) -> Put:
    return lambda folder: (folder / "train" / "ant" / "x").symlink_to(target)


FOLDERS: dict[str, tuple[str, Put]] = {
    **{
        kind: (said, put_image("x.png", make()))
        for kind, (said, make) in WRONG_IMAGES.items()
        if kind not in ("wrong size", "one pixel")  # they are scaled
    },
    "a pipe": ("is not a file", lambda folder: os.mkfifo(folder / "train" / "ant" / "x.png")),
    "a link to a device": ("is not a file", link_image("/dev/zero")),
    "a link to itself": ("Too many levels of symbolic links", link_image("x")),
    "a link to no image": ("is not a readable image", link_image("/etc/passwd")),
    "a folder as an image": ("is not a file", lambda folder: (folder / "train" / "ant" / "x.png").mkdir()),
    "a name that commands a terminal": ("is not a readable image", put_image("\x1b[2J\nerror: fine", b"")),
    "a name that is no text": ("is not a readable image", put_image("\udcff", b"")),
    "a class too many": (
        "but only test has 'cat'",
        lambda folder: shutil.copytree(folder / "test" / "ant", folder / "test" / "cat"),
    ),
    "a class whose name is no text": (
        "whose name is not UTF-8: rename it",
        lambda folder: [(folder / part / "ant").rename(folder / part / "\udcff") for part in ("train", "test")],
    ),
    "an empty class": ("is empty", lambda folder: (folder / "train" / "cat").mkdir()),
    "no training images": ("has no folder 'train'", lambda folder: shutil.rmtree(folder / "train")),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_wrong_image_folder(images: Path, tmp_path: Path, account: Account, kind: str) -> None:
    def put(root: Path) -> None:
        shutil.copytree(images, root / "images")
        FOLDERS[kind][1](root / "images")

    shape = {"path": tmp_path / "inner" / "case" / "data" / "images", "image_size": 8}
    lost = complaints(tmp_path, "folder", put, FOLDERS[kind][0], shape=shape)
    account("hostile", "image folder: bombs, no images, pipes, links, names that command a terminal", 1, lost)


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


# --- Converted data ---


FORGERIES: dict[str, dict[str, np.ndarray | bytes | None]] = {
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


def put_npz(root: Path, changes: dict[str, np.ndarray | bytes | None]) -> None:
    split = {"images": pixels(8), "labels": np.arange(8)}
    arrays: dict[str, Any] = {f"{part}_{key}": array for part in ("train", "test") for key, array in split.items()}
    arrays |= {"classes": np.array(sorted("abcdefghij")), **changes}
    with zipfile.ZipFile(root / "cifar10.npz", "w") as archive:
        for key, array in arrays.items():
            if isinstance(array, np.ndarray):
                stream = io.BytesIO()
                np.save(stream, array)
                array = stream.getvalue()
            if array is not None:
                archive.writestr(f"{key}.npy", array)


@pytest.mark.parametrize("kind", FORGERIES)
def test_forged_converted_data(tmp_path: Path, account: Account, kind: str) -> None:
    lost = complaints(tmp_path, "cifar10", partial(put_npz, changes=FORGERIES[kind]), r"cifar10\.npz is .*delete it")
    account("hostile", "converted data with forged headers, types, shapes", 1, lost)


# --- Pickles ---


def write(name: str) -> Callable[[bytes, Path], object]:
    return lambda pickled, root: (root / name).write_bytes(pickled)


def put_object_array(pickled: bytes, root: Path) -> None:
    put_npz(root, {"train_images": npy("'|O'", "(4,)", pickled)})


def put_pickled_image(pickled: bytes, root: Path) -> None:
    for part, name in ((part, name) for part in ("train", "test") for name in ("ant", "bee")):
        (root / "images" / part / name).mkdir(parents=True)
        (root / "images" / part / name / "x.png").write_bytes(pickled)


def in_cifar(member: str) -> Callable[[bytes, Path], object]:
    return lambda pickled, root: write("cifar-10-python.tar.gz")(cifar10(None, **{member: pickled}), root)


# Where in data a pickle can lie in wait: the data set, what is said, whether the checksum is the catalog's, how it
# comes there.
IN_DATA: dict[str, tuple[str, str, bool, Callable[[bytes, Path], object]]] = {
    "CIFAR's data_batch_1, known": (
        "cifar10",
        "cannot be read: it asks for",
        True,
        in_cifar("data_batch_1"),
    ),
    "CIFAR's batches.meta, known": (
        "cifar10",
        "cannot be read: it asks for",
        True,
        in_cifar("batches_meta"),
    ),
    "CIFAR's data_batch_1": ("cifar10", "is not the original: its md5 is", False, in_cifar("data_batch_1")),
    "CIFAR's archive": ("cifar10", "is not the original", False, write("cifar-10-python.tar.gz")),
    "TinyImageNet's archive": ("tinyimagenet", "is cut or damaged", False, write("tiny-imagenet-200.zip")),
    "an array": ("cifar10", r"cifar10\.npz is damaged \(Object arrays cannot be loaded", False, put_object_array),
    "converted data": ("cifar10", r"cifar10\.npz is damaged", False, write("cifar10.npz")),
    "an image": ("folder", "is not a readable image", False, put_pickled_image),
}


@pytest.mark.parametrize("place", IN_DATA)
def test_a_pickle_in_data_is_not_executed(tmp_path: Path, account: Account, place: str) -> None:
    name, said, known, put = IN_DATA[place]
    marker, lost = tmp_path / "marker", []
    for number, (kind, pickled) in enumerate(payloads(marker).items()):
        folder = tmp_path / str(number)
        images = {"path": folder / "inner/case/data/images", "image_size": 8}
        shape = images if name == "folder" else TINY_SHAPE if name == "tinyimagenet" else None
        found = complaints(folder, name, partial(put, pickled), said, known=known, shape=shape)
        lost += [f"{kind}: {line}" for line in [*found, *(["executed"] if marker.exists() else [])]]
    account("hostile", "a pickle that executes code in place of data, images, configuration", number + 1, lost)


# --- Commands ---


def test_what_is_forbidden_is_seen(cli: Cli, tmp_path: Path) -> None:
    file = str(tmp_path / "elsewhere")
    acts = f"import os\nos.system('true'); open({file!r}, 'w').close(); os.remove({file!r})\n"
    (tmp_path / "inside").mkdir()
    with watched(tmp_path / "inside") as notes:
        exec(acts, {})
        (tmp_path / "inside" / "file").touch()
    assert [note.split()[0] for note in notes] == ["os.system", "open", "os.remove"]
    case = Case(tmp_path / "case").on("cifar10", "")
    case.inject = acts
    did = [line.split()[2] for line in case.meet(cli)[1] if line.startswith("it did")]
    assert did[:3] == ["os.system", "open", "os.remove"]


@pytest.mark.parametrize(
    ("name", "said", "put"),
    [
        ("cifar10", "is not the original: its md5 is", partial(put_tar, "a name that commands a terminal")),
        ("tinyimagenet", "is not a path inside it", partial(put_zip, "a name that commands a terminal")),
        ("tinyimagenet", "can't decode", partial(put_tiny, members={NOTE: b"\xff\xfe\x00"})),
        ("cifar10", "cifar10.npz is ", partial(put_npz, changes=FORGERIES["a header that is code"])),
    ],
    ids=["a checksum", "a name", "annotations", "converted data"],
)
def test_a_command_refuses_data_in_a_line(
    cli: Cli, tmp_path: Path, account: Account, name: str, said: str, put: Put
) -> None:
    case = Case(tmp_path / "case").on(name, said)
    put(case.root)
    account("hostile", "data that a command refuses in a line", 1, case.meet(cli)[1])


@pytest.mark.parametrize("kind", ["a name that commands a terminal", "a name that is no text"])
def test_a_command_refuses_an_image_in_a_line(
    cli: Cli, images: Path, tmp_path: Path, account: Account, kind: str
) -> None:
    case = Case(tmp_path / "case")
    shutil.copytree(images, case.folder / "images")
    case.said, put = FOLDERS[kind]
    put(case.folder / "images")
    case.words = on_images(case.folder / "images", case.folder)
    account("hostile", "data that a command refuses in a line", 1, case.meet(cli)[1])


def test_each_payload_would_have_run(tmp_path: Path) -> None:
    for kind, content in payloads(tmp_path / "marker").items():
        pickle.loads(content)
        assert (tmp_path / "marker").is_dir(), kind
        (tmp_path / "marker").rmdir()
    torch.load(io.BytesIO(checkpoint_of(payloads(tmp_path / "marker")["os.mkdir"])), weights_only=False)
    assert (tmp_path / "marker").is_dir()
