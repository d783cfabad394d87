"""Get a data set, convert it once into one file, and load it.

The converted file, ``<root>/<name>.npz``, holds ``train_images`` and ``test_images`` (uint8, N x 3 x S x S),
``train_labels`` and ``test_labels`` (int64, N), ``classes`` (their names) and, where there are boxes,
``test_boxes`` (int64, N x 4). Its members carry checksums, verified at each load.
"""

import hashlib
import http.client
import logging
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from abn_exp.data.catalog import CATALOG, DatasetInfo
from abn_exp.data.readers import Arrays, file_digest, list_image_folder, progress, read_image_folder
from abn_exp.files import remove_temporary_files, writing

log = logging.getLogger(__name__)

Channels = tuple[float, float, float]

TIMEOUT = 30.0  # seconds without an answer before a download is given up
BLOCK = 2**20  # bytes read at a time


@dataclass(frozen=True)
class Split:
    """Images, uint8 (N, 3, S, S), and their labels, int64 (N,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class ImageDataset:
    """A data set in memory. ``test_boxes``: int64 (N, 4), x0, y0, x1, y1 in pixels, if the set has them."""

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    test_boxes: Tensor | None = None

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits of all labels and pixels, in their order."""
        digest = hashlib.sha256()
        for tensor in (self.train.labels, self.train.images, self.test.labels, self.test.images):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()[:12]


def load(
    name: str,
    root: str | Path,
    *,
    path: str | Path | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
    download: bool = True,
) -> ImageDataset:
    """Return a data set, prepared first where that has not happened yet.

    Args:
        name: a name in the catalog, or "folder" for ``<path>/{train,test}/<class>/*``.
        root: where converted files and original archives lie.
        path: the image folder, for "folder" only.
        image_size: what images of a "folder" are resized to; elsewhere the set's own, which an image folder needs.
        num_classes: how many classes the original must have to be converted; None: as many as it has.
        download: whether the original may be downloaded.

    Raises:
        ValueError: an argument, an archive or an image is wrong, or a file is damaged.
        OSError: the set is not there and cannot be downloaded, or the disk fails.
    """
    file = prepare(name, root, path=path, image_size=image_size, num_classes=num_classes, download=download)
    info = CATALOG.get(name)
    if file is None:
        assert info is not None
        arrays = info.read(Path())
    else:
        arrays = _read(file)
    try:
        _check(arrays)
    except ValueError as error:
        remedy = f": {_REMEDY}" if file is not None else "; its reader in the catalog makes it."
        raise ValueError(f"{file or name} is not what it should be ({error}){remedy}") from error
    side = arrays["train_images"].shape[-1]
    if image_size not in (None, side):
        raise ValueError(f"{name} has images of {side} pixels a side, not image_size={image_size}")
    tensors = {key: torch.from_numpy(arrays[key]) for key in arrays if key.startswith(("train", "test"))}
    train = Split(tensors["train_images"], tensors["train_labels"])
    test = Split(tensors["test_images"], tensors["test_labels"])
    if info is not None and (len(train.labels), len(test.labels)) != (info.train_count, info.test_count):
        log.warning(
            f"{name} has {len(train.labels)} + {len(test.labels)} images here; the full set has "
            f"{info.train_count} + {info.test_count}"
        )
    classes = tuple(str(name) for name in arrays["classes"])
    return ImageDataset(name, train, test, classes, tensors.get("test_boxes"))


def prepare(
    name: str,
    root: str | Path,
    *,
    path: str | Path | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
    download: bool = True,
) -> Path | None:
    """Convert a data set unless it has been, and return the converted file (None for a set that a library has).

    Sources, in order: the converted file, the original archive in ``root``, the image folder
    ``<root>/<name>/{train,test}/<class>/*``, the download. Of several processes that ask at once, one
    converts and the others wait. Arguments and errors: see `load`.
    """
    root = Path(root).expanduser()
    if name == "folder":
        return _prepare_folder(root, path, image_size)
    if name not in CATALOG:
        raise ValueError(f"there is no data set {name!r}; there are {', '.join(CATALOG)} and folder")
    info = CATALOG[name]
    if path is not None:
        raise ValueError(f"path={path} is for name='folder' only; {name} is looked for in root={root}")
    if not info.archive:
        return None
    target = root / f"{name}.npz"
    if not target.exists():
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{name}.lock"):
            if not target.exists():
                _write(target, _read_source(name, info, root, image_size, download), num_classes)
    return target


