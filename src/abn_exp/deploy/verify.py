"""Compare a network in an engine with torch's, image by image, down to the bits that each binary layer reads.

Torch's network runs with the engine's bits in place of its own: each layer then starts from the same binary input,
and what it decides must be what the engine decides. For folded layers these are all bits. Real-valued operations are
added in another order in every engine, so that a sign may differ where the value lies within that rounding of zero;
the bound is computed beside the value, in float64. Logits must agree within theirs.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from abn_exp.deploy.graph import Graph, Layer, Node
from abn_exp.trained_network import InputFormat

UNIT = 2.0**-24  # the relative error of one rounding in float32
FUNCTION = 8  # roundings that a sigmoid, SiLU or tanh may be off by: measured are 5, in three engines
SMALLEST = 1e-36  # below it exponentials overflow, and their quotients are no longer rounded, but lost
VALUES = 2**24  # of all maps of a batch: a few times 128 MB in float64


class Mismatch(ValueError):
    """An engine decided something otherwise than torch, and no rounding explains it."""


@dataclass
class Answer:
    """What an engine found for a batch. ``bits`` may lack layers, of which torch's own bits are used."""

    logits: NDArray[np.float32]  # (B, classes)
    bits: dict[str, NDArray[np.int8]] = field(default_factory=dict)  # of the layers that read them: -1, 0, +1
    real: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # before the signs that these layers read
    sums: dict[str, NDArray[np.float32]] = field(default_factory=dict)  # of these layers


Engine = Callable[[NDArray[np.uint8]], Answer]


@dataclass
class Verification:
    """What was compared, and what differs within rounding."""

    images: int = 0
    folded_bits: int = 0  # compared, all equal
    real_bits: int = 0  # compared
    sums: int = 0  # compared, all equal
    differing: dict[str, int] = field(default_factory=dict)  # signs within rounding of zero, by the reading layer
    images_with_differences: int = 0
    changed: list[int] = field(default_factory=list)  # images whose predicted class is another
    correct: int = 0
    correct_torch: int = 0


@torch.no_grad()
def verify(
    network: nn.Module,
    graph: Graph,
    engine: Engine,
    images: Tensor,
    labels: Tensor,
    input_format: InputFormat,
    progress: Callable[[int, int], None] = lambda done, total: None,
    numbers: Tensor | None = None,
) -> Verification:
    """Run all images (N, 3, S, S), uint8, through an engine and through torch, and compare them.

    ``numbers`` (N,) are the images' own in the test set, where they are a part of it. Raises Mismatch, whose text
    names the layer and the image.
    """
    found = Verification()
    numbers = torch.arange(len(images)) if numbers is None else numbers
    for start, batch in _batches(graph, images):
        these = numbers[start : start + len(batch)]
        answer = engine(batch.numpy())
        x = input_format.normalize(batch)
        forced = _Forced(network, graph, answer)
        logits = forced.run(x)
        bounds = _Bounds(forced.sums, x, input_format)
        differs = torch.zeros(len(batch), dtype=torch.bool)
        for layer in graph.layers:
            if layer.name in answer.sums:
                equal = torch.from_numpy(answer.sums[layer.name]) == forced.sums[layer.node]
                found.sums += equal.numel()
                _require(equal, f"{layer.name} makes other sums than torch's", these)
            if layer.name not in answer.bits:
                continue
            other = forced.other[layer.name]
            if layer.fold is not None:
                found.folded_bits += other.numel()
                _require(~other, f"{layer.name} reads other bits than torch's, folded from {layer.decided_by}", these)
                continue
            found.real_bits += other.numel()
            value, bound = bounds.of(layer.node.inputs[0].inputs[0])
            what = f"{layer.name} reads a sign of {layer.decided_by} that rounding does not explain"
            _require(~other | (value.abs() <= bound), what, these)
            if layer.name in answer.real:
                fine = (torch.from_numpy(answer.real[layer.name]).double() - value).abs() <= bound
                _require(fine, f"{layer.decided_by}, before the signs that {layer.name} reads, is not torch's", these)
            if count := int(other.sum()):
                found.differing[layer.name] = found.differing.get(layer.name, 0) + count
            differs |= other.flatten(1).any(1)
        value, bound = bounds.of(graph.nodes[-1])
        _require((logits.double() - value).abs() <= bound, "a logit of torch is off by more than rounding", these)
        fits = ((torch.from_numpy(answer.logits).double() - value).abs() <= bound).all(1)
        for i in (~fits).nonzero().flatten().tolist():
            flipped = _explanation(network, graph, answer, bounds, x, input_format, i)
            for name in flipped:
                found.differing[name] = found.differing.get(name, 0) + 1
            fits[i], differs[i] = bool(flipped), True
        _require(fits[:, None], "a logit of the engine is off by more than rounding", these)
        if differs.any():
            logits[differs] = network(x[differs])
        _count(found, these, differs, torch.from_numpy(answer.logits), logits, labels[start : start + len(batch)])
        progress(start + len(batch), len(images))
    return found


