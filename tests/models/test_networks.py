import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from hydra.utils import instantiate
from torch import Tensor, nn

from abn_exp import models
from abn_exp.binarize import Binarization, BinaryConv2d, BinaryLinear
from abn_exp.models.build import initialize_, restore_biases_
from abn_exp.norm import AttentionBatchNorm2d
from tests.helpers.runs import REPOSITORY

CONF = REPOSITORY / "conf"
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
NORMS = sorted(path.stem for path in (CONF / "norm").glob("*.yaml"))
BINARY = BinaryConv2d | BinaryLinear
Step = tuple[str, tuple[int, ...]]


def norm_layer(name: str) -> Callable[[int], nn.Module]:
    return instantiate(yaml.safe_load((CONF / "norm" / f"{name}.yaml").read_text()))


def configured(
    name: str, image_size: int = 32, num_classes: int = 10, norm: str = "abn", **changes: Any
) -> nn.Module:
    node = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())
    return instantiate(
        {**node, **changes}, num_classes=num_classes, image_size=image_size, norm_layer=norm_layer(norm)
    )


def on_meta(name: str, **arguments: Any) -> Any:
    with torch.device("meta"):
        return configured(name, **arguments)


def small(name: str, norm: str = "abn", seed: int = 0, **arguments: Any) -> Any:
    return initialize_(configured(name, norm=norm, width=0.25, image_size=16, num_classes=3, **arguments), seed)


def two_values(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0)


def order_of(network: nn.Module, image_size: int) -> list[Step]:
    """(layer, what it is, its output's shape without the batch) in the order of execution."""
    seen = []
    kinds = {BinaryConv2d: "binary", BinaryLinear: "binary", nn.Conv2d: "real", nn.Linear: "real"}
    kinds |= {AttentionBatchNorm2d: "norm", nn.BatchNorm1d: "bn1d", nn.Hardtanh: "hardtanh"}
    kinds |= {nn.MaxPool2d: "maxpool", nn.AvgPool2d: "avgpool", nn.AdaptiveAvgPool2d: "avgpool"}

    def hook(module: nn.Module, _: object, output: Tensor) -> None:
        if type(module) in kinds:
            seen.append((kinds[type(module)], tuple(output.shape[1:])))

    for module in network.modules():
        module.register_forward_hook(hook)
    network(torch.zeros(2, 3, image_size, image_size, device="meta"))
    return seen


def vgg_order(channels: list[int], size: int) -> list[Step]:
    expected: list[Step] = []
    for i, width in enumerate(channels):
        expected.append(("binary" if i else "real", (width, size, size)))
        if i % 2:
            size //= 2
            expected.append(("maxpool", (width, size, size)))
        expected += [("norm", (width, size, size)), ("hardtanh", (width, size, size))]
    return expected


@pytest.mark.parametrize(("image_size", "num_classes", "features"), [(32, 10, 8192), (64, 200, 32768)])
def test_binarynet_is_the_published_one_layer_by_layer(image_size: int, num_classes: int, features: int) -> None:
    network = on_meta("binarynet", image_size=image_size, num_classes=num_classes)
    expected = vgg_order([384, 384, 768, 768, 1536, 512], image_size)
    expected += [("binary", (1024,)), ("bn1d", (1024,)), ("hardtanh", (1024,))] * 2
    expected += [("real", (num_classes,)), ("bn1d", (num_classes,))]
    assert order_of(network, image_size) == expected
    assert network.head[1].in_features == features
    assert [layer.affine for layer in network.head if isinstance(layer, nn.BatchNorm1d)] == [True, True, False]


@pytest.mark.parametrize(("image_size", "features"), [(32, 8192), (64, 32768)])
def test_vgg_small_has_the_classic_convs_and_one_linear_layer(image_size: int, features: int) -> None:
    network = on_meta("vgg_small", image_size=image_size)
    expected: list[Step] = [*vgg_order([128, 128, 256, 256, 512, 512], image_size), ("real", (10,))]
    assert order_of(network, image_size) == expected
    assert network.head[1].in_features == features
    assert network.head[1].bias is not None


