"""Small archives in the layout of the originals."""

import dataclasses
import hashlib
import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from abn_exp.data.catalog import CATALOG

RANDOM = np.random.default_rng(0)
LETTERS = ["ant", "bee", "cat"]


def pixels(count: int, size: int = 32) -> np.ndarray:
    return RANDOM.integers(0, 256, (count, 3, size, size), np.uint8)


def python2_pickle(value: object) -> bytes:
    """What Python 2's cPickle wrote, as in the originals: byte strings, and numpy under its old module's name."""

    def dump(v: object) -> bytes:
        if isinstance(v, dict):
            return b"}(" + b"".join(dump(key) + dump(item) for key, item in v.items()) + b"u"
        if isinstance(v, list):
            return b"](" + b"".join(map(dump, v)) + b"e"
        if isinstance(v, bytes):
            return b"T" + len(v).to_bytes(4, "little") + v
        if isinstance(v, np.ndarray):
            new = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
            dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
            shape = b"(" + b"".join(map(dump, v.shape)) + b"t"
            return new + b"(K\x01" + shape + dtype + b"\x89" + dump(v.tobytes()) + b"tb"
        assert isinstance(v, int)
        return b"J" + v.to_bytes(4, "little", signed=True)

    return b"\x80\x02" + dump(value) + b"."


def write_tar(file: Path, folder: str, members: dict[str, bytes]) -> str:
    """Write a .tar.gz and return its md5."""
    with tarfile.open(file, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return hashlib.md5(file.read_bytes()).hexdigest()


CIFAR10_NAMES = [b"airplane", b"automobile", b"bird", b"cat", b"deer", b"dog", b"frog", b"horse", b"ship", b"truck"]


def jpeg(image: np.ndarray) -> bytes:
    """uint8 (H, W) or (H, W, 3) as a JPEG."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def tinyimagenet_members() -> dict[str, bytes]:
    """Three classes out of alphabetical order, two training images and one test image of each."""
    members = {}
    lines = []
    for k, wnid in enumerate(["n03", "n01", "n02"]):
        for i in range(2):
            flat = np.full((64, 64, 3), (10 * int(wnid[1:]), 100, 200), np.uint8)
            members[f"tiny-imagenet-200/train/{wnid}/images/{wnid}_{i}.JPEG"] = jpeg(flat)
        members[f"tiny-imagenet-200/train/{wnid}/{wnid}_boxes.txt"] = b"n03_0.JPEG\t0\t0\t1\t1\n"
        grey = np.full((64, 64), 50 + k, np.uint8)
        members[f"tiny-imagenet-200/val/images/val_{k}.JPEG"] = jpeg(grey)
        lines.append(f"val_{k}.JPEG\t{wnid}\t{k}\t1\t62\t63\n")
    members["tiny-imagenet-200/val/val_annotations.txt"] = "".join(lines).encode()
    members["__MACOSX/train/n01/images/._n01_0.JPEG"] = b"another system's note"
    members["tiny-imagenet-200/test/images/test_0.JPEG"] = b"unlabelled, not read"
    return members


def write_zip(file: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def register(monkeypatch: pytest.MonkeyPatch, name: str, **facts: Any) -> None:
    monkeypatch.setitem(CATALOG, name, dataclasses.replace(CATALOG[name], **facts))


def write_cifar10(root: Path, names: list[bytes] = CIFAR10_NAMES) -> tuple[np.ndarray, list[int], np.ndarray, str]:
    train, test = pixels(50), pixels(10)
    labels = [int(label) for label in RANDOM.permutation(50) % 10]
    members = {"batches.meta": python2_pickle({b"label_names": names})}
    for i in range(5):
        part = slice(10 * i, 10 * i + 10)
        members[f"data_batch_{i + 1}"] = python2_pickle(
            {b"data": train[part].reshape(10, -1), b"labels": labels[part]}
        )
    members["test_batch"] = python2_pickle({b"data": test.reshape(10, -1), b"labels": list(range(10))})
    members["readme.html"] = b"not a pickle"
    md5 = write_tar(root / "cifar-10-python.tar.gz", "cifar-10-batches-py", members)
    return train, labels, test, md5


def write_folder(folder: Path, classes: list[str], per_class: int = 2, size: int = 32) -> dict[str, np.ndarray]:
    """Write random PNGs; return the images of each split in the order of classes and files."""
    written = {}
    for split in ("train", "test"):
        images = pixels(per_class * len(classes), size)
        for i, image in enumerate(images):
            file = folder / split / classes[i // per_class] / f"{i % per_class:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(file)
        written[split] = images
    return written
