"""Class-activation maps: against captum, maps made by hand, a network whose answer is known; then end to end."""

import csv
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import LayerAttribution, LayerGradCam
from torch import Tensor, nn

from abn_exp.analysis import cam, trained
from abn_exp.data import prepare
from abn_exp.data.splits import first_of_each_class
from abn_exp.models import binarynet, resnet18
from abn_exp.models.build import initialize_
from abn_exp.norm import AttentionBatchNorm2d
from abn_exp.results import find_runs
from tests.helpers.scripts import analyze, files

BOX = torch.tensor([[2, 0, 3, 1]])  # columns 2 and 3 of rows 0 and 1


@pytest.mark.parametrize(
    ("network", "size", "layer", "cells"),
    [
        (binarynet(5, 32, AttentionBatchNorm2d, width=0.0625), 32, "layer5", 4),
        (resnet18(5, 32, nn.BatchNorm2d, width=0.125), 32, "layer4", 4),
        (resnet18(5, 16, nn.BatchNorm2d, width=0.125), 16, "layer3", 4),  # layer4 has 2 x 2
        (binarynet(5, 16, nn.BatchNorm2d, width=0.0625), 16, "layer5.conv", 4),  # the pool behind it, too
    ],
)
def test_grad_cam_is_captum_s(network: nn.Module, size: int, layer: str, cells: int) -> None:
    initialize_(network, 0).eval()
    images = torch.randn(6, 3, size, size, generator=torch.Generator().manual_seed(0))
    assert cam.target_layer(network, images) == layer
    for targets in (None, torch.tensor([0, 1, 2, 3, 4, 0])):
        found = cam.grad_cam(network, layer, images, targets)
        assert found.cells == (cells, cells)
        expected_targets = network(images).argmax(1) if targets is None else targets
        assert torch.equal(found.targets, expected_targets)
        torch.testing.assert_close(found.probabilities, network(images).softmax(1).detach())
        oracle = LayerGradCam(network, network.get_submodule(layer))
        small = oracle.attribute(images, expected_targets, relu_attributions=True)
        large = LayerAttribution.interpolate(small, images.shape[2:], "bilinear")
        torch.testing.assert_close(found.maps, large[:, 0].detach())
        assert found.maps.amax() > 0


def test_of_a_layer_that_is_used_twice_the_map_is_its_last() -> None:
    conv, act, other = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))
    twice = nn.Sequential(conv, act, other, nn.Sequential(act), head)
    apart = nn.Sequential(conv, nn.ReLU(), other, nn.Sequential(nn.ReLU()), head)
    images = torch.randn(2, 3, 16, 16)
    found, expected = cam.grad_cam(twice, "1", images), cam.grad_cam(apart, "3.0", images)
    torch.testing.assert_close(found.maps, expected.maps)


def test_no_map_large_enough() -> None:
    with pytest.raises(ValueError, match="no feature map of at least 4 x 4"):
        cam.target_layer(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), torch.zeros(1, 3, 8, 8))


def test_energy_inside_the_box() -> None:
    maps = torch.zeros(3, 4, 4)
    maps[0, 0, 2], maps[0, 3, 3] = 3.0, 1.0
    maps[1] = 1.0
    boxes = BOX.expand(3, 4)
    assert cam.box_area(boxes, 4).tolist() == [0.25] * 3
    assert cam.energy_inside(maps, boxes).tolist() == [0.75, 0.25, 0.25]  # the third knows nothing: chance


def test_rows_and_columns_are_not_swapped() -> None:
    mask = cam.inside(torch.tensor([[1, 0, 3, 0]]), 4)[0]
    assert mask.tolist() == [[False, True, True, True], *[[False] * 4] * 3]


def test_pointing_game() -> None:
    maps = torch.zeros(4, 4, 4)
    maps[0, 1, 3], maps[0, 2, 2] = 2.0, 1.0  # a hit
    maps[1, 2, 3] = 1.0  # just below the box
    maps[2, 0, 3], maps[2, 3, 0] = 1.0, 1.0  # one of two maxima
    assert cam.pointing_game(maps, BOX.expand(4, 4)).tolist() == [1.0, 0.0, 0.5, 0.25]