@pytest.mark.parametrize(("image_size", "features"), [(32, 320), (64, 1280)])
def test_resnet18_paper_is_the_published_one_layer_by_layer(image_size: int, features: int) -> None:
    network = on_meta("resnet18_paper", image_size=image_size, num_classes=7)
    stem = (80, image_size, image_size)
    expected: list[Step] = [("real", stem), ("norm", stem), ("hardtanh", stem)]
    for stage, width in enumerate((80, 160, 320)):
        size = image_size >> stage
        shape = (width, size, size)
        for block in range(2):
            expected += [("binary", shape), ("norm", shape), ("binary", shape)]
            if stage and not block:
                expected += [("binary", shape), ("norm", shape)]  # the shortcut
            if (stage, block) != (2, 1):
                expected.append(("norm", shape))
    pooled = image_size // 32
    expected += [("avgpool", (320, pooled, pooled)), ("bn1d", (features,)), ("hardtanh", (features,))]
    expected += [("real", (7,)), ("bn1d", (7,))]
    assert order_of(network, image_size) == expected
    shortcuts = [network.layer2[0].shortcut[0], network.layer3[0].shortcut[0]]
    assert [(s.kernel_size, s.stride) for s in shortcuts] == [((1, 1), (2, 2))] * 2
    weighted = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weighted) - len(shortcuts) == 14


@pytest.mark.parametrize("shortcut", ["bireal", "post_norm"])
@pytest.mark.parametrize("image_size", [32, 64])
def test_resnet18_has_four_stages_of_two_blocks(image_size: int, shortcut: str) -> None:
    network = on_meta("resnet18", image_size=image_size, shortcut=shortcut)
    stem: tuple[int, ...] = (64, image_size, image_size)
    expected: list[Step] = [("real", stem), ("norm", stem)] + [("hardtanh", stem)] * (shortcut == "post_norm")
    for stage, width in enumerate((64, 128, 256, 512)):
        size = image_size >> stage
        shape = (width, size, size)
        for block in range(2):
            unit: list[Step] = [("binary", shape), ("norm", shape)]
            down: list[Step] = [("avgpool", (width // 2, size, size)), ("real", shape), ("norm", shape)]
            down *= bool(stage and not block)
            expected += unit + down + unit if shortcut == "bireal" else unit + unit + down
    expected += [("avgpool", (512, 1, 1)), ("real", (10,))]
    assert order_of(network, image_size) == expected


@pytest.mark.parametrize(
    ("name", "one_bit_weights"),
    [
        ("binarynet", 36_421_632),
        ("vgg_small", 4_571_136),
        ("resnet18", 10_985_472),
        ("resnet18_paper", 4_326_400),
    ],
)
def test_one_bit_weights(name: str, one_bit_weights: int) -> None:
    layers = [layer for layer in on_meta(name).modules() if isinstance(layer, BINARY)]
    assert sum(layer.weight.numel() for layer in layers) == one_bit_weights
    assert all(layer.bias is None for layer in layers)


def test_parameters_are_the_published_count_less_the_redundant_ones() -> None:
    binarynet, resnet = on_meta("binarynet", norm="bn"), on_meta("resnet18_paper", norm="bn")
    conv_biases, linear_biases = 384 + 384 + 768 + 768 + 1536 + 512, 1024 + 10
    unused_norm, linear_bias = 2 * 320, 10
    assert sum(p.numel() for p in binarynet.parameters()) == 36_460_426 - conv_biases - linear_biases
    assert sum(p.numel() for p in resnet.parameters()) == 4_338_030 - unused_norm - linear_bias


@pytest.mark.parametrize("name", MODELS)
def test_configuration_and_signature_agree(name: str) -> None:
    node = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())
    assert node.pop("_target_") == f"abn_exp.models.{name}"
    node["binarization"] = instantiate(node["binarization"])
    parameters = inspect.signature(getattr(models, name)).parameters
    assert list(parameters)[:3] == ["num_classes", "image_size", "norm_layer"]
    assert node == {key: parameters[key].default for key in list(parameters)[3:]}


@pytest.mark.parametrize("name", MODELS)
def test_feature_map_norms_are_the_group_s_and_the_others_are_batch_norm_1d(name: str) -> None:
    network = on_meta(name, norm="abn")
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    head = [m for m in network.head.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert {type(m) for m in norms if m not in head} == {AttentionBatchNorm2d}
    assert {type(m) for m in head} <= {nn.BatchNorm1d}


@pytest.mark.parametrize("name", MODELS)
def test_stem_and_last_layer_are_real_and_binarization_reaches_every_other(name: str) -> None:
    binarization = Binarization("clipped", "reste", "zero", -1.0)
    network = getattr(models, name)(10, 32, nn.BatchNorm2d, 0.125, binarization=binarization)
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert not isinstance(layers[0], BINARY)
    assert not isinstance(layers[-1], BINARY)
    assert {m.binarization for m in layers if isinstance(m, BINARY)} == {binarization}
    if name != "resnet18":  # whose 1x1 shortcuts are real, too
        assert all(isinstance(m, BINARY) for m in layers[1:-1])


@pytest.mark.parametrize(
    ("width", "convs", "hidden"),
    [
        (1, [128, 128, 256, 256, 512, 512], 1024),
        (0.5, [64, 64, 128, 128, 256, 256], 512),
        (2, [256, 256, 512, 512, 1024, 512], 1024),
        (0.01, [2, 2, 2, 2, 6, 6], 10),
    ],
)
def test_binarynet_narrows_everywhere_and_widens_up_to_its_last_conv(
    width: float, convs: list[int], hidden: int
) -> None:
    network = on_meta("binarynet", width=width)
    assert [m.out_channels for m in network.modules() if isinstance(m, nn.Conv2d)] == convs
    assert [m.out_features for m in network.modules() if isinstance(m, BinaryLinear)] == [hidden, hidden]


@pytest.mark.parametrize(("name", "stages"), [("resnet18", [96, 192, 384, 768]), ("resnet18_paper", [24, 48, 96])])
def test_width_multiplies_the_stages(name: str, stages: list[int]) -> None:
    network = on_meta(name, width=1.5)
    assert [network.get_submodule(f"layer{i + 1}.0.conv1").out_channels for i in range(len(stages))] == stages


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 28}, "image_size=28 .* use a multiple of 8"),
        ({"image_size": 0}, "image_size=0 .* use a multiple of 8"),
        ({"width": 0}, "width=0 .* above 0"),
        ({"width": -1.0}, "width=-1.0 .* above 0"),
        ({"width": float("nan")}, "width=nan .* above 0"),
        ({"num_classes": 1}, "num_classes=1 .* at least 2"),
    ],
)
def test_impossible_networks_are_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        getattr(models, name)(**{"num_classes": 10, "image_size": 32, "norm_layer": nn.BatchNorm2d, **arguments})


