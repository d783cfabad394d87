"""A trained network as a list of operations, with integer thresholds in place of the norms that can be folded.

`trace` records the operations of a network, finds what stands between the sums of one binary layer and the signs that
the next one reads, folds it (see `fold`), and keeps real-valued operations where it cannot. Files for engines are
written from the result, and the rounding that their verification allows is computed from it.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from abn_exp.binarize import BinaryConv2d, BinaryLinear
from abn_exp.deploy.fold import Fold, Unfoldable, fold
from abn_exp.errors import ConfigError, in_a_line

BinaryLayer = BinaryConv2d | BinaryLinear

BATCH = 3  # images of the recorded pass: a first dimension of this size is the batch
MOVES = ("reshape", "max_pool")  # operations that choose among values: exact on bits, on sums, on anything

aten = torch.ops.aten
UNARY = {getattr(aten, name).default: name for name in ("silu", "sigmoid", "tanh", "relu", "neg", "abs")}
BINARY = {
    getattr(getattr(aten, name), other): name
    for name in ("add", "sub", "mul", "div")
    for other in ("Tensor", "Scalar")  # what the second operand is
}
SAME = (aten.clone.default, aten.detach.default, aten.alias.default)
RESHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dims,
)
PRODUCTS = (aten.convolution.default, aten.mm.default, aten.addmm.default)


@dataclass(eq=False)
class Node:
    """One operation; ``shape`` is that of its result, without the batch.

    ``op`` is ``image`` (normalised), ``constant``, ``sign`` and ``threshold`` (from real values and from sums to
    bits), ``binary`` (from bits to sums), one of MOVES, or a real-valued operation, as `_Reader` makes them.
    """

    op: str
    inputs: tuple["Node", ...]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Layer:
    """A binary layer, and how the bits that it reads are decided."""

    name: str
    module: BinaryLayer
    node: Node  # its ``binary`` operation; the bits are what this reads
    decided_by: str  # the layers whose results the bits are the signs of, by name
    fold: Fold | None
    reason: str | None  # why there is no fold

    @cached_property
    def weight(self) -> NDArray[np.int8]:
        """The binary weights: -1 and +1, and 0 where ``sign_zero="zero"`` makes one."""
        with torch.no_grad():
            return self.module.binarization.weights(self.module.weight).to(torch.int8).numpy()

    @property
    def packed(self) -> bool:
        """Whether one bit holds each weight."""
        return bool(self.weight.all())


@dataclass(eq=False)
class Graph:
    """A traced network: operations in the order they run, the last one the logits, and the binary layers."""

    nodes: list[Node]
    layers: list[Layer]


@torch.library.custom_op("abn_exp::binary_layer", mutates_args=())
def _binary_layer(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], index: int) -> Tensor:
    """Stand for a binary layer in a record of operations: its result has the right shape, and no meaning."""
    return F.conv2d(x, weight, None, stride, padding) if x.dim() == 4 else F.linear(x, weight)


@torch.no_grad()
def trace(network: nn.Module, image_size: int) -> Graph:
    """Return the graph of a network that is in evaluation mode, on the CPU. The network is left as it was.

    Raises ConfigError for a network with an operation that no engine is given here.
    """
    layers = [(name, module) for name, module in network.named_modules() if isinstance(module, BinaryLayer)]
    for index, (_, module) in enumerate(layers):

        def product(layer: BinaryLayer, x: Tensor, latent: Tensor, index: int = index) -> Tensor:
            stride, padding = (list(getattr(layer, key, ())) for key in ("stride", "padding"))
            return torch.ops.abn_exp.binary_layer(x, latent, stride, padding, index)

        module.product = product
    try:
        record = make_fx(torch.func.functionalize(network))(torch.zeros(BATCH, 3, image_size, image_size))
    except RuntimeError as error:  # of make_fx, where the network branches on a value, say
        raise ConfigError(f"This network cannot be traced, so it cannot be exported: {in_a_line(error)}") from error
    finally:
        for _, module in layers:
            module.product = None
    return _Reader(network, record, layers).read()


class _Reader:
    """Make a `Graph` of torch's record of a network's operations."""

    def __init__(self, network: nn.Module, record: fx.GraphModule, layers: list[tuple[str, BinaryLayer]]) -> None:
        self.record, self.named = record, layers
        self.owners = {
            tensor.data_ptr(): name
            for name, module in network.named_modules()
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        }
        self.constants: dict[fx.Node, Any] = {}
        self.made: dict[fx.Node, Node] = {}  # the operation of each node of the record
        self.bits: dict[fx.Node, tuple[Node, _Stage, Fold | None, str | None]] = {}
        self.layers: dict[int, Layer] = {}
        self.nodes: list[Node] = []

    def read(self) -> Graph:
        result = None
        for node in self.record.graph.nodes:
            if node.op == "get_attr":
                self.constants[node] = getattr(self.record, node.target).detach()
            elif node.op == "output":
                result = node.args[0][0] if isinstance(node.args[0], tuple) else node.args[0]
            elif node.op == "call_function" and all(source in self.constants for source in node.all_input_nodes):
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.constants.__getitem__)
                self.constants[node] = node.target(*args, **kwargs)
            elif _is_binary(node):
                self.value(node)  # in this order, so that no recursion is deep
        if not isinstance(result, fx.Node):
            raise ConfigError("This network does not return one tensor of logits, so it cannot be exported.")
        source = last = self.value(result)
        while source.op in MOVES:
            (source,) = source.inputs
        if source.op == "binary":
            raise ConfigError("This network ends in a binary layer: its logits are no real numbers to export.")
        reached = _ancestors(last)
        layers = [self.layers[index] for index in sorted(self.layers)]
        return Graph([node for node in self.nodes if node in reached], [x for x in layers if x.node in reached])

    def add(self, op: str, inputs: tuple[Node, ...], shape: tuple[int, ...], **options: Any) -> Node:
        self.nodes.append(Node(op, inputs, shape, options))
        return self.nodes[-1]

    def value(self, source: Any) -> Node:
        """Return the operation that makes a node of the record, or a number."""
        if isinstance(source, fx.Node) and source in self.made:
            return self.made[source]
        if not isinstance(source, fx.Node) or source in self.constants:
            constant = torch.as_tensor(self.constants[source] if isinstance(source, fx.Node) else source)
            return self.add("constant", (), tuple(constant.shape), value=constant.float())
        node = self.binary(source) if _is_binary(source) else self.real(source)
        self.made[source] = node
        return node

    def real(self, source: fx.Node) -> Node:
        """Return the operation of a node of the record that is no binary layer."""
        shape = _shape(source)
        if source.op == "placeholder":
            return self.add("image", (), shape)
        target, args = _call(source)
        if target in SAME:
            return self.value(args[0])
        if _is_move(source):
            return self.move(source, self.value(args[0]))
        if target in UNARY:
            return self.add(UNARY[target], (self.value(args[0]),), shape)
        if target in BINARY and source.kwargs.get("alpha", 1) == 1:
            return self.add(BINARY[target], (self.value(args[0]), self.value(args[1])), shape)
        if target in PRODUCTS:
            return self.product(target, args, shape)
        if not isinstance(args[0], fx.Node):  # a list of maps, as of torch.cat
            raise _unknown(target)
        x = self.value(args[0])
        if target is aten.native_batch_norm.default:
            names = ("weight", "bias", "mean", "var")
            values = [None if arg is None else self.constants[arg] for arg in args[1:5]]
            return self.add("batch_norm", (x,), shape, **dict(zip(names, values, strict=True)), eps=float(args[7]))
        if target in (aten.hardtanh.default, aten.clamp.default):
            defaults: list[Any] = [-1.0, 1.0] if target is aten.hardtanh.default else [None, None]
            low, high = list(args[1:]) + defaults[len(args) - 1 :]
            if low is not None and high is not None:
                return self.add("clip", (x,), shape, low=float(low), high=float(high))
        if target is aten.avg_pool2d.default and len(args) <= 3:  # no border
            return self.add("avg_pool", (x,), shape, **_pool_options(args))
        if target is aten.mean.dim:
            dims = tuple(sorted(dim % len(args[0].meta["val"].shape) for dim in args[1]))
            keep = bool(args[2]) if len(args) > 2 else False
            return self.add("mean", (x,), shape, dims=dims, keep=keep)
        raise _unknown(target)

    def product(self, target: Any, args: tuple[Any, ...], shape: tuple[int, ...]) -> Node:
        """Return a convolution or linear layer with real weights."""
        if target is aten.convolution.default:
            x, weight, bias, stride, padding, dilation, transposed, _, groups = args
            if transposed or groups != 1 or list(dilation) != [1, 1]:
                raise ConfigError("Only plain convolutions can be exported: no groups, dilation or transposition.")
            options = {"stride": tuple(stride), "padding": tuple(padding)}
        else:
            x, weight, bias = (args[1], args[2], args[0]) if target is aten.addmm.default else (*args, None)
            options = {}
        if weight not in self.constants or not (bias is None or bias in self.constants):
            raise ConfigError("A product of two activations cannot be exported.")
        kernel = self.constants[weight] if options else self.constants[weight].T
        bias = None if bias is None else self.constants[bias]
        return self.add("conv" if options else "linear", (self.value(x),), shape, weight=kernel, bias=bias, **options)

    def binary(self, source: fx.Node) -> Node:
        """Return the operation of a binary layer, and note how its bits are decided."""
        x, index = source.args[0], int(source.args[4])  # type: ignore[arg-type]
        assert isinstance(x, fx.Node)
        name, module = self.named[index]
        if index in self.layers:
            raise ConfigError(f"{name} is used twice in this network, which cannot be exported.")
        if x not in self.bits:
            self.bits[x] = self.decide(x, module)
        bits, stage, folded, reason = self.bits[x]
        options = {"stride": tuple(getattr(module, "stride", ())), "padding": tuple(getattr(module, "padding", ()))}
        node = self.add("binary", (bits,), _shape(source), pad_value=module.binarization.pad_value, **options)
        decided_by = ", ".join(stage.names if folded is not None else stage.names[-1:])
        layer = Layer(name, module, node, decided_by, folded, reason)
        node.options["layer"] = layer
        self.layers[index] = layer
        return node

    def decide(self, x: fx.Node, module: BinaryLayer) -> tuple[Node, "_Stage", Fold | None, str | None]:
        """Return the bits that a binary layer makes of x, what they are decided by, and their fold or why not."""
        sign_zero = module.binarization.sign_zero
        stage = _Stage(x, self)
        reason = stage.reason
        if reason is None:
            producer = self.named[stage.layer][1]
            shape = stage.base.meta["val"].shape
            try:
                if producer.bias is not None:
                    raise Unfoldable(f"{self.named[stage.layer][0]} has a bias")
                folded = fold(stage.function(), shape[1], producer.weight[0].numel(), sign_zero, len(shape))
            except Unfoldable as error:
                reason = str(error)
            else:
                bits = self.add("threshold", (self.value(stage.base),), _shape(stage.top), fold=folded)
                for move in reversed(stage.moves):
                    bits = self.move(move, bits)
                return bits, stage, folded, None
        real = self.value(x)
        while real.op == "clip" and real.options["low"] < 0 < real.options["high"]:  # the sign is the same before it
            (real,) = real.inputs
        return self.add("sign", (real,), real.shape, sign_zero=sign_zero), stage, None, reason

    def move(self, source: fx.Node, x: Node) -> Node:
        """Return the reshape or max-pool that a node of the record is, of x."""
        target, args = _call(source)
        if target in RESHAPES:
            return self.add("reshape", (x,), _shape(source))
        if len(args) > 4:
            raise ConfigError("A max-pool with dilation or ceil_mode cannot be exported.")
        return self.add("max_pool", (x,), _shape(source), **_pool_options(args))


class _Stage:
    """What stands between one binary layer's sums and the signs that the next binary layer reads.

    From the signs back to the sums: ``moves`` (reshape, max-pool), ``inner``, functions of each value alone that end
    in ``top``, and then ``base``, from which again moves lead to the sums of layer number ``layer``. ``reason``: why
    it is none of that.
    """

    def __init__(self, x: fx.Node, reader: _Reader) -> None:
        self.reader = reader
        constants = reader.constants
        self.moves: list[fx.Node] = []
        while _is_move(x):
            self.moves.append(x)
            x = _call(x)[1][0]
        self.top = x
        inner: set[fx.Node] = set()
        ends: dict[fx.Node, None] = {}
        waiting = [x]
        while waiting:
            node = waiting.pop()
            if node in inner or node in constants:
                continue
            if _is_pointwise(node, constants):
                inner.add(node)
                waiting += node.all_input_nodes
            else:
                ends[node] = None
        self.inner = [node for node in reader.record.graph.nodes if node in inner]
        self.base = next(iter(ends))
        self.layer = -1
        self.names = self.owners()
        self.reason = self.find(list(ends))

    def find(self, ends: list[fx.Node]) -> str | None:
        """Set ``layer`` and extend ``names``; return the reason where there is no single layer of sums."""
        origins = self.origins(ends)
        for origin in origins:
            target, _ = _call(origin)
            if not _is_binary(origin) and target not in PRODUCTS and origin.op != "placeholder":
                return f"{target} reads more than one place of a map"
        if len(ends) > 1:
            return "a real-valued shortcut is added before the sign"
        if not _is_binary(origins[0]):
            self.names = [*self.owners(origins), *self.names]
            return f"{self.names[0]} has real weights" if self.names else "it is the image"
        source = self.base
        while _is_move(source):
            source = _call(source)[1][0]
        if source is not origins[0]:
            return "a pool or a reshape stands between two functions of the sums"
        for node in self.inner:
            for source in node.all_input_nodes:
                if source in self.reader.constants and not _is_per_channel(self.reader.constants[source], node):
                    return "a constant in it is not one a channel"
        self.layer = int(origins[0].args[4])  # type: ignore[arg-type]
        self.names.insert(0, self.reader.named[self.layer][0])
        return None

    def origins(self, ends: list[fx.Node]) -> list[fx.Node]:
        """Return where these values come from, behind all moves and functions of single values."""
        found: dict[fx.Node, None] = {}
        waiting = list(ends)
        while waiting:
            node = waiting.pop()
            if node in self.reader.constants:
                continue
            if _is_move(node):
                waiting.append(_call(node)[1][0])
            elif _is_tagged_pointwise(node.target) or _is_pointwise(node, self.reader.constants):
                waiting += node.all_input_nodes
            else:
                found[node] = None
        return list(found)

    def owners(self, nodes: list[fx.Node] | None = None) -> list[str]:
        """Return the names of the layers whose parameters these operations read, in their order."""
        sources = [source for node in (self.inner if nodes is None else nodes) for source in node.all_input_nodes]
        tensors = [self.reader.constants[source] for source in sources if source in self.reader.constants]
        found = [self.reader.owners[t.data_ptr()] for t in tensors if t.data_ptr() in self.reader.owners]
        return list(dict.fromkeys(found))

    def function(self) -> Callable[[Tensor], Tensor]:
        """Return the operations between the sums and the signs as a function, by torch's own kernels."""
        graph = fx.Graph()
        copies = {self.base: graph.placeholder("y")}
        constants: dict[str, Tensor] = {}

        def copy(node: fx.Node) -> fx.Node:
            if node not in copies and node in self.reader.constants:
                name = f"constant{len(constants)}"
                constants[name] = self.reader.constants[node]
                copies[node] = graph.get_attr(name)
            return copies[node]

        for node in self.inner:
            copies[node] = graph.node_copy(node, copy)
        graph.output(copies[self.top])
        return fx.GraphModule(constants, graph)


