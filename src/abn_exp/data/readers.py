"""Read data sets from the original archives, from image folders and from scikit-learn.

Archives are read in place: nothing is extracted to disk, no path inside an archive is ever used as one. Each
reader returns the arrays of the converted file (see ``prepare``); its errors are ValueErrors that name a file.
"""

import hashlib
import io
import logging
import os
import pickle
import stat
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path, PurePosixPath
from typing import IO, Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track

log = logging.getLogger(__name__)
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # such an image is refused, by its name

Arrays = dict[str, np.ndarray]

MAX_UNCOMPRESSED_BYTES = 4 * 2**30  # an original archive unpacks to less than a tenth of this
MAX_RATIO = 100  # ... and to about its own size: photographs are compressed already
MAX_PIXELS = 100_000_000  # of an image in a folder, before it is scaled
LARGE_PIXELS = 16_000_000  # above this, one after another in one thread: of 4 bytes a pixel, each thread keeps some
_large_images = ThreadPoolExecutor(1)
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # decoded by PIL itself, by no other program
CHUNK = 256  # images decoded between two steps of the progress bar


def progress(steps: Iterable[Any], total: int | None, description: str) -> Iterable[Any]:
    """Pass steps on, with a bar on a terminal and one line in a log elsewhere."""
    console = Console(stderr=True)
    if console.is_terminal:
        return track(steps, description, total=total, console=console)
    log.info(description)
    return steps


def _check_member(name: str, *, plain: bool) -> None:
    """Raise ValueError for a member that no original has. Nothing is extracted, so none could do harm."""
    if not plain:
        raise ValueError(f"its member {name!r} is a link, a device or a pipe: get the original")
    if name.startswith("/") or ".." in PurePosixPath(name).parts or "\\" in name or not name.isprintable():
        raise ValueError(f"its member {name!r} is not a path inside it: get the original")


def _check_size(unpacked: int, archive: Path) -> None:
    if unpacked > MAX_UNCOMPRESSED_BYTES:
        raise ValueError(
            f"it would unpack to {unpacked / 2**30:.1f} GiB or more, and {MAX_UNCOMPRESSED_BYTES / 2**30:.0f} GiB "
            "are allowed: get the original"
        )
    if unpacked > MAX_RATIO * max(2**20, archive.stat().st_size):
        raise ValueError(f"it would unpack to more than {MAX_RATIO} times its size: get the original")


# --- CIFAR ---


CIFAR_SIZE = 32  # pixels a side


class CifarLayout(NamedTuple):
    """Which members of the archive hold what, and under which keys."""

    train: tuple[str, ...]
    test: str
    meta: str
    labels: bytes
    names: bytes


CIFAR10 = CifarLayout(
    train=tuple(f"data_batch_{i}" for i in range(1, 6)),
    test="test_batch",
    meta="batches.meta",
    labels=b"labels",
    names=b"label_names",
)
CIFAR100 = CifarLayout(("train",), "test", "meta", b"fine_labels", b"fine_label_names")


class ArrayUnpickler(pickle.Unpickler):
    """Unpickle arrays, bytes, numbers, lists and dictionaries; anything else is refused before it can run."""

    _RECONSTRUCT = np.empty(0).__reduce__()[0]
    _ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            asked = ascii(f"{module}.{name}")
            raise pickle.UnpicklingError(f"it asks for {asked}, which no image data needs") from None


def file_digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


def read_cifar(archive: Path, layout: CifarLayout) -> Arrays:
    """Read ``cifar-10-python.tar.gz`` or ``cifar-100-python.tar.gz``, with the 100 fine labels."""
    wanted = {*layout.train, layout.test, layout.meta}
    content: dict[str, dict[bytes, Any]] = {}
    unpacked = 0
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                _check_member(member.name, plain=member.isreg() or member.isdir())
                unpacked += member.size
                _check_size(unpacked, archive)
                stream = tar.extractfile(member)
                name = PurePosixPath(member.name).name
                if stream is not None and name in wanted:
                    content[name] = ArrayUnpickler(stream, encoding="bytes").load()
        classes = [name.decode() for name in content[layout.meta][layout.names]]
        train = [content[name] for name in layout.train]
        test = content[layout.test]
        shape = (-1, 3, CIFAR_SIZE, CIFAR_SIZE)
        arrays = {
            "train_images": np.concatenate([batch[b"data"] for batch in train]).reshape(shape),
            "train_labels": np.concatenate([batch[layout.labels] for batch in train]).astype(np.int64),
            "test_images": test[b"data"].reshape(shape),
            "test_labels": np.asarray(test[layout.labels], np.int64),
        }
    except Exception as error:  # decoding unknown bytes may raise anything
        raise ValueError(f"{archive} cannot be read: {error!s}") from error
    if classes != sorted(classes):  # image folders are numbered alphabetically: the two must agree
        raise ValueError(f"{archive} lists its classes in another order than the alphabetical one")
    return arrays | {"classes": np.array(classes)}


# --- TinyImageNet ---

TINYIMAGENET_SIZE = 64  # pixels a side


