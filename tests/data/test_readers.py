"""What is read of the originals and of image folders, image by image."""

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from abn_exp.data import readers
from abn_exp.data.catalog import CATALOG
from abn_exp.data.prepare import load, prepare
from tests.helpers.datasets import (
    CIFAR10_NAMES,
    LETTERS,
    RANDOM,
    pixels,
    python2_pickle,
    register,
    tinyimagenet_members,
    write_cifar10,
    write_folder,
    write_tar,
    write_zip,
)


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


def test_tinyimagenet_archive(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_zip(tmp_path / "tiny-imagenet-200-mini.zip", tinyimagenet_members())
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert CATALOG["tinyimagenet"].md5 == "90528d7ca1a48142e341f4ef8d21d0de"
    file = tmp_path / "tiny-imagenet-200.zip"
    write_zip(file, tinyimagenet_members())
    prepare("tinyimagenet", tmp_path)
    assert f"{file} is not the original: its md5 is" in caplog.text
    (tmp_path / "tinyimagenet.npz").unlink()
    caplog.clear()
    register(monkeypatch, "tinyimagenet", md5=hashlib.md5(file.read_bytes()).hexdigest())
    prepare("tinyimagenet", tmp_path)
    assert "md5" not in caplog.text


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


def test_wrong_image_size_in_a_catalog_set(tmp_path: Path) -> None:
    write_folder(tmp_path / "cifar10", LETTERS, size=16)
    with pytest.raises(ValueError, match=r"train/ant/000\.png has 16 x 16 pixels instead of 32 x 32"):
        prepare("cifar10", tmp_path, image_size=32)
    with pytest.raises(ValueError, match=r"cifar10 is an image folder: give image_size="):
        prepare("cifar10", tmp_path)


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