MOST_FLIPS = 8  # values within rounding of zero in one image, whose signs are tried in all combinations


def _explanation(
    network: nn.Module,
    graph: Graph,
    answer: Answer,
    bounds: "_Bounds",
    x: Tensor,
    input_format: InputFormat,
    image: int,
) -> list[str]:
    """Return the layers whose bits, of values within rounding of zero, must differ for an image to have its logits.

    The bits are those of a model that shows them; the model as it is may be compiled to another order of additions.
    Returns nothing where no combination of such signs gives the logits.
    """
    readers: dict[Node, list[Layer]] = {}
    for layer in graph.layers:
        if layer.fold is None and layer.name in answer.bits:
            readers.setdefault(layer.node.inputs[0], []).append(layer)
    near: list[tuple[list[Layer], int]] = []
    for bits, layers in readers.items():
        value, bound = (each[image].flatten() for each in bounds.of(bits.inputs[0]))
        near += [(layers, index) for index in (value.abs() <= bound).nonzero().flatten().tolist()]
    if not 0 < len(near) <= MOST_FLIPS:
        return []
    count = 2 ** len(near)
    copies = {name: np.repeat(found[image : image + 1], count, 0) for name, found in answer.bits.items()}
    for layer in graph.layers:
        if layer.fold is not None:
            copies.pop(layer.name, None)  # torch's own follow the signs that are tried
    for k, (layers, index) in enumerate(near):
        for layer in layers:
            copies[layer.name].reshape(count, -1)[(np.arange(count) >> k) % 2 == 1, index] *= -1
    images = x[image : image + 1].expand(count, -1, -1, -1)
    forced = _Forced(network, graph, Answer(answer.logits, copies))
    forced.run(images)
    value, bound = _Bounds(forced.sums, images, input_format).of(graph.nodes[-1])
    fits = ((torch.from_numpy(answer.logits[image]).double() - value).abs() <= bound).all(1)
    if not fits.any():
        return []
    choice = int(fits.nonzero()[0])
    return [layer.name for k, (layers, _) in enumerate(near) if choice >> k & 1 for layer in layers]


def _count(
    found: Verification, these: Tensor, differs: Tensor, logits: Tensor, torchs: Tensor, labels: Tensor
) -> None:
    classes, expected = logits.argmax(1), torchs.argmax(1)
    found.images += len(labels)
    found.images_with_differences += int(differs.sum())
    found.changed += these[classes != expected].tolist()
    found.correct += int((classes == labels).sum())
    found.correct_torch += int((expected == labels).sum())


def _require(fine: Tensor, what: str, these: Tensor) -> None:
    bad = (~fine.flatten(1)).any(1)
    if bad.any():
        raise Mismatch(f"{what}, first in test image {int(these[bad][0])} (counted from 0).")


