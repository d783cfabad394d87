import io
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from abn_exp.data import prepare as prepare_module
from abn_exp.data import readers
from abn_exp.data.catalog import CATALOG
from abn_exp.data.prepare import channel_statistics, count_images, load, prepare
from tests.helpers.datasets import (
    CIFAR10_NAMES,
    LETTERS,
    pixels,
    register,
    tinyimagenet_members,
    write_cifar10,
    write_folder,
    write_zip,
)
from tests.helpers.runs import REPOSITORY

# --- Sources ---


def test_the_converted_file_is_the_first_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, md5 = write_cifar10(tmp_path)
    register(monkeypatch, "cifar10", md5=md5)
    file = prepare("cifar10", tmp_path)
    assert file == tmp_path / "cifar10.npz"
    (tmp_path / "cifar-10-python.tar.gz").unlink()
    assert prepare("cifar10", tmp_path) == file
    assert len(load("cifar10", tmp_path).classes) == 10


def test_same_source_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, md5 = write_cifar10(tmp_path)
    register(monkeypatch, "cifar10", md5=md5)
    file = prepare("cifar10", tmp_path)
    assert file is not None
    first = file.read_bytes()
    file.unlink()
    monkeypatch.setattr(time, "time", lambda: 2e9)  # a zip member is dated by default
    prepare("cifar10", tmp_path)
    assert file.read_bytes() == first


def test_the_full_archive_goes_before_a_part_of_it(tmp_path: Path) -> None:
    write_zip(tmp_path / "tiny-imagenet-200.zip", tinyimagenet_members())
    (tmp_path / "tiny-imagenet-200-mini.zip").write_bytes(b"no archive")
    assert len(load("tinyimagenet", tmp_path).classes) == 3


def test_images_are_counted_without_loading_them_and_nothing_is_made_where_nothing_lies(tmp_path: Path) -> None:
    root = tmp_path / "root"
    assert count_images("cifar10", root, 32, 10) is None
    assert count_images("folder", root, 32, None) is count_images("digits", root, 32, 10) is None
    assert not root.exists()
    write_folder(root / "cifar10", [name.decode() for name in CIFAR10_NAMES], per_class=3)
    assert count_images("cifar10", root, 32, 10) == (30, 30)  # converts it
    assert (root / "cifar10.npz").is_file()
    (root / "cifar100").mkdir()
    assert count_images("cifar100", root, 32, 100) is None  # whoever loads it says what is wrong
    (root / "cifar10.npz").write_bytes(b"PK")
    assert count_images("cifar10", root, 32, 10) is None


def test_the_archive_goes_before_the_image_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "cifar10", [name.decode() for name in CIFAR10_NAMES])
    train, *_, md5 = write_cifar10(tmp_path)
    register(monkeypatch, "cifar10", md5=md5)
    assert torch.equal(load("cifar10", tmp_path).train.images, torch.from_numpy(train))


def test_wrong_number_of_classes_in_a_catalog_set(tmp_path: Path) -> None:
    write_folder(tmp_path / "cifar10", LETTERS)
    with pytest.raises(ValueError, match="3 classes instead of 10"):
        prepare("cifar10", tmp_path, image_size=32, num_classes=10)
    assert not list(tmp_path.glob("*.npz*"))


def test_folder_has_a_file_for_each_path_and_size(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", LETTERS)
    write_folder(tmp_path / "b", LETTERS[:2])
    root = tmp_path / "root"
    files = {prepare("folder", root, path=tmp_path / which, image_size=s) for which in "ab" for s in (8, 16)}
    assert len(files) == 4
    assert load("folder", root, path=tmp_path / "a", image_size=16).train.images.shape == (6, 3, 16, 16)
    assert load("folder", root, path=tmp_path / "b", image_size=8).classes == ("ant", "bee")


def test_folder_is_converted_again_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = write_folder(tmp_path / "a", LETTERS)
    options: dict[str, Any] = {"path": tmp_path / "a", "image_size": 32}
    assert torch.equal(load("folder", tmp_path, **options).train.images, torch.from_numpy(written["train"]))
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "read_image_folder", lambda *a, **k: pytest.fail("converted again"))
        load("folder", tmp_path, **options)
    file = tmp_path / "a" / "train" / "ant" / "001.png"
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(file)
    assert load("folder", tmp_path, **options).train.images[1].max() == 0
    file.unlink()
    assert len(load("folder", tmp_path, **options).train.labels) == 5