def read_tinyimagenet(archive: Path) -> Arrays:
    """Read ``tiny-imagenet-200.zip``: ``val/`` is the test set, classes are the sorted ids of ``train/``.

    ``test_boxes`` is int64 (N, 4): x0, y0, x1, y1 in pixels, both corners inside the box.
    """
    try:
        with zipfile.ZipFile(archive) as zipped:
            for member in zipped.infolist():
                kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where it was packed on another system
                _check_member(member.filename, plain=kind in (0, stat.S_IFREG, stat.S_IFDIR))
            _check_size(sum(member.file_size for member in zipped.infolist()), archive)
            return _read_tinyimagenet(zipped)
    except ValueError as error:
        raise ValueError(f"{archive}: {error}") from error
    except Exception as error:  # decoding unknown bytes may raise anything
        raise ValueError(f"{archive} is cut or damaged ({error}): delete it and get the original") from error


def _read_tinyimagenet(zipped: zipfile.ZipFile) -> Arrays:
    train: list[tuple[str, str]] = []  # (class, member)
    val: list[str] = []
    annotations = None
    for member in sorted(zipped.namelist()):
        match PurePosixPath(member).parts:
            case [*_, "train", wnid, "images", file] if file.endswith(".JPEG") and file[0] != ".":
                train.append((wnid, member))
            case [*_, "val", "images", file] if file.endswith(".JPEG") and file[0] != ".":
                val.append(member)
            case [*_, "val", "val_annotations.txt"]:
                annotations = member
            case _:
                # Unlabelled images and another system's notes are not read. An image whose name is damaged is
                # neither: to open it compares the two places where the name stands.
                zipped.open(member).close()
    if annotations is None:
        raise ValueError("it has no val/val_annotations.txt, which says what the test images show")
    classes = sorted({wnid for wnid, _ in train})
    label_of = {wnid: label for label, wnid in enumerate(classes)}

    labels, boxes = {}, {}
    for number, line in enumerate(zipped.read(annotations).decode().splitlines(), 1):
        try:
            file, wnid, *corners = line.split("\t")
            labels[file] = label_of[wnid]
            boxes[file] = [int(corner) for corner in corners]
        except KeyError:
            raise ValueError(f"val_annotations.txt, line {number}: {wnid!r} has no training images") from None
        except ValueError:
            raise ValueError(f"val_annotations.txt, line {number} is not FILE CLASS X0 Y0 X1 Y1") from None
        if len(corners) != 4:
            raise ValueError(f"val_annotations.txt, line {number} has {len(corners)} coordinates instead of 4")
        if not all(0 <= corner < TINYIMAGENET_SIZE for corner in boxes[file]):
            raise ValueError(f"val_annotations.txt, line {number}: its box is not inside the image")
    files = [PurePosixPath(member).name for member in val]
    if missing := [file for file in files if file not in labels]:
        raise ValueError(f"val_annotations.txt does not say what val/images/{missing[0]} shows")

    def read(members: list[str], what: str) -> np.ndarray:
        def decode(i: int) -> np.ndarray:
            return _decode(io.BytesIO(zipped.read(members[i])), members[i], TINYIMAGENET_SIZE)

        return _decode_all(decode, len(members), TINYIMAGENET_SIZE, f"Decoding TinyImageNet, {what}")

    return {
        "train_images": read([member for _, member in train], "train"),
        "train_labels": np.array([label_of[wnid] for wnid, _ in train], np.int64),
        "test_images": read(val, "test"),
        "test_labels": np.array([labels[file] for file in files], np.int64),
        "test_boxes": np.array([boxes[file] for file in files], np.int64).reshape(-1, 4),
        "classes": np.array(classes),
    }


# --- Digits ---


def read_digits(_: Path) -> Arrays:
    """Return scikit-learn's digits, 8 x 8 to 32 x 32 (bilinear), in three equal channels; a fifth is test."""
    return {name: array.copy() for name, array in _digits().items()}


@cache
def _digits() -> Arrays:
    import torch  # here, because the names in the catalog are read before it is known that anything is to be trained
    from sklearn.datasets import load_digits  # slow to import, and no other set needs it

    from abn_exp.data.splits import stratified_split

    bunch = load_digits()
    images = torch.from_numpy(bunch.images)[:, None] * (255 / 16)
    images = torch.nn.functional.interpolate(images, size=32, mode="bilinear", align_corners=False)
    pixels = images.round().to(torch.uint8).repeat(1, 3, 1, 1).numpy()
    labels = bunch.target.astype(np.int64)
    arrays = {"classes": np.array([str(name) for name in bunch.target_names])}
    parts = stratified_split(torch.from_numpy(labels), 0.2, seed=0)
    for split, indices in zip(("train", "test"), parts, strict=True):
        arrays |= {f"{split}_images": pixels[indices.numpy()], f"{split}_labels": labels[indices.numpy()]}
    return arrays


# --- Image folders ---


class FolderListing(NamedTuple):
    """The images of ``<folder>/{train,test}/<class>/*``; classes are numbered alphabetically."""

    classes: list[str]
    files: dict[str, list[tuple[Path, int]]]  # split -> (file, label)
    fingerprint: str  # changes when a file is added, removed, renamed or written