def count_images(name: str, root: str | Path, image_size: int, num_classes: int | None) -> tuple[int, int] | None:
    """Return how many training and test images a set of the catalog holds in `root`; what lies there is converted.

    None where nothing lies there or it cannot be read, and for sets that have no file and so no other count.
    """
    info, root = CATALOG.get(name), Path(root).expanduser()
    if info is None or not info.archive:
        return None
    if not any(path.exists() for path in (root / f"{name}.npz", _archive(info, root), root / name)):
        return None
    try:
        file = prepare(name, root, image_size=image_size, num_classes=num_classes, download=False)
        assert file is not None
        train, test = (len(_read(file, key)[key]) for key in ("train_labels", "test_labels"))
        return train, test
    except (ValueError, OSError):
        return None  # the error is raised where the images are needed


def _prepare_folder(root: Path, path: str | Path | None, image_size: int | None) -> Path:
    if path is None or image_size is None:
        raise ValueError("name='folder' needs path= (a folder with train and test) and image_size= (in pixels)")
    folder = Path(path).expanduser().resolve()
    key = hashlib.sha256(f"{folder}\0{image_size}".encode()).hexdigest()[:8]
    target = root / f"folder-{key}.npz"
    fingerprint = list_image_folder(folder).fingerprint
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".folder-{key}.lock"):
        if not target.exists() or _read(target, only="fingerprint")["fingerprint"] != fingerprint:
            arrays = read_image_folder(folder, image_size, resize=True)
            _write(target, arrays | {"fingerprint": np.array(fingerprint)}, num_classes=None)
    return target


def _read_source(name: str, info: DatasetInfo, root: Path, image_size: int | None, download: bool) -> Arrays:
    archive, folder = _archive(info, root), root / name
    if not archive.exists() and folder.is_dir():
        if image_size is None:
            raise ValueError(f"{folder} is an image folder: give image_size=, the pixels a side of its images")
        return read_image_folder(folder, image_size, resize=False)
    if not archive.exists():
        if not download:
            raise FileNotFoundError(_how_to_get(name, info, root, "downloads are off"))
        _download(name, info, root)
    if info.md5 and (digest := file_digest(archive, "md5")) != info.md5:
        found = f"{archive} is not the original: its md5 is {digest} instead of {info.md5}"
        if not info.parts:
            raise ValueError(f"{found}; delete it and get it again from {info.url}")
        log.warning("%s; what it holds of the set is used", found)
    return info.read(archive)


def _archive(info: DatasetInfo, root: Path) -> Path:
    """Return where the original archive is, or has to be; a part of the set may have a longer name."""
    archive = root / info.archive
    if not info.parts or archive.exists():
        return archive
    return next(iter(sorted(root.glob(f"{archive.stem}*{archive.suffix}"))), archive)


def _how_to_get(name: str, info: DatasetInfo, root: Path, why: str) -> str:
    return (
        f"{name} is not in {root.resolve()} and {why}: put {info.url} (md5 {info.md5}) there as {info.archive}, or "
        f"its images as {name}/{{train,test}}/<class>/*, or say where they are with dataset.root= (for "
        "images of your own: dataset=folder dataset.path=)"
    )


