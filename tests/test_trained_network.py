"""The network of a run: its configuration, its predictions and its input, of earlier versions too."""

import lzma
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from abn_exp.binarize import BinaryConv2d
from abn_exp.errors import ConfigError, DamagedFile
from abn_exp.models.build import initialize_
from abn_exp.records import NETWORK
from abn_exp.report.pack import pack
from abn_exp.results import RunResult, find_runs, read_result, write_result
from abn_exp.trained_network import (
    InputFormat,
    Predictions,
    load_input_format,
    load_network,
    load_predictions,
    load_trained_network,
    pack_network,
    read_checkpoint,
    weights_file,
    write_config,
    write_input_format,
    write_predictions,
)
from tests.helpers.records import finish_run, start_run
from tests.helpers.runs import trained_study

# --- Weights ---


@pytest.mark.parametrize("sign_zero", ["plus", "zero"])
def test_a_packed_network_computes_the_same_where_latent_weights_are_zero(
    sign_zero: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    source = find_runs(trained_study(tmp_path_factory))[0].directory
    directory = shutil.copytree(source, tmp_path / "seed-0")
    text = (directory / "config.yaml").read_text()
    assert "sign_zero: plus" in text
    (directory / "config.yaml").write_text(text.replace("sign_zero: plus", f"sign_zero: {sign_zero}"))
    path = directory / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(path)
    for name in ("network.layer1.conv.weight", "network.head.1.weight"):
        checkpoint["state_dict"][name][:, ::3] = 0.0
        checkpoint["state_dict"][name][:, ::7] = -0.0
    torch.save(checkpoint, path)
    images = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = load_network(directory)(images)
    content = pack_network(directory)
    assert not torch.equal(expected, load_network(source)(images))
    shutil.rmtree(directory / "checkpoints")
    (directory / NETWORK).write_bytes(content)
    assert weights_file(directory) == directory / NETWORK
    packed = load_network(directory)
    assert torch.equal(packed(images), expected)
    values = {0.0, -1.0, 1.0} if sign_zero == "zero" else {-1.0, 1.0}
    assert set(packed.get_parameter("layer1.conv.weight").unique().tolist()) == values
    assert pack_network(directory) == content
    (directory / NETWORK).write_bytes(content[:-50])
    with pytest.raises(DamagedFile, match=r"network.ckpt is damaged"):
        load_network(directory)


class Scaled(BinaryConv2d):
    """Of XNOR-Net and ReActNet: a channel is scaled by the mean size of its latent weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.weight.abs().mean((1, 2, 3)).view(1, -1, 1, 1)


def scaled_network(num_classes: int, image_size: int, norm_layer: Callable[[int], nn.Module]) -> nn.Module:
    layers = nn.Conv2d(3, 8, 3), norm_layer(8), Scaled(8, 8, 3), norm_layer(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8, num_classes))


def test_a_network_that_uses_the_size_of_latent_weights_keeps_them(tmp_path: Path) -> None:
    norm = {"_target_": "torch.nn.BatchNorm2d", "_partial_": True}
    config = {"model": {"_target_": f"{__name__}.scaled_network"}, "norm": norm, "dataset": {"image_size": 16}}
    directory = start_run(tmp_path, "bn", 0, config=yaml.safe_dump(config))
    network = initialize_(scaled_network(4, 16, nn.BatchNorm2d), 0)
    (directory / "checkpoints").mkdir()
    state = {f"network.{name}": value for name, value in network.state_dict().items()}
    torch.save({"num_classes": 4, "state_dict": state}, directory / "checkpoints" / "last.ckpt")
    content = pack_network(directory)
    shutil.rmtree(directory / "checkpoints")
    (directory / NETWORK).write_bytes(content)
    images = torch.randn(5, 3, 16, 16)
    assert torch.equal(load_network(directory)(images), network.eval()(images))


def test_weights_that_there_cannot_be_are_not_to_be_trained_again_for(tmp_path: Path) -> None:
    """`force=true` would replace the run, and end in the same message."""
    directory = start_run(tmp_path, "bn", 0, config="recipe: {val_fraction: 0.0}\n")
    with pytest.raises(ConfigError, match="was trained without validation, so no weights of it are the best"):
        load_trained_network(directory, "best")


# --- Predictions ---


def result_of(directory: Path) -> RunResult:
    result = read_result(directory)
    assert result is not None
    return result


def predict(tmp_path: Path, classes: int, count: int = 1003, seed: int = 0) -> tuple[Path, np.ndarray, np.ndarray]:
    """Finish a run that is right for about half of the images; return its folder, the labels and the predictions."""
    random = np.random.default_rng(seed)
    labels = random.integers(classes, size=count)
    labels[0] = classes - 1
    guesses = np.where(random.random((2, count)) < 0.5, labels, random.integers(classes, size=(2, count)))
    directory = start_run(tmp_path, "bn", seed)
    write_predictions(directory, labels, guesses[0], guesses[1])
    write_result(directory, result_of(finish_run(tmp_path.with_name("other"), "bn", seed, 0.5)))
    shutil.rmtree(tmp_path.with_name("other"))
    return directory, labels, guesses


@pytest.mark.parametrize(("classes", "dtype"), [(10, np.uint8), (256, np.uint8), (257, np.uint16)])
def test_predictions_come_back(tmp_path: Path, classes: int, dtype: type) -> None:
    directory, labels, guesses = predict(tmp_path, classes)
    found = load_predictions(directory)
    assert isinstance(found, Predictions)
    assert found.last.dtype == dtype
    assert found.best is not None
    assert found.best_correct is not None
    for predicted, correct, expected in zip(
        (found.last, found.best), (found.last_correct, found.best_correct), guesses, strict=True
    ):
        assert np.array_equal(predicted, expected)
        assert np.array_equal(correct, expected == labels)
    (run,) = find_runs(tmp_path / "digits")
    assert run.result is not None
    for form in (run, run.result, str(directory)):
        assert np.array_equal(load_predictions(form).last, guesses[0])
    write_predictions(directory, labels, guesses[0], None)
    assert load_predictions(directory).best is load_predictions(directory).best_correct is None


def test_predictions_are_checked_packed_and_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, labels, guesses = predict(tmp_path / "results" / "study", 10)
    before = (directory / "predictions.npz").read_bytes()
    write_predictions(directory, labels, guesses[0], guesses[1])
    assert (directory / "predictions.npz").read_bytes() == before
    assert "predictions.npz" in (directory / "SHA256SUMS").read_text()
    monkeypatch.setattr("abn_exp.report.build.draw", lambda report: {})
    (packed,) = find_runs(pack(tmp_path / "results" / "study").folder)
    assert np.array_equal(load_predictions(packed).last, guesses[0])
    (directory / "predictions.npz").write_bytes(before[:-1] + b"x")
    (run,) = find_runs(tmp_path / "results" / "study")
    assert run.status == "damaged"
    assert "predictions.npz is damaged: its SHA-256" in str(run.reason)


def test_what_is_no_file_of_predictions_is_told(tmp_path: Path) -> None:
    directory = finish_run(tmp_path, "bn", 0, 0.5)
    with pytest.raises(FileNotFoundError, match=r"has no predictions.npz: the run is of an earlier version"):
        load_predictions(directory)
    for content in (b"", b"PK\x03\x04", lzma.compress(b"x")):
        (directory / "predictions.npz").write_bytes(content)
        with pytest.raises(DamagedFile, match=r"predictions.npz is damaged"):
            load_predictions(directory)
    with open(directory / "predictions.npz", "wb") as file:  # it would have to be unpickled
        np.savez(file, last=np.array([{}], dtype=object), labels_sha256=np.array("0"))
    with pytest.raises(DamagedFile, match="allow_pickle"):
        load_predictions(directory)


def test_a_command_of_several_lines_is_a_comment_of_one(tmp_path: Path) -> None:
    write_config(tmp_path, {"a": 1}, "python train.py 'question=Does it\nhelp?'")
    assert (tmp_path / "config.yaml").read_text() == "# python train.py 'question=Does it help?'\na: 1\n"


# --- What a network takes ---


def test_input_format_comes_back_and_normalises(tmp_path: Path) -> None:
    directory = start_run(tmp_path, "bn", 0)
    written = InputFormat(32, (0.5, 0.25, 0.0), (0.5, 0.25, 1.0), ("cat", "dog"))
    write_input_format(directory, written)
    assert load_input_format(directory) == written
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    expected = torch.tensor([[-1.0, -1.0, 0.0], [1.0, 3.0, 1.0]]).view(2, 3, 1, 1).expand(2, 3, 4, 4)
    torch.testing.assert_close(written.normalize(images), expected)
    pixels = images.float()
    torch.testing.assert_close(written.normalize(pixels), expected)
    assert torch.equal(pixels, images.float())  # not in place
    (directory / "input.json").write_text("{}")
    with pytest.raises(DamagedFile):
        load_input_format(directory)


def test_input_format_of_an_older_run_is_what_its_configuration_says(tmp_path: Path) -> None:
    config = "dataset: {{image_size: 32, mean: {0}, std: {0}, images: null}}\nrecipe: {{normalization: {1}}}\n"
    own = start_run(tmp_path, "bn", 0, config=config.format([0.5, 0.5, 0.5], "dataset"))
    assert load_input_format(own) == InputFormat(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), None)
    imagenet = start_run(tmp_path, "bn", 1, config=config.format([0.5, 0.5, 0.5], "imagenet"))
    assert load_input_format(imagenet).mean == (0.485, 0.456, 0.406)
    measured = start_run(tmp_path, "bn", 2, config=config.format("null", "dataset"))
    with pytest.raises(ValueError, match=r"has no input\.json: measure mean and std"):
        load_input_format(measured)
