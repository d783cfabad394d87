"""Normalisation of feature maps: Attention-Based Batch Normalisation, its ablations, and a control.

All of them run torch's own batch norm (on a GPU cuDNN's kernel where there are weight and bias, as in ``bn``, and
torch's elsewhere: their last bits differ) and keep torch's interface: buffers ``running_mean``,
``running_var``, ``num_batches_tracked``, parameters ``weight`` and ``bias``, and ``momentum`` as the share of the
new batch in the running statistics.
"""

import math
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Gate = Literal["full", "forward", "backward", "none"]
Scale = Literal["none", "output", "gate"]


class _GateForward(torch.autograd.Function):
    """The gate's value with the gradient of no gate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _GateBackward(torch.autograd.Function):
    """No gate, with the gradient of one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return torch.ops.aten.silu_backward(grads[0], *ctx.saved_tensors)


def check_statistics(eps: float, momentum: float | None) -> None:
    """Raise ValueError for what no batch norm can run with; None is torch's average over all batches."""
    if not 0 < eps < math.inf:
        raise ValueError(f"eps={eps} is not allowed; use a small number above 0, such as 1e-5.")
    if momentum is not None and not 0 < momentum <= 1:
        raise ValueError(f"momentum={momentum} is not allowed; use a number above 0 and at most 1, such as 0.1.")


class _FeatureMapNorm(nn.BatchNorm2d):
    """torch's BatchNorm2d, with the standardisation as a method of its own."""

    def __init__(self, num_features: int, eps: float, momentum: float, unbiased: bool = True) -> None:
        check_statistics(eps, momentum)
        super().__init__(num_features, eps, momentum, affine=False)
        self.unbiased = unbiased

    def standardize(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return (x - mean) / sqrt(var + eps), times `weight` per channel; update the statistics in training."""
        self._check_input_dim(x)
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, weight, None, False, 0.0, self.eps)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        if self.unbiased:
            mean, var, momentum = self.running_mean, self.running_var, self.momentum
        else:
            # With momentum 1 the kernel returns this batch's own statistics; it still adds 0 times the old ones,
            # so those must be finite.
            mean, var, momentum = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var), 1.0
        y = F.batch_norm(x, mean, var, weight, None, True, momentum, self.eps)
        if not self.unbiased:
            count = SynchronizedStatistics.count
            n = x.numel() // x.size(1) if count is None else count
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * ((n - 1) / n), self.momentum)
        return y

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class AttentionBatchNorm2d(_FeatureMapNorm):
    r"""Batch normalisation whose output is multiplied by its own sigmoid, an element-wise attention gate.

    .. math:: y = \sigma(\hat x)\, \hat x + \beta = \mathrm{SiLU}(\hat x) + \beta, \qquad
              \hat x = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}

    Shapes: x and y (B, C, H, W); mu, sigma^2 (over B, H, W; biased, as in every batch norm) and beta (C,).

    Args:
        gate: where the gate acts. ``full``: as above. ``forward``: y as above, the gradient that of
            :math:`\hat x + \beta`. ``backward``: :math:`y = \hat x + \beta`, the gradient that of the gated output.
            ``none``: nowhere, y = xhat + beta.
        scale: where a learned gamma per channel (``weight``, 1 at the start) acts. ``none``: nowhere, ``weight`` is
            None. ``output``: gamma SiLU(xhat) + beta. ``gate``: SiLU(gamma xhat) + beta.
        shift: whether there is a beta (``bias``, 0 at the start, None where there is none).
        momentum: share of the new batch in the running statistics, torch's convention.
        unbiased: whether the running variance holds n / (n - 1) times the biased variance, as torch's does.
        persistent_stats: whether the running mean and variance belong to the state dict. Without them a reloaded
            network evaluates with mean 0 and variance 1, as one of the published code does.

    Raises ValueError for an unknown gate or scale, an eps or a momentum out of its range, and, as torch does, for one
    value per channel in training.

    Source: Gu, Zhang, Jia, Wu, Entropy 27(6):645, 2025, doi 10.3390/e27060645. Differs from the authors' code, by
    default, in: momentum (theirs is 0.9 in this convention), the running variance (theirs is biased), the
    state dict (theirs lacks the statistics), and an unused gamma (theirs has one, drawn at random).
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        gate: Gate = "full",
        scale: Scale = "none",
        shift: bool = True,
        unbiased: bool = True,
        persistent_stats: bool = True,
    ) -> None:
        for name, value, allowed in (("gate", gate, get_args(Gate)), ("scale", scale, get_args(Scale))):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(allowed)}.")
        super().__init__(num_features, eps, momentum, unbiased)
        self.gate, self.scale = gate, scale
        if scale != "none":
            self.weight = nn.Parameter(torch.ones(num_features))
        if shift:
            self.bias = nn.Parameter(torch.zeros(num_features))
        if not persistent_stats:
            self.register_buffer("running_mean", self.running_mean, persistent=False)
            self.register_buffer("running_var", self.running_var, persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        x = self.standardize(input, self.weight if self.scale == "gate" else None)
        if self.gate == "full":
            x = F.silu(x)
        elif self.gate == "forward":
            x = _GateForward.apply(x)
        elif self.gate == "backward":
            x = _GateBackward.apply(x)
        if self.scale == "output":
            x = x * self.weight.view(1, -1, 1, 1)
        return x if self.bias is None else x + self.bias.view(1, -1, 1, 1)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, gate={self.gate}, "
            f"scale={self.scale}, shift={self.bias is not None}, unbiased={self.unbiased}"
        )