def test_other_refusals() -> None:
    with torch.device("meta"):
        with pytest.raises(ValueError, match="image_size=40 does not fit the 8x8 average pool"):
            models.resnet18_paper(10, 40, nn.BatchNorm2d)
        with pytest.raises(ValueError, match="shortcut='none' is unknown; use one of bireal, post_norm"):
            models.resnet18(10, 32, nn.BatchNorm2d, shortcut="none")  # type: ignore[arg-type]


@pytest.mark.parametrize("image_size", [8, 16, 24, 32])
@pytest.mark.parametrize("name", MODELS)
def test_small_images_fit(name: str, image_size: int) -> None:
    network = on_meta(name, image_size=image_size)
    assert network(torch.zeros(2, 3, image_size, image_size, device="meta")).shape == (2, 10)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_with_every_norm(name: str, norm: str) -> None:
    network = small(name, norm)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    loss = F.cross_entropy(network(images), torch.tensor([0, 1, 2, 0]))
    loss.backward()
    gradients = {key: p.grad for key, p in network.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in gradients.values())
    assert all(grad.any() for key, grad in gradients.items() if "conv" in key)
    logits = network.eval()(images)
    assert logits.shape == (4, 3)
    torch.testing.assert_close(network(images[:1]), logits[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shortcut", ["bireal", "post_norm"])
def test_resnet18_s_blocks_are_their_equations(shortcut: str) -> None:
    block = small("resnet18", norm="bn", shortcut=shortcut).layer2[0].eval()
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    pool, conv, norm = block.shortcut
    down = norm(F.conv2d(F.avg_pool2d(x, 2), conv.weight))
    first = block.norm1(F.conv2d(two_values(x), two_values(block.conv1.weight), stride=2, padding=1))
    if shortcut == "bireal":
        h = first + down
        expected = block.norm2(F.conv2d(two_values(h), two_values(block.conv2.weight), padding=1)) + h
    else:
        h = first.clamp(-1, 1)
        expected = block.norm2(F.conv2d(two_values(h), two_values(block.conv2.weight), padding=1)) + down
        expected = expected.clamp(-1, 1)
    torch.testing.assert_close(block(x), expected)
    assert pool.kernel_size == 2


@pytest.mark.parametrize("position", ["layer2.0", "layer3.1"])
def test_the_paper_s_blocks_add_the_shortcut_before_the_norm(position: str) -> None:
    block = small("resnet18_paper", norm="bn").get_submodule(position).eval()
    channels, stride = (4, 2) if position == "layer2.0" else (16, 1)
    x = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    h = block.norm1(F.conv2d(two_values(x), two_values(block.conv1.weight), stride=stride, padding=1)).clamp(-1, 1)
    total = F.conv2d(two_values(h), two_values(block.conv2.weight), padding=1)
    if position == "layer3.1":
        expected = total + x
    else:
        conv, norm = block.shortcut
        total = total + norm(F.conv2d(two_values(x), two_values(conv.weight), stride=2))
        expected = block.norm2(total).clamp(-1, 1)
    torch.testing.assert_close(block(x), expected)


def test_what_a_binary_layer_reads_has_passed_hardtanh_where_the_estimator_has_no_gate() -> None:
    inputs = []
    for name in ("binarynet", "vgg_small", "resnet18_paper"):
        network = small(name)
        for layer in network.modules():
            if isinstance(layer, BINARY):
                layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].abs().max().item()))
        network(torch.randn(4, 3, 16, 16))
    assert max(inputs) == 1.0
    assert len(inputs) == 7 + 5 + 14