def list_image_folder(folder: Path) -> FolderListing:
    files: dict[str, list[tuple[Path, int]]] = {}
    classes: dict[str, list[str]] = {}
    facts = hashlib.sha256()
    for split in ("train", "test"):
        if not (folder / split).is_dir():
            raise ValueError(f"{folder} has no folder {split!r}: images belong in {folder}/{{train,test}}/<class>/")
        classes[split] = sorted(entry.name for entry in _entries(folder / split) if entry.is_dir())
        files[split] = []
        if wrong := [name for name in classes[split] if os.fsencode(name).decode(errors="replace") != name]:
            raise ValueError(f"{folder / split} has a folder {wrong[0]!a}, whose name is not UTF-8: rename it")
        for label, name in enumerate(classes[split]):
            entries = sorted(_entries(folder / split / name), key=lambda entry: entry.name)
            if not entries:
                raise ValueError(f"{folder / split / name} is empty: put its images there or remove the folder")
            for entry in entries:
                if not entry.is_file():  # reading a pipe or a device would never end
                    raise ValueError(
                        f"{_shown(entry.path)} is not a file: a class folder holds images and nothing else"
                    )
                written = entry.stat()
                facts.update(os.fsencode(f"{split}/{name}/{entry.name}\0{written.st_size}\0{written.st_mtime_ns}\n"))
                files[split].append((Path(entry.path), label))
    if odd := sorted(set(classes["train"]) ^ set(classes["test"])):
        where = "train" if odd[0] in classes["train"] else "test"
        raise ValueError(f"{folder}: train and test must have the same classes, but only {where} has {odd[0]!r}")
    if not classes["train"]:
        raise ValueError(f"{folder}/train has no class folders: images belong in {folder}/{{train,test}}/<class>/")
    return FolderListing(classes["train"], files, facts.hexdigest())


def _shown(name: str) -> str:
    """Return a file's name, escaped where a terminal would not print it as it is."""
    return name if name.isprintable() else ascii(name)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.name.startswith(".")]


def read_image_folder(folder: Path, image_size: int, *, resize: bool) -> Arrays:
    """Read ``<folder>/{train,test}/<class>/*``.

    With ``resize`` the largest centred square is scaled to ``image_size`` (bilinear, antialiased), as
    torchvision's ``Resize`` and ``CenterCrop`` do; without, every image must have that size already.
    """
    listing = list_image_folder(folder)
    arrays = {"classes": np.array(listing.classes)}
    for split, files in listing.files.items():

        def decode(i: int, files: list[tuple[Path, int]] = files) -> np.ndarray:
            try:
                with files[i][0].open("rb") as stream:
                    return _decode(stream, _shown(str(files[i][0])), image_size, resize=resize)
            except OSError as error:
                raise ValueError(f"{_shown(str(files[i][0]))} cannot be read: {error}") from error

        arrays[f"{split}_images"] = _decode_all(decode, len(files), image_size, f"Decoding {folder}, {split}")
        arrays[f"{split}_labels"] = np.array([label for _, label in files], np.int64)
    return arrays


def _decode(stream: IO[bytes], where: str, image_size: int, *, resize: bool = False) -> np.ndarray:
    """Return uint8 (3, image_size, image_size), red, green, blue."""
    try:
        image = Image.open(stream, formats=FORMATS)
        width, height = image.size
        mode = image.mode
        right = (width, height) == (image_size, image_size) or (resize and width * height <= MAX_PIXELS)
        if not right or mode.startswith(("I", "F")):
            rgb = None
        elif width * height > LARGE_PIXELS:
            rgb = _large_images.submit(_in_colours, image, image_size).result()
        else:
            rgb = _in_colours(image, image_size)
    except Exception as error:  # decoding unknown bytes may raise anything
        raise ValueError(f"{where} is not a readable image ({error}): replace or remove it") from error
    if not right:
        allowed = f"{MAX_PIXELS} or less" if resize else f"{image_size} x {image_size}"
        raise ValueError(f"{where} has {width} x {height} pixels instead of {allowed}")
    if rgb is None:  # PIL would clip these to 255
        raise ValueError(f"{where} has more than 8 bits a pixel: convert it to 8 bits a channel")
    return np.asarray(rgb).transpose(2, 0, 1)


def _in_colours(image: Image.Image, size: int) -> Image.Image:
    with image:  # its memory is freed before the next image is decoded
        rgb = image.convert("RGB")
    return rgb if rgb.size == (size, size) else ImageOps.fit(rgb, (size, size), Image.Resampling.BILINEAR)


def _decode_all(decode: Callable[[int], np.ndarray], count: int, size: int, description: str) -> np.ndarray:
    """Return uint8 (count, 3, size, size), image i from decode(i), which runs in several threads."""
    images = np.empty((count, 3, size, size), np.uint8)

    def fill(start: int) -> None:
        for i in range(start, min(start + CHUNK, count)):
            images[i] = decode(i)

    starts = range(0, count, CHUNK)
    with ThreadPoolExecutor() as pool:
        for _ in progress(pool.map(fill, starts), len(starts), description):
            pass
    return images