def test_order_by_importance_and_ties() -> None:
    maps = torch.tensor([[[0.0, 2.0], [0.0, 1.0]]])
    ties = torch.tensor([[[0.1, 0.0], [0.9, 0.0]]])
    assert cam.by_importance(maps, ties).tolist() == [[1, 3, 2, 0]]


def test_random_maps_depend_on_the_image_alone() -> None:
    together = cam.random_maps(torch.tensor([7, 8]), (4, 4), 32)
    assert torch.equal(together[1:], cam.random_maps(torch.tensor([8]), (4, 4), 32))
    assert not torch.equal(together[0], together[1])


class Quadrant(nn.Module):
    """Logits (8 x the mean of the image's upper left quarter, 0), behind a layer that copies the image."""

    def __init__(self) -> None:
        super().__init__()
        self.copy = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.copy(x)
        mean = x[:, :, : x.shape[2] // 2, : x.shape[3] // 2].mean((1, 2, 3))
        return torch.stack([8 * mean, torch.zeros_like(mean)], 1)


def test_deletion_and_insertion_where_the_answer_is_known() -> None:
    size = 8
    images, targets = torch.ones(1, 3, size, size), torch.tensor([0])
    perfect = torch.zeros(1, size, size)
    perfect[:, :4, :4] = 1
    ties = torch.arange(size * size, 0.0, -1).view(1, size, size)
    steps = np.arange(cam.STEPS + 1) / cam.STEPS
    left = np.clip(1 - 4 * steps, 0, 1)  # of the quarter that counts
    cases = [
        (perfect, images, torch.zeros_like(images), left),
        (1 - perfect, images, torch.zeros_like(images), 1 - np.clip(4 * steps - 3, 0, 1)),
        (perfect, torch.zeros_like(images), images, 1 - left),
    ]
    areas = []
    for maps, before, after, share in cases:
        order = cam.by_importance(maps, ties)
        ends = cam.probability(Quadrant(), before, targets), cam.probability(Quadrant(), after, targets)
        curve = cam.replacement_curve(Quadrant(), before, after, order, targets, ends)
        expected = 1 / (1 + np.exp(-8 * share))
        np.testing.assert_allclose(curve[0], expected, rtol=1e-5)
        areas.append(float(cam.area_under(curve)))
        assert areas[-1] == pytest.approx(np.trapezoid(expected, steps), rel=1e-5)
    assert areas[0] < 0.61 < 0.9 < areas[1]


def test_a_map_that_knows_gains_over_a_random_one() -> None:
    images = torch.ones(12, 3, 8, 8) * torch.linspace(0.5, 1, 12).view(-1, 1, 1, 1)
    images[:, :, 4:] = -1  # Grad-CAM of an identity is the image's own positive part
    images[:, :, :, 4:] = -1
    labels = torch.tensor([0, 1] * 6)
    boxes = torch.tensor([[0, 0, 3, 3]]).expand(12, 4)
    scores = cam.analyze(Quadrant(), images, labels, torch.arange(12), boxes)
    assert scores["deletion_gain"].min() > 0
    assert scores["insertion_gain"].mean() > 0
    np.testing.assert_allclose(scores["energy_inside"], 1)
    np.testing.assert_allclose(scores["pointing_game"], 1)
    np.testing.assert_allclose(scores["box_area"], 0.25)
    assert scores["correct"].tolist() == [True, False] * 6
    of_label = cam.analyze(Quadrant(), images, labels, torch.arange(12), boxes, "label")
    np.testing.assert_allclose(of_label["probability"][1::2], 1 - scores["probability"][1::2], rtol=1e-3)


def test_curves_begin_and_end_with_the_whole_images() -> None:
    """Four curves of an image share their ends, each computed once."""
    network = initialize_(binarynet(10, 16, AttentionBatchNorm2d, width=0.0625), 0).eval()
    images = torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    scores = cam.analyze(network, images, torch.zeros(9, dtype=torch.int64), torch.arange(9))
    targets = torch.from_numpy(scores["predicted"])
    for key, before, after in (
        ("deletion", images, torch.zeros_like(images)),
        ("random_deletion", images, torch.zeros_like(images)),
        ("insertion", cam.blur(images), images),
        ("random_insertion", cam.blur(images), images),
    ):
        for end, shown in ((0, before), (-1, after)):
            expected = cam.probability(network, shown, targets)
            np.testing.assert_allclose(scores[key][:, end], expected, rtol=1e-5)


def test_first_of_each_class() -> None:
    labels = torch.tensor([1, 1, 0, 1, 0, 2])
    assert first_of_each_class(labels, 3).tolist() == [0, 2, 5]
    assert first_of_each_class(labels, 5).tolist() == [0, 1, 2, 4, 5]
    assert first_of_each_class(labels, None).tolist() == list(range(6))


@pytest.mark.slow
def test_end_to_end(study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [run.directory for run in find_runs(study)]

    def with_boxes(*arguments: Any, **options: Any) -> prepare.ImageDataset:
        data = prepare.load(*arguments, **options)
        return replace(data, test_boxes=torch.tensor([[8, 4, 23, 27]]).expand(len(data.test.labels), 4))

    monkeypatch.setattr(trained, "load", with_boxes)
    out = Path(folders[0].parents[2] / "analysis" / "cam")  # what the runs share: .../digits/binarynet
    assert analyze(monkeypatch, "cam", "--images", 40, *folders) == 0
    shown = capsys.readouterr().out
    text = (out / "summary.md").read_text()
    for measure in ("share inside the box", "pointing game", "deletion gain", "insertion gain"):
        assert re.search(
            rf"- \*\*(higher|lower|undecided)\*\*: On digits with binarynet, {measure} is .* n = 2 paired",
            text,
        )
        assert measure in " ".join(shown.split())
    for name in ("deletion", "insertion", "maps"):
        assert f"({name}_digits_binarynet.png)" in text
        assert (out / f"{name}_digits_binarynet.png").stat().st_size > 0
    assert str(folders[0].parents[3]) not in text
    with open(out / "images.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 40
    assert {row["image"] for row in rows if row["norm"] == "bn"} == {r["image"] for r in rows if r["norm"] == "abn"}
    assert {float(row["box_area"]) for row in rows} == {16 * 24 / 1024}
    before = files(out)
    capsys.readouterr()
    assert analyze(monkeypatch, "cam", "--images", 40, *folders) == 0
    assert "4 of 4 networks were measured before" in capsys.readouterr().err
    assert files(out) == before


def test_a_set_without_boxes_takes_them_from_no_other(
    study: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same networks once more, as if of another set, whose images have boxes, and there are fewer."""
    other = shutil.copytree(study / "digits", study / "boxed")
    for path in other.rglob("config.yaml"):
        path.write_text(re.sub(r"(\n  root: ).*", rf"\1{tmp_path}/boxed", path.read_text(), count=1))
        (path.parent / "SHA256SUMS").unlink()

    def load(root: str, **options: Any) -> prepare.ImageDataset:
        data = prepare.load(root=root, **options)
        if not root.endswith("boxed"):
            return data
        test = replace(data.test, images=data.test.images[:12], labels=data.test.labels[:12])
        return replace(data, test=test, test_boxes=torch.tensor([[8, 4, 23, 27]]).expand(12, 4))

    monkeypatch.setattr(trained, "load", load)
    monkeypatch.setattr("abn_exp.report.figures.save", lambda *_: None)
    assert analyze(monkeypatch, "cam", "--images", 20, study, "--out", tmp_path / "out") == 0
    with open(tmp_path / "out" / "comparison.csv", newline="") as file:
        found = [(row["dataset"], row["measure"]) for row in csv.DictReader(file)]
    gains = ["deletion gain", "insertion gain"]
    assert sorted(found) == [
        *(("boxed", measure) for measure in sorted([*gains, "share inside the box", "pointing game"])),
        *(("digits", measure) for measure in gains),
    ]
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "Images: 12 (boxed), 20 (digits) of the test set" in text


def test_a_wrong_number_of_images(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        analyze(monkeypatch, "cam", "somewhere", "--images", 0)
    assert stop.value.code == 2
    assert "0 is not allowed; use a whole number, 1 or more" in capsys.readouterr().err