@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm != "abn"])
@pytest.mark.parametrize("name", MODELS)
def test_networks_that_differ_in_their_norm_start_alike(name: str, norm: str) -> None:
    reference, other = (dict(small(name, n, seed=3).named_parameters()) for n in ("abn", norm))
    shared = [key for key in reference.keys() & other.keys() if other[key].shape == reference[key].shape]
    assert {key for key in reference if reference[key].dim() > 1} <= set(shared)
    assert all(torch.equal(reference[key], other[key]) for key in shared)


@pytest.mark.parametrize("name", MODELS)
def test_initialize_is_a_function_of_seed_purpose_and_name(name: str) -> None:
    network = small(name, seed=0)
    first = {key: p.clone() for key, p in network.named_parameters()}
    torch.manual_seed(99)
    network(torch.randn(2, 3, 16, 16))
    state = torch.get_rng_state()
    again = dict(initialize_(network, 0).named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert all(not buffer.any() for key, buffer in network.named_buffers() if "running_mean" in key)
    drawn = [key for key in first if first[key].dim() > 1]
    for other in (small(name, seed=1), initialize_(small(name), 0, "teacher")):
        assert all(not torch.equal(first[key], p) for key, p in other.named_parameters() if key in drawn)
    weights = [first[key].flatten()[:8] for key in drawn]
    assert len({tuple((w / w.abs().max()).tolist()) for w in weights}) == len(weights)  # no layer repeats another


def test_initial_weights_are_torch_s_own_distribution() -> None:
    weight = small("vgg_small").layer2.conv.weight
    bound = (32 * 9) ** -0.5
    assert bound * 0.99 < weight.abs().max().item() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)


def test_initialize_refuses_another_device() -> None:
    with pytest.raises(ValueError, match="on the CPU"):
        initialize_(on_meta("vgg_small"), 0)


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_round_trip(name: str) -> None:
    network = small(name)
    images = torch.randn(4, 3, 16, 16)
    network(images)
    copy = small(name, seed=1)
    copy.load_state_dict(network.state_dict())
    assert torch.equal(copy.eval()(images), network.eval()(images))


@pytest.mark.parametrize("name", ["binarynet", "resnet18_paper"])
def test_a_checkpoint_with_the_published_biases_keeps_them(name: str) -> None:
    def build() -> Any:
        return getattr(models, name)(10, 32, AttentionBatchNorm2d, width=0.25)

    torch.manual_seed(0)
    published, plain = build(), build()
    plain.load_state_dict(published.state_dict())
    convs = [layer for layer in published.modules() if isinstance(layer, nn.Conv2d)]
    for layer in convs:
        layer.bias = nn.Parameter(torch.randn(layer.out_channels))
    x = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        published(x)  # its running means hold the biases from now on
    state_dict = published.state_dict()
    with pytest.raises(RuntimeError, match="bias"):
        plain.load_state_dict(state_dict)
    loaded: Any = restore_biases_(build(), state_dict)
    loaded.load_state_dict(state_dict)
    assert torch.equal(loaded.eval()(x), published.eval()(x))
    without = build()
    without.load_state_dict(state_dict, strict=False)
    assert not torch.allclose(without.eval()(x), loaded(x))
    first, stem = published[0].conv, plain[0].conv
    assert loaded[0].conv.bias is not None
    shifted = first(x) - first(x).mean((0, 2, 3), keepdim=True)
    torch.testing.assert_close(shifted, stem(x) - stem(x).mean((0, 2, 3), keepdim=True), atol=1e-5, rtol=0)
