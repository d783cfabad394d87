import dataclasses
import hashlib
import io
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from abn_exp.data import prepare as prepare_module
from abn_exp.data import readers
from abn_exp.data.catalog import CATALOG
from abn_exp.data.prepare import channel_statistics, count_images, load, prepare
from tests.helpers.datasets import (
    CIFAR10_NAMES,
    RANDOM,
    pixels,
    python2_pickle,
    tinyimagenet_members,
    write_tar,
    write_zip,
)
from tests.helpers.runs import REPOSITORY

LETTERS = ["ant", "bee", "cat"]


def register(monkeypatch: pytest.MonkeyPatch, name: str, **facts: Any) -> None:
    monkeypatch.setitem(CATALOG, name, dataclasses.replace(CATALOG[name], **facts))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no network here")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


# --- CIFAR archives ---


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


def test_cifar10_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels, test, md5 = write_cifar10(tmp_path)
    register(monkeypatch, "cifar10", md5=md5, train_count=50, test_count=10)
    data = load("cifar10", tmp_path)
    assert data.train.images.dtype == torch.uint8
    assert data.train.labels.dtype == torch.int64
    assert torch.equal(data.train.images, torch.from_numpy(train))
    assert data.train.labels.tolist() == labels
    assert torch.equal(data.test.images, torch.from_numpy(test))
    assert data.test.labels.tolist() == list(range(10))
    assert data.classes == tuple(name.decode() for name in CIFAR10_NAMES)
    assert data.test_boxes is None
    assert sorted(os.listdir(tmp_path)) == [".cifar10.lock", "cifar-10-python.tar.gz", "cifar10.npz"]


def test_cifar100_archive_gives_the_fine_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = pixels(100), pixels(100)
    fine = [int(label) for label in RANDOM.permutation(100)]
    batch = {b"coarse_labels": [0] * 100, b"fine_labels": fine}
    names = {b"fine_label_names": [b"c%02d" % i for i in range(100)], b"coarse_label_names": [b"x"]}
    members = {
        "meta": python2_pickle(names),
        "train": python2_pickle(batch | {b"data": train.reshape(100, -1)}),
        "test": python2_pickle(batch | {b"data": test.reshape(100, -1)}),
    }
    md5 = write_tar(tmp_path / "cifar-100-python.tar.gz", "cifar-100-python", members)
    register(monkeypatch, "cifar100", md5=md5, train_count=100, test_count=100)
    data = load("cifar100", tmp_path)
    assert data.train.labels.tolist() == fine
    assert torch.equal(data.test.images, torch.from_numpy(test))
    assert len(data.classes) == 100


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


def test_wrong_md5_is_refused_before_unpickling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path)
    monkeypatch.setattr(readers.ArrayUnpickler, "load", lambda self: pytest.fail("unpickled"))
    with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz is not the original: its md5 is .* delete it"):
        prepare("cifar10", tmp_path)
    assert not list(tmp_path.glob("*.npz*"))


def test_archive_in_another_class_order_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, md5 = write_cifar10(tmp_path, CIFAR10_NAMES[::-1])
    register(monkeypatch, "cifar10", md5=md5)
    with pytest.raises(ValueError, match="another order"):
        prepare("cifar10", tmp_path)


# --- TinyImageNet ---


@pytest.fixture
def tiny() -> dict[str, bytes]:
    return tinyimagenet_members()


def test_tinyimagenet_archive(tmp_path: Path, tiny: dict[str, bytes], caplog: pytest.LogCaptureFixture) -> None:
    write_zip(tmp_path / "tiny-imagenet-200-mini.zip", tiny)
    data = load("tinyimagenet", tmp_path)
    assert data.classes == ("n01", "n02", "n03")
    assert data.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    reds = data.train.images[:, 0, 32, 32].float()
    torch.testing.assert_close(reds, torch.tensor([10.0, 10, 20, 20, 30, 30]), atol=2, rtol=0)
    assert data.test.labels.tolist() == [2, 0, 1]  # as val_annotations.txt says
    assert data.test.images.shape == (3, 3, 64, 64)
    assert (data.test.images == torch.tensor([50, 51, 52]).view(3, 1, 1, 1)).all()  # grey: three equal channels
    assert data.test_boxes is not None
    assert data.test_boxes.tolist() == [[0, 1, 62, 63], [1, 1, 62, 63], [2, 1, 62, 63]]
    assert "tinyimagenet has 6 + 3 images here; the full set has 100000 + 10000" in caplog.text


