"""Exports of a trained run from the command line: what is written, what is refused, and the file without torch."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from abn_exp.analysis.trained import Opener, find_trained
from abn_exp.binarize import BinaryConv2d, BinaryLinear
from abn_exp.data.prepare import load
from abn_exp.data.splits import first_of_each_class
from abn_exp.deploy import __main__ as classify
from abn_exp.deploy import export as exporting
from abn_exp.deploy import graph as tracing
from abn_exp.deploy.export import FILES, export, open_run
from abn_exp.deploy.fold import Fold
from abn_exp.deploy.onnx import OnnxRuntime, Writer, with_digest
from abn_exp.deploy.verify import Answer, Mismatch, verify
from abn_exp.errors import ConfigError, DamagedFile
from abn_exp.models import resnet18_paper
from abn_exp.norm import InstanceEnhancementBatchNorm2d
from abn_exp.results import find_runs, read_result
from abn_exp.trained_network import load_input_format, load_network
from abn_exp.training.run import run
from tests.helpers.datasets import write_folder
from tests.helpers.runs import plan_in, trained_study
from tests.helpers.scripts import run_script


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with ABN."""
    study = shutil.copytree(trained_study(tmp_path_factory), tmp_path_factory.mktemp("results") / "runs")
    return next(run.directory for run in find_runs(study) if run.norm == "abn")


@pytest.fixture(scope="module")
def exported(trained: Path) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run_script(monkeypatch, "export", trained) == 0
    return trained / "export"


def fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run_script(monkeypatch, "export", *arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    return captured.err


def test_the_summary_says_what_was_written_and_compared(trained: Path, exported: Path) -> None:
    summary = json.loads((exported / "summary.json").read_text())
    result = read_result(trained)
    assert result is not None
    assert sorted(path.name for path in exported.iterdir()) == ["network.onnx", "summary.json", "summary.md"]
    assert summary["bytes"]["float32"] == result.parameters["bytes_real"]
    assert summary["bytes"]["theory"] == result.parameters["bytes_packed"]
    assert summary["bytes"]["file"] == (exported / "network.onnx").stat().st_size
    assert summary["operations"]["binary_macs"] == result.parameters["binary_macs"]
    assert [layer["folded"] for layer in summary["layers"]] == [False] + [True] * 6
    assert summary["layers"][0]["real_because"] == "stem.conv has real weights"
    engine = summary["engines"]["ONNX Runtime"]
    assert engine["test_images"] == 359
    if not engine["predictions_changed"]:
        assert engine["accuracy"] == pytest.approx(result.test_acc)
    text = (exported / "summary.md").read_text()
    assert "359 test images" in text
    assert "| layer1.conv | stem.norm | real: stem.conv has real weights |" in text


def test_the_other_weights_and_another_folder(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_script(monkeypatch, "export", trained, "--weights", "best", "--out", tmp_path / "out", "--strict") == 0
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["weights"] == "best"


def images_in(folder: Path, count: int) -> list[Path]:
    pixels = load("digits", folder).test.images[:count]
    paths = [folder / f"{i}.png" for i in range(count)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return paths


WITHOUT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "scipy", "hydra", "pydantic", "onnx", "yaml"):
            raise ImportError(f"{name} is not installed")
sys.meta_path.insert(0, Refuse())
from abn_exp.deploy.__main__ import main
sys.exit(main())
"""


def test_images_are_classified_without_torch(trained: Path, exported: Path, tmp_path: Path) -> None:
    paths = images_in(tmp_path, 8)
    command = [sys.executable, "-c", WITHOUT, str(exported / "network.onnx"), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    normalize = open_run(trained, "last", None).input_format.normalize
    with torch.no_grad():
        logits = load_network(trained)(normalize(load("digits", tmp_path).test.images[:8]))
    best = logits.softmax(1).max(1)
    expected = [f"{p}: {k} ({v:.1%})" for p, v, k in zip(paths, best.values, best.indices.tolist(), strict=True)]
    assert done.stdout.splitlines() == expected


def classify_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["abn_exp.deploy", *map(str, arguments)])
    assert classify.main() == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    return captured.err


def test_mistakes_of_who_classifies_are_one_sentence(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    network = exported / "network.onnx"
    (image,) = images_in(tmp_path, 1)
    content = network.read_bytes()
    damaged = tmp_path / "damaged.onnx"
    for cut in (content[:1000], b"", b"\x00" * 100, content[:-1]):
        damaged.write_bytes(cut)
        assert f"{damaged} is damaged" in classify_fails(monkeypatch, capsys, damaged, image) or cut == b""
    bits = max(onnx.load(network).graph.initializer, key=lambda tensor: len(tensor.raw_data)).raw_data
    damaged.write_bytes(content.replace(bits, bits[:100] + bytes([bits[100] ^ 4]) + bits[101:]))
    assert "its SHA-256 is not the one" in classify_fails(monkeypatch, capsys, damaged, image)
    damaged.write_bytes(content.replace(b"sha256", b"sha257"))
    assert "its SHA-256 is not the one" in classify_fails(monkeypatch, capsys, damaged, image)

    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    same = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    foreign = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [same])
    onnx.save(
        onnx.helper.make_model(foreign, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8), damaged
    )
    assert "was not written by scripts/export.py" in classify_fails(monkeypatch, capsys, damaged, image)
    Image.new("RGB", (32, 32)).save(tmp_path / "program.png", "EPS")  # which Ghostscript would run
    assert "is no image" in classify_fails(monkeypatch, capsys, network, tmp_path / "program.png")

    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((32, 32), 4000, np.uint16)).save(deep)
    assert "has more than 8 bits a channel (mode I;16); convert it first" in classify_fails(
        monkeypatch, capsys, network, deep
    )
    other = tmp_path / "other.png"
    Image.new("L", (40, 30)).save(other)
    assert "has 40 x 30 pixels; this network takes 32 x 32" in classify_fails(
        monkeypatch, capsys, network, image, other
    )
    other.write_text("no image")
    assert "is no image that is read here: BMP, GIF, " in classify_fails(monkeypatch, capsys, network, other)
    assert "No such file" in classify_fails(monkeypatch, capsys, network, tmp_path / "gone.png")
    assert "No such file" in classify_fails(monkeypatch, capsys, tmp_path / "gone.onnx", image)


def test_mistakes_of_who_exports_are_one_sentence(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is no run's folder" in fails(monkeypatch, capsys, tmp_path)
    empty = tmp_path / "seed-0"
    empty.mkdir()
    (empty / "config.yaml").write_bytes((trained / "config.yaml").read_bytes())
    assert "has no checkpoints/last.ckpt" in fails(monkeypatch, capsys, empty)
    (empty / "checkpoints").mkdir()
    (empty / "checkpoints/last.ckpt").write_bytes((trained / "checkpoints/last.ckpt").read_bytes()[:-5000])
    assert "is not of a finished run; train to the end first." in fails(monkeypatch, capsys, empty)
    shutil.copy(trained / "result.json", empty)
    assert "is damaged" in fails(monkeypatch, capsys, empty)

    config = (trained / "config.yaml").read_text().replace("name: digits", "name: cifar10")
    (empty / "config.yaml").write_text(config)
    (empty / "checkpoints/last.ckpt").write_bytes((trained / "checkpoints/last.ckpt").read_bytes())
    message = fails(monkeypatch, capsys, empty, "--root", tmp_path / "nothing")
    assert "An export is verified on its test set, which is not at hand" in message
    assert not (empty / "export").exists()

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "This needs onnxruntime, which is not installed; pip install" in fails(monkeypatch, capsys, trained)


def test_strict_refuses_a_norm_that_stays_real(trained: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = resnet18_paper(10, 32, InstanceEnhancementBatchNorm2d, width=0.25).eval().requires_grad_(False)
    subject = replace(open_run(trained, "last", None), network=network)
    with pytest.raises(ConfigError, match=r"layer1\.0\.conv1 reads signs of real values of stem\.norm: aten\.mean"):
        export(subject, tmp_path / "out", strict=True)
    assert not (tmp_path / "out").exists()


def test_no_file_is_left_where_an_engine_decides_otherwise(
    trained: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in FILES:
        (out / name).write_text("of an earlier export")

    def wrong(*arguments: Any) -> Fold:
        found = fold(*arguments)
        moved = np.where(found.thresholds <= found.limit - 2, found.thresholds + 2, found.thresholds)
        return Fold(found.first, moved.astype(np.int32), found.limit)

    fold = tracing.fold
    monkeypatch.setattr(tracing, "fold", wrong)
    with pytest.raises(
        Mismatch, match=r"layer2\.conv reads other bits than torch's, folded from .*, first in test image \d"
    ):
        export(open_run(trained, "last", None), out)
    assert list(out.iterdir()) == []


def test_of_an_engine_that_decides_otherwise_no_older_file_is_left(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in FILES:
        (out / name).write_text("of an earlier export")

    def wrong(*_: Any) -> Any:
        raise Mismatch("layer2.conv reads other bits than torch's")

    monkeypatch.setattr("abn_exp.deploy.export.require_extra", lambda *_: None)
    monkeypatch.setattr("abn_exp.deploy.export._openvino", wrong)
    summary = export(open_run(trained, "last", None), out, openvino=True)
    assert summary["engines"]["OpenVINO"] == "layer2.conv reads other bits than torch's"
    assert {path.name for path in out.iterdir()} == {"network.onnx", "summary.json", "summary.md"}


def test_what_a_part_of_the_test_set_is_compared_with_is_of_all_classes(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of images is read class by class. And an image has its number in the whole set."""
    opened, seen = open_run(trained, "last", None), []
    test, order = opened.data.test, opened.data.test.labels.argsort()
    by_class = replace(test, images=test.images[order], labels=test.labels[order])

    def recorded(network: Any, graph: Any, engine: Any, images: Any, labels: Tensor, *others: Any) -> Any:
        seen.append(labels)
        changing = (lambda images: wrong(engine(images))) if len(labels) == 20 else engine
        return verify(network, graph, changing, images, labels, *others)

    def wrong(answer: Answer) -> Answer:
        answer.bits["layer2.conv"][-1] *= -1
        return answer

    def of_twenty(run: Any, graph: Any, check: Any) -> Any:
        writer = Writer(graph)
        engine = OnnxRuntime(with_digest(writer.model(run.input_format, {})), writer.codes, 1)
        return check(engine, 20), {}, []

    monkeypatch.setattr(exporting, "verify", recorded)
    monkeypatch.setattr(exporting, "_qonnx", of_twenty)
    monkeypatch.setattr(exporting, "require_extra", lambda *_: None)
    summary = export(replace(opened, data=replace(opened.data, test=by_class)), tmp_path / "out", qonnx=True)
    last = int(first_of_each_class(by_class.labels, 20)[-1])
    assert last > 300
    assert f"first in test image {last} (counted from 0)" in summary["engines"]["qonnx"]
    assert torch.equal(seen[0], by_class.labels)  # the whole set, in its order
    assert seen[1].bincount().tolist() == [2] * 10


def test_what_has_changed_in_a_folder_since_the_training_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export names the classes that were trained, and normalises as in training."""
    write_folder(tmp_path / "images", ["cat", "dog"], per_class=20)
    words = ["dataset=folder", f"dataset.path={tmp_path}/images", f"dataset.root={tmp_path}", "model.width=0.0625"]
    words += ["recipe.epochs=1", "recipe.batch_size=8", "recipe.val_fraction=0.2", "wandb=disabled"]
    plan = plan_in(tmp_path / "results", *words, tiny=False)
    run(plan, "python train.py")
    inputs = load_input_format(plan.directory)
    image = np.full((32, 32, 3), 255, np.uint8)
    for i in range(20):
        Image.fromarray(image).save(tmp_path / "images" / "train" / "cat" / f"white{i}.png")
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    moved = (tmp_path / "images").rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="has no folder 'train'"):
        open_run(plan.directory, "last", None)
    assert len(open_run(plan.directory, "last", str(moved)).data.test.labels) == 40
    assert len(Opener(str(moved), None, torch.device("cpu")).images(find_runs(plan.study)[0]).labels) == 40
    moved.rename(tmp_path / "images")
    opened = open_run(plan.directory, "last", None)
    assert opened.data.classes == ("cat", "dog")
    assert opened.input_format == inputs
    (found,) = find_trained([plan.study])
    before = Opener(None, None, torch.device("cpu"))
    images = before.images(found)
    expected = inputs.normalize(images.data.test.images)
    torch.testing.assert_close(images.normalized, expected)
    text = (plan.directory / "input.json").read_text()
    (plan.directory / "input.json").write_text("{}")
    with pytest.raises(DamagedFile, match=r"input\.json is damaged"):  # and not measured again in silence
        open_run(plan.directory, "last", None)
    (plan.directory / "input.json").write_text(text)
    write_folder(tmp_path / "images", ["ant"])
    with pytest.raises(ConfigError, match="has other classes now than when"):
        open_run(plan.directory, "last", None)
    with pytest.raises(ValueError, match="has other classes now than when"):
        Opener(None, None, torch.device("cpu")).images(found)


def test_a_layer_that_is_used_twice_is_refused(trained: Path, tmp_path: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
            self.binary, self.head = BinaryConv2d(4, 4, 3, padding=1), nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.binary(self.norm(self.stem(x))))
            return self.head(self.binary(x).mean((2, 3)))

    subject = replace(open_run(trained, "last", None), network=Shared().eval().requires_grad_(False))
    with pytest.raises(ConfigError, match="binary is used twice in this network"):
        export(subject, tmp_path / "out")


def test_a_fold_behind_flatten_has_a_threshold_for_each_place(trained: Path, tmp_path: Path) -> None:
    """BatchNorm1d then has more channels than the convolution whose sums it reads."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        BinaryConv2d(4, 4, 3, stride=4, padding=1),
        nn.Flatten(),
        nn.BatchNorm1d(256),
        BinaryLinear(256, 10),
        nn.BatchNorm1d(10),
    )
    with torch.no_grad():
        for _ in range(5):
            network(torch.randn(64, 3, 32, 32))
    subject = replace(open_run(trained, "last", None), network=network.eval().requires_grad_(False))
    summary = export(subject, tmp_path / "out")
    assert summary["layers"][1]["folded"]
    assert summary["engines"]["ONNX Runtime"]["folded_bits_equal"] == 256 * 359


def test_comparisons_are_counted_where_they_are_made(trained: Path, tmp_path: Path) -> None:
    """Before a pool that follows the norm, and once for two layers that read the same bits."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
            self.sums, self.norm = BinaryConv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.one, self.other = BinaryConv2d(4, 4, 3), BinaryConv2d(4, 4, 3)
            self.head = nn.Linear(4, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = nn.functional.max_pool2d(self.norm(self.sums(self.first(self.stem(x)))), 2)
            return self.head((self.one(x) + self.other(x)).mean((2, 3)))

    torch.manual_seed(0)
    network = Pooled()
    with torch.no_grad():
        for _ in range(20):
            network(torch.randn(64, 3, 32, 32))
    subject = replace(open_run(trained, "last", None), network=network.eval().requires_grad_(False))
    summary = export(subject, tmp_path / "out")
    (one, other) = (layer for layer in summary["layers"] if layer["folded"])
    assert one["one_threshold"] == other["one_threshold"] == 4
    assert summary["operations"]["integer_comparisons"] == 4 * 32 * 32