class InstanceEnhancementBatchNorm2d(_FeatureMapNorm):
    r"""Batch normalisation whose scale is gated per image and channel: the channel-attention control.

    .. math:: y = \gamma\, \sigma(w\, \bar x + b)\, \hat x + \beta, \qquad \bar x = \mathrm{mean}_{H, W}(x)

    Shapes: x and y (B, C, H, W); xbar (B, C); gamma, beta, w, b (C,), parameters ``weight``, ``bias``,
    ``gate_weight``, ``gate_bias``, which start at 1, 0, 0 and -1. xbar is the mean of the layer's *input*, before
    standardisation, in the paper's published code as here.

    Source: Liang, Huang, Liang, Yang, AAAI 2020, arXiv 1908.04008.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps, momentum)
        self.weight = nn.Parameter(torch.empty(num_features))
        self.bias = nn.Parameter(torch.empty(num_features))
        self.gate_weight = nn.Parameter(torch.empty(num_features))
        self.gate_bias = nn.Parameter(torch.empty(num_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "gate_weight"):  # torch's constructor calls this before there is a gate
            nn.init.zeros_(self.gate_weight)
            nn.init.constant_(self.gate_bias, -1.0)

    def forward(self, input: Tensor) -> Tensor:
        x = self.standardize(input)
        gate = torch.sigmoid(self.gate_weight * input.mean((2, 3)) + self.gate_bias)
        return x * (self.weight * gate)[:, :, None, None] + self.bias.view(1, -1, 1, 1)


class SynchronizedStatistics(TorchFunctionMode):
    """Inside it, every batch norm in training takes its statistics over the batches of all processes.

    It replaces torch's batch-norm kernel, which torch's own layers and those above share. `nn.SyncBatchNorm` would
    make plain batch norms of them all, and has no CPU form. The gradient is that of the sum of all processes' losses,
    so that DDP's average is the gradient of the mean loss of the whole batch. Needs a process group.
    """

    count: ClassVar[Tensor | None] = None  # values behind each statistic of the layer called last

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = _synchronized_batch_norm if func is F.batch_norm else func
        return call(*args, **(kwargs if kwargs is not None else {}))

    def __exit__(self, *args: Any) -> None:
        SynchronizedStatistics.count = None
        super().__exit__(*args)


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _SumOverProcesses.apply(grads[0])


def _synchronized_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm` over all processes. The variance is that of the centred values: no cancellation."""
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    dims, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
    values = x.float()
    here = values.new_full((1,), x.numel() // x.size(1))
    total = _SumOverProcesses.apply(torch.cat([values.sum(dims), here]))
    mean, count = total[:-1] / total[-1], total[-1].detach()
    centred = values - mean.view(shape)
    var = _SumOverProcesses.apply(centred.square().sum(dims)) / count
    with torch.no_grad():
        for running, value in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
            if running is not None:
                running.lerp_(value, momentum)
    SynchronizedStatistics.count = count
    y = centred * torch.rsqrt(var + eps).view(shape)
    y = y if weight is None else y * weight.view(shape)
    y = y if bias is None else y + bias.view(shape)
    return y.to(x.dtype)