# --- The converted file ---


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", LETTERS)
    options: dict[str, Any] = {"path": tmp_path / "a", "image_size": 8}
    good = load("folder", tmp_path, **options)
    file = prepare("folder", tmp_path, **options)
    assert file is not None
    content = bytearray(file.read_bytes())
    image_bytes = content.index(good.train.images.numpy().tobytes())
    found = 0
    for position in [image_bytes, image_bytes + 500, *range(0, len(content), 11)]:
        mask = 1 << (position % 8)
        content[position] ^= mask
        file.write_bytes(content)
        try:
            data = load("folder", tmp_path, **options)
        except ValueError as error:
            assert str(file) in str(error)  # noqa: PT017
            assert "delete it, and it will be made again" in str(error)  # noqa: PT017
            found += 1
        else:  # a date, say
            assert torch.equal(data.train.images, good.train.images)
            assert torch.equal(data.test.labels, good.test.labels)
            assert data.classes == good.classes
            assert not image_bytes <= position < image_bytes + good.train.images.numel()
        content[position] ^= mask
    assert found > 100


def test_a_damaged_header_that_hides_the_rest_is_found(tmp_path: Path) -> None:
    file = tmp_path / "cifar10.npz"
    split = {"images": pixels(500), "labels": np.arange(500) % 10}
    arrays: dict[str, Any] = {f"{part}_{key}": array for part in ("train", "test") for key, array in split.items()}
    np.savez(file, classes=np.array(list("abcdefghij")), test_boxes=np.ones((500, 4), np.int64), **arrays)
    assert load("cifar10", tmp_path).test_boxes is not None
    content = file.read_bytes()
    assert content.count(b"(500, 4)") == 1
    file.write_bytes(content.replace(b"(500, 4)", b"(500, 0)"))
    with pytest.raises(ValueError, match=r"cifar10\.npz is damaged .*delete it"):
        load("cifar10", tmp_path)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "a", LETTERS)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            prepare("folder", tmp_path, path=tmp_path / "a", image_size=32)
    assert not list(tmp_path.glob("*.npz*"))
    assert len(load("folder", tmp_path, path=tmp_path / "a", image_size=32).classes) == 3


def test_one_converts_and_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "cifar10", [name.decode() for name in CIFAR10_NAMES], per_class=1)
    conversions, sizes = [], []

    def slow(*args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
        conversions.append(threading.get_ident())
        time.sleep(0.2)
        return readers.read_image_folder(*args, **kwargs)

    monkeypatch.setattr(prepare_module, "read_image_folder", slow)
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        sizes.append(len(load("cifar10", tmp_path, image_size=32).train.labels))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [10] * 4
    assert len(conversions) == 1


# --- The download ---


class Response(io.BytesIO):
    """What urlopen returns, reduced to what is used."""

    def __init__(self, content: bytes, length: int | None) -> None:
        super().__init__(content)
        self.headers = {} if length is None else {"Content-Length": str(length)}


def serve(monkeypatch: pytest.MonkeyPatch, content: bytes, length: int | None = None) -> list[tuple[str, float]]:
    asked = []

    def urlopen(url: str, timeout: float) -> Response:
        asked.append((url, timeout))
        return Response(content, length)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return asked


def test_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, *_, md5 = write_cifar10(tmp_path)
    register(monkeypatch, "cifar10", md5=md5)
    content = (tmp_path / "cifar-10-python.tar.gz").read_bytes()
    asked = serve(monkeypatch, content, len(content))
    root = tmp_path / "new"
    assert torch.equal(load("cifar10", root).train.images, torch.from_numpy(train))
    assert asked == [(CATALOG["cifar10"].url, 30.0)]
    assert sorted(os.listdir(root)) == [".cifar10.lock", "cifar-10-python.tar.gz", "cifar10.npz"]


@pytest.mark.parametrize(("length", "reason"), [(None, "what came has md5"), (99, "only 7 of 99 bytes came")])
def test_wrong_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int | None, reason: str) -> None:
    serve(monkeypatch, b"<html/>", length)
    monkeypatch.setattr(readers.ArrayUnpickler, "load", lambda self: pytest.fail("unpickled"))
    with pytest.raises(ConnectionError, match=reason):
        prepare("cifar10", tmp_path)
    assert os.listdir(tmp_path) == [".cifar10.lock"]