def test_a_part_of_tinyimagenet_is_told_and_taken(
    tmp_path: Path, tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert CATALOG["tinyimagenet"].md5 == "90528d7ca1a48142e341f4ef8d21d0de"
    file = tmp_path / "tiny-imagenet-200.zip"
    write_zip(file, tiny)
    prepare("tinyimagenet", tmp_path)
    assert f"{file} is not the original: its md5 is" in caplog.text
    (tmp_path / "tinyimagenet.npz").unlink()
    caplog.clear()
    register(monkeypatch, "tinyimagenet", md5=hashlib.md5(file.read_bytes()).hexdigest())
    prepare("tinyimagenet", tmp_path)
    assert "md5" not in caplog.text


def test_the_full_archive_goes_before_a_part_of_it(tmp_path: Path, tiny: dict[str, bytes]) -> None:
    write_zip(tmp_path / "tiny-imagenet-200.zip", tiny)
    (tmp_path / "tiny-imagenet-200-mini.zip").write_bytes(b"no archive")
    assert len(load("tinyimagenet", tmp_path).classes) == 3


# --- Image folders ---


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


def test_catalog_set_from_an_image_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(readers, "CHUNK", 7)  # several pieces of work for the threads
    names = [name.decode() for name in CIFAR10_NAMES]
    written = write_folder(tmp_path / "cifar10", names)
    (tmp_path / "cifar10" / "train" / "bird" / ".DS_Store").write_bytes(b"hidden")
    data = load("cifar10", tmp_path, image_size=32, num_classes=10)
    assert data.classes == tuple(names)
    assert data.train.labels.tolist() == [i // 2 for i in range(20)]
    assert torch.equal(data.train.images, torch.from_numpy(written["train"]))
    assert torch.equal(data.test.images, torch.from_numpy(written["test"]))
    assert "cifar10 has 20 + 20 images here" in caplog.text


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


def test_wrong_image_size_in_a_catalog_set(tmp_path: Path) -> None:
    write_folder(tmp_path / "cifar10", LETTERS, size=16)
    with pytest.raises(ValueError, match=r"train/ant/000\.png has 16 x 16 pixels instead of 32 x 32"):
        prepare("cifar10", tmp_path, image_size=32)
    with pytest.raises(ValueError, match=r"cifar10 is an image folder: give image_size="):
        prepare("cifar10", tmp_path)


def test_wrong_number_of_classes_in_a_catalog_set(tmp_path: Path) -> None:
    write_folder(tmp_path / "cifar10", LETTERS)
    with pytest.raises(ValueError, match="3 classes instead of 10"):
        prepare("cifar10", tmp_path, image_size=32, num_classes=10)
    assert not list(tmp_path.glob("*.npz*"))


def test_folder_is_resized_around_its_centre(tmp_path: Path) -> None:
    for split in ("train", "test"):
        file = tmp_path / "images" / split / "ant" / "wide.png"
        file.parent.mkdir(parents=True)
        image = np.full((64, 128, 4), 255, np.uint8)  # with an opacity channel, and white beside the centre
        image[:, 32:96, :3] = RANDOM.integers(0, 200, (64, 64, 3))
        Image.fromarray(image).save(file)
    data = load("folder", tmp_path, path=tmp_path / "images", image_size=32)
    rgb = torch.from_numpy(image[:, :, :3]).permute(2, 0, 1)
    expected = TF.center_crop(TF.resize(rgb, [32], antialias=True), [32])
    torch.testing.assert_close(data.test.images[0].int(), expected.int(), atol=1, rtol=0)


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


def test_digits_are_the_original_enlarged() -> None:
    from sklearn.datasets import load_digits

    data = load("digits", "unused")
    labels = torch.cat([data.train.labels, data.test.labels])
    images = torch.cat([data.train.images, data.test.images]).float()[:, 0].flatten(1)
    small = [Image.fromarray(image.astype(np.float32) * (255 / 16)) for image in load_digits().images]
    large = np.stack([np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR)) for image in small])
    originals = torch.from_numpy(large).flatten(1)
    nearest = torch.cdist(images, originals).argmin(1)
    assert (images - originals[nearest]).abs().max() < 0.51  # rounding
    assert len(nearest.unique()) == len(originals)  # each original once, in train or in test
    assert torch.equal(torch.from_numpy(load_digits().target)[nearest], labels)


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