def _batches(graph: Graph, images: Tensor) -> Iterator[tuple[int, Tensor]]:
    per_image = sum(int(np.prod(node.shape)) for node in graph.nodes if node.op != "constant")
    size = max(1, min(500, VALUES // per_image))
    for start in range(0, len(images), size):
        yield start, images[start : start + size]


class _Forced:
    """Torch's network with an engine's bits. ``other``: where its own are not those; ``sums``: what layers make."""

    def __init__(self, network: nn.Module, graph: Graph, answer: Answer) -> None:
        self.network, self.graph, self.answer = network, graph, answer
        self.other: dict[str, Tensor] = {}
        self.sums: dict[Node, Tensor] = {}

    def run(self, x: Tensor) -> Tensor:
        """Return the logits."""
        with ExitStack() as hooks:
            for layer in self.graph.layers:
                hooks.enter_context(layer.module.register_forward_pre_hook(partial(self.before, layer)))
                hooks.enter_context(layer.module.register_forward_hook(partial(self.after, layer)))
            return self.network(x)

    def before(self, layer: Layer, _: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor | None:
        if layer.name not in self.answer.bits:
            return None
        bits = torch.from_numpy(self.answer.bits[layer.name]).to(inputs[0].dtype)
        self.other[layer.name] = layer.module.binarization.activations(inputs[0]) != bits
        return bits

    def after(self, layer: Layer, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.sums[layer.node] = output
        if layer.module.bias is not None:
            bias = layer.module.bias.view(-1, *[1] * (output.dim() - 2))
            self.sums[layer.node] = (output - bias).round()


class _Bounds:
    """Real values of a batch in float64, and how far any order of float32 operations can be from them."""

    def __init__(self, sums: dict[Node, Tensor], x: Tensor, input_format: InputFormat) -> None:
        self.sums, self.x, (_, self.shift) = sums, x, input_format.scale_and_shift()
        self.known: dict[Node, tuple[Tensor, Tensor]] = {}

    def of(self, node: Node) -> tuple[Tensor, Tensor]:
        """Return the values of a node, (B, ...), and their bounds."""
        if node not in self.known:
            self.known[node] = self.compute(node)
        return self.known[node]

    def compute(self, node: Node) -> tuple[Tensor, Tensor]:
        options = node.options
        if node.op == "image":
            x = self.x.double()
            return x, 4 * UNIT * (x.abs() + 2 * self.shift.abs())  # a product of at most |x| + |shift|, and a sum
        if node.op == "constant":
            value = options["value"].double()
            return value, torch.zeros_like(value)
        if node.op == "binary":
            value = self.sums[node].double()
            return value, torch.zeros_like(value)
        values = [self.of(source) for source in node.inputs]
        x, e = values[0]
        if node.op in ("conv", "linear"):
            weight = options["weight"].double()
            bias = None if options["bias"] is None else options["bias"].double()

            def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
                if node.op == "linear":
                    return F.linear(x, weight, bias)
                return F.conv2d(x, weight, bias, options["stride"], options["padding"])

            size = product(x.abs() + e, weight.abs(), None if bias is None else bias.abs())
            count = weight[0].numel() + 8  # eight more: an engine may multiply a norm into the weights
            return product(x, weight, bias), product(e, weight.abs(), None) + count * UNIT * size
        if node.op == "batch_norm":
            column = [-1, *[1] * (x.dim() - 2)]
            mean, var = (options[key].double().view(column) for key in ("mean", "var"))
            one, zero = torch.ones_like(mean), torch.zeros_like(mean)
            weight, bias = (
                default if options[key] is None else options[key].double().view(column)
                for key, default in (("weight", one), ("bias", zero))
            )
            scale = weight / (var + options["eps"]).sqrt()
            size = scale.abs() * (x.abs() + mean.abs()) + bias.abs()
            return (x - mean) * scale + bias, scale.abs() * e + 8 * UNIT * size
        if node.op in ("add", "sub", "mul", "div"):
            return _arithmetic(node.op, (x, e), values[1])
        if node.op == "reshape":
            return x.reshape(len(x), *node.shape), e.reshape(len(x), *node.shape)
        if node.op in ("max_pool", "avg_pool"):
            pool = F.max_pool2d if node.op == "max_pool" else F.avg_pool2d
            arguments = (options["kernel"], options["stride"], options["padding"])
            size = pool(x.abs() + e, *arguments) if node.op == "avg_pool" else torch.zeros(())
            count = int(np.prod(options["kernel"])) + 2
            return pool(x, *arguments), pool(e, *arguments) + count * UNIT * size
        if node.op == "mean":
            dims, keep = options["dims"], options["keep"]
            count = int(np.prod([x.shape[dim] for dim in dims])) + 2
            return x.mean(dims, keep), e.mean(dims, keep) + count * UNIT * (x.abs() + e).mean(dims, keep)
        if node.op == "clip":
            return x.clamp(options["low"], options["high"]), e
        functions: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {  # and the steepest slope of each
            "silu": (F.silu, 1.1),
            "sigmoid": (torch.sigmoid, 0.25),
            "tanh": (torch.tanh, 1.0),
            "relu": (torch.relu, 1.0),
            "neg": (torch.neg, 1.0),
            "abs": (torch.abs, 1.0),
        }
        function, slope = functions[node.op]
        value = function(x)
        rounds = FUNCTION * UNIT * value.abs() + SMALLEST if node.op in ("silu", "sigmoid", "tanh") else 0.0
        return value, slope * e + rounds


def _arithmetic(op: str, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    (a, da), (b, db) = left, right
    if op in ("add", "sub"):
        value, error = (a + b if op == "add" else a - b), da + db
    elif op == "mul":
        value, error = a * b, a.abs() * db + b.abs() * da + da * db
    else:
        value = a / b
        error = (da + value.abs() * db) / (b.abs() - db).clamp_min(0)
    return value, error + UNIT * (value.abs() + error)