def _download(name: str, info: DatasetInfo, root: Path) -> None:
    part = root / f"{info.archive}.part"
    try:
        with urllib.request.urlopen(info.url, timeout=TIMEOUT) as response, part.open("wb") as stream:
            length = response.headers.get("Content-Length")
            blocks = iter(lambda: response.read(BLOCK), b"")
            total = None if length is None else -(-int(length) // BLOCK)
            for block in progress(blocks, total, f"Downloading {info.url}"):
                stream.write(block)
        if length is not None and part.stat().st_size != int(length):
            raise OSError(f"only {part.stat().st_size} of {length} bytes came")
        if info.md5 and not info.parts and (digest := file_digest(part, "md5")) != info.md5:
            raise OSError(f"what came has md5 {digest}")
        part.replace(root / info.archive)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ConnectionError(_how_to_get(name, info, root, f"its download failed ({reason})")) from error
    finally:
        part.unlink(missing_ok=True)


# --- The converted file ---

_REMEDY = "delete it, and it will be made again from its source"


def _check(arrays: Arrays, num_classes: int | None = None) -> None:
    """Raise ValueError where shapes, types and labels contradict each other or the number of classes."""
    needed = {"train_images", "train_labels", "test_images", "test_labels", "classes"}
    if arrays.keys() - {"test_boxes", "fingerprint"} != needed:
        raise ValueError(f"it holds {sorted(arrays)} instead of {sorted(needed)}")
    if arrays["classes"].ndim != 1 or arrays["classes"].dtype.kind != "U":
        raise ValueError("its classes are not a list of names")
    size, count = arrays["train_images"].shape[-1:], len(arrays["classes"])
    if num_classes not in (None, count):
        raise ValueError(f"it has {count} classes instead of {num_classes}")
    for split in ("train", "test"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        shape = (*labels.shape, 3, *size, *size)
        if images.dtype != np.uint8 or images.shape != shape or labels.dtype != np.int64 or labels.ndim != 1:
            raise ValueError(f"its {split} images are {images.dtype} {images.shape} for {labels.shape} labels")
        if len(labels) == 0 or labels.min() < 0 or labels.max() >= count:
            raise ValueError(f"its {split} labels are not all from 0 to {count - 1}")
    boxes = arrays.get("test_boxes")
    if boxes is not None and (boxes.dtype != np.int64 or boxes.shape != (len(arrays["test_labels"]), 4)):
        raise ValueError(f"its test boxes are {boxes.dtype} {boxes.shape}")


def _write(target: Path, arrays: Arrays, num_classes: int | None) -> None:
    """Write the arrays atomically: to a file beside the target, flushed, then renamed."""
    try:
        _check(arrays, num_classes)
    except ValueError as error:
        raise ValueError(f"the source of {target.name} is not what it should be: {error}") from error
    remove_temporary_files(target.parent, target.name)
    with writing(target) as stream, zipfile.ZipFile(stream, "w") as archive:
        for key, array in arrays.items():  # a ZipInfo of its own has a fixed date: same data, same file
            with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.ascontiguousarray(array), allow_pickle=False)


def _read(file: Path, only: str | None = None) -> Arrays:
    arrays = {}
    try:
        with zipfile.ZipFile(file) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("it is compressed, which no converted file is")
            for member in archive.namelist():
                key = member.removesuffix(".npy")
                if only in (None, key):
                    with archive.open(member) as stream:
                        arrays[key] = np.lib.format.read_array(stream, allow_pickle=False)
                        stream.read()  # the checksum is verified at the end, which a damaged header may hide
        return arrays if only is None else {only: arrays[only]}
    except Exception as error:  # decoding unknown bytes may raise anything
        raise ValueError(f"{file} is damaged ({error}): {_REMEDY}") from error


def channel_statistics(images: Tensor) -> tuple[Channels, Channels]:
    """Return each channel's mean and (population) standard deviation in uint8 (N, 3, H, W), for [0, 1]."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in range(3):  # exact, and without a float copy of the images
        weights = torch.bincount(images[:, channel].flatten(), minlength=256).double()
        weights /= weights.sum()
        mean.append(float(weights @ levels))
        std.append(float((weights @ (levels - mean[-1]) ** 2).sqrt()))
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