def _unknown(target: Any) -> ConfigError:
    return ConfigError(
        f"This network cannot be exported: {target} stays real there, and no engine is given that operation here."
    )


def _call(node: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    """Return the operation and the arguments of a node; of the first of several results, those of the whole."""
    if node.target is operator.getitem and node.args[1] == 0:
        node = node.args[0]  # type: ignore[assignment]
    return node.target, node.args


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape[1:])


def _pool_options(args: tuple[Any, ...]) -> dict[str, Any]:
    kernel, stride, padding = list(args[1:4]) + [[], [0, 0]][len(args) - 2 :]
    return {"kernel": tuple(kernel), "stride": tuple(stride or kernel), "padding": tuple(padding)}


def _is_binary(node: fx.Node) -> bool:
    return node.target is torch.ops.abn_exp.binary_layer.default


def _is_move(node: fx.Node) -> bool:
    target = _call(node)[0]
    return target is aten.max_pool2d_with_indices.default or (
        target in RESHAPES and node.meta["val"].shape[:1] == (BATCH,)
    )


def _is_pointwise(node: fx.Node, constants: dict[fx.Node, Any]) -> bool:
    """Return whether each value of a result depends on one value of each input that is no constant, at its place."""
    target, args = _call(node)
    if target is aten.native_batch_norm.default:
        return args[5] is False
    if not _is_tagged_pointwise(target):
        return False
    shapes = [source.meta["val"].shape for source in node.all_input_nodes if source not in constants]
    return all(shape == node.meta["val"].shape for shape in shapes)


def _is_tagged_pointwise(target: Any) -> bool:
    return target in SAME or (isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags)


def _is_per_channel(constant: Tensor, node: fx.Node) -> bool:
    """Return whether a constant that an operation reads has one value a channel, or one in all."""
    target, _ = _call(node)
    if target is aten.native_batch_norm.default:
        return True
    dims = node.meta["val"].dim()
    return all(size == 1 or axis - constant.dim() == 1 - dims for axis, size in enumerate(constant.shape))


def _ancestors(node: Node) -> set[Node]:
    found: set[Node] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += node.inputs
    return found