@pytest.mark.parametrize("download", [True, False])
def test_text_without_a_network(tmp_path: Path, download: bool) -> None:
    with pytest.raises(OSError, match="cifar10 is not in") as caught:
        load("cifar10", tmp_path, download=download)
    info = CATALOG["cifar10"]
    text = str(caught.value)
    reason = "no network here" if download else "downloads are off"
    for part in (reason, info.url, info.md5, info.archive, str(tmp_path), "dataset.root=", "dataset.path="):
        assert str(part) in text
    assert "\n" not in text


# --- Arguments, the embedded set, constants ---


def test_argument_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are digits, cifar10, cifar100, tinyimagenet and folder"):
        prepare("mnist", tmp_path)
    with pytest.raises(ValueError, match="needs path="):
        prepare("folder", tmp_path)
    with pytest.raises(ValueError, match="is for name='folder' only"):
        prepare("cifar10", tmp_path, path=tmp_path)
    with pytest.raises(ValueError, match="images of 32 pixels a side, not image_size=64"):
        load("digits", tmp_path, image_size=64)


def test_digits_need_no_file(tmp_path: Path) -> None:
    root = tmp_path / "never made"
    assert prepare("digits", root) is None
    data, again = load("digits", root), load("digits", root)
    info = CATALOG["digits"]
    assert not root.exists()
    assert data.train.images.shape == (info.train_count, 3, 32, 32)
    assert data.test.images.shape == (info.test_count, 3, 32, 32)
    assert data.train.images.dtype == torch.uint8
    assert data.classes == tuple("0123456789")
    assert torch.equal(data.train.images[:, 0], data.train.images[:, 2])
    assert torch.equal(data.test.images, again.test.images)
    assert data.train.labels.bincount().min() > 130
    mean, std = channel_statistics(data.train.images)
    facts = yaml.safe_load((REPOSITORY / "conf" / "dataset" / "digits.yaml").read_text())["dataset"]
    assert [round(value, 4) for value in mean] == facts["mean"]
    assert [round(value, 4) for value in std] == facts["std"]


def test_channel_statistics_against_numpy() -> None:
    images = pixels(5, 16) // np.array([1, 2, 3], np.uint8)[:, None, None]
    mean, std = channel_statistics(torch.from_numpy(images))
    np.testing.assert_allclose(mean, (images / 255.0).mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, (images / 255.0).std((0, 2, 3)), rtol=1e-12)


def test_every_entry_of_the_catalog_has_its_file() -> None:
    files = {file.stem for file in (REPOSITORY / "conf" / "dataset").glob("*.yaml")}
    assert files == {*CATALOG, "folder"}


def test_one_line_in_a_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path / "a", LETTERS)
    with caplog.at_level(logging.INFO):
        prepare("folder", tmp_path, path=tmp_path / "a", image_size=32)
    assert [record.message.rsplit(", ")[-1] for record in caplog.records if "Decoding" in record.message] == [
        "train",
        "test",
    ]


def test_what_a_reader_without_an_archive_gives_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info, arrays = CATALOG["digits"], CATALOG["digits"].read(Path())
    arrays["train_images"] = arrays["train_images"].astype(np.int32)
    monkeypatch.setitem(CATALOG, "digits", replace(info, read=lambda _: arrays))
    with pytest.raises(ValueError, match=r"digits is not what it should be .*; its reader in the catalog makes it"):
        load("digits", tmp_path)
