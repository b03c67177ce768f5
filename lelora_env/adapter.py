"""Layers with a lane dimension, and how they get into a model without touching it.

Every batch is lane-major: row ``l * B + b`` belongs to lane l.

Shapes: L lanes · K components · O/I out/in dim · B rows a lane · T tokens.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lelora_env.errors import ModelError
from lelora_env.keys import hashed_uniform

LONGEST_ROW = 1 << 16
"""More tokens than a row can have: keeps the dropout of different rows apart."""


class SideStream:
    """A stream for the bank's gradients, which nothing waits for but the optimiser.

    Where kernels are small they then run beside the backward pass instead of in between.
    """

    def __init__(self) -> None:
        """Open the stream."""
        self.stream = torch.cuda.Stream()

    @contextlib.contextmanager
    def after(self, *inputs: Tensor) -> Iterator[None]:
        """Run on the stream, after all that was started so far; the inputs' memory is kept until that is done."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        for tensor in inputs:
            tensor.record_stream(self.stream)

    def join(self) -> None:
        """Let the current stream wait for the gradients."""
        torch.cuda.current_stream().wait_stream(self.stream)


@dataclass
class LaneContext:
    """What all lane layers of one model share.

    Attributes:
        lane: ``None`` when a batch holds all lanes; a lane's index while the model runs one lane at
            a time (models that mix rows across the batch dimension need that).
        dropout_keys: (L,) int64 keys of this forward's dropout masks; ``None`` = no dropout.
        leading: When set, adapted layers note the first dimension of each of their inputs here.
        side: Where the bank's gradients are computed in small passes.
    """

    lane: int | None = None
    dropout_keys: Tensor | None = None
    leading: dict[str, list[int]] | None = None
    side: SideStream | None = None
    _anchor: Tensor | None = None

    def anchor(self, device: torch.device) -> Tensor:
        """An empty tensor that asks for a gradient, the same one every time; see `_SpectralProduct`."""
        if self._anchor is None:
            self._anchor = torch.zeros(0, device=device, requires_grad=True)
        return self._anchor

    @contextlib.contextmanager
    def using(self, *, lane: int | None = None, dropout_keys: Tensor | None = None) -> Iterator[None]:
        """Set lane and keys for a while; they are taken back whatever happens."""
        before = self.lane, self.dropout_keys
        self.lane, self.dropout_keys = lane, dropout_keys
        try:
            yield
        finally:
            self.lane, self.dropout_keys = before

    def pick(self, lanes: Tensor) -> Tensor:
        """All lanes, or the one that is running."""
        return lanes if self.lane is None else lanes[self.lane : self.lane + 1]


def _split_lanes(x: Tensor, lanes: int, name: str) -> Tensor:
    if x.shape[0] % lanes:
        raise ModelError(f"the layer {name!r} got {x.shape[0]} rows, which {lanes} lanes cannot share")
    return x.reshape(lanes, -1, x.shape[-1])


class SpectralLinear(nn.Module):
    """x·Wᵀ + bias with W = residual + Σ_k left_kᵀ·right_k, one bank per lane (paper, Eq. 1).

    The whole bank takes part in every forward pass; which of its components are *updated* is the
    optimiser's business. The backward pass adds the gradients by both factors to buffers of the bank.
    """

    residual: Tensor
    bias: Tensor | None

    def __init__(self, name: str, residual: Tensor, bias: Tensor | None, context: LaneContext) -> None:
        """Make a layer around a frozen residual (O, I) and bias (O,); `bind` gives it its bank."""
        super().__init__()
        self.name = name
        self.context = context
        self.residual = residual
        self.bias = bias
        self.factors = self.gradients = (residual.new_zeros(0), residual.new_zeros(0))
        self.out_features, self.in_features = residual.shape

    @property
    def weight(self) -> Tensor:
        """The residual, for model code that asks a linear layer for its weight's type or device."""
        return self.residual

    def bind(self, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> None:
        """Give the layer its bank.

        Args:
            left: (L, K, O) left factors, in the residual's type, and the fp32 buffer for their gradient.
            right: (L, K, I) right factors and the buffer for theirs.
        """
        self.factors = left[0], right[0]
        self.gradients = left[1], right[1]

    def forward(self, x: Tensor) -> Tensor:
        """Apply each lane's weight to its rows: (L·B, ..., I) to (L·B, ..., O)."""
        left, right = (self.context.pick(factor) for factor in self.factors)
        if self.context.leading is not None:
            self.context.leading.setdefault(self.name, []).append(x.shape[0])
        lanes = _split_lanes(x, left.shape[0], self.name)  # (L, B·T, I)
        if torch.is_grad_enabled():
            gradients = tuple(self.context.pick(gradient) for gradient in self.gradients)
            anchor = self.context.anchor(x.device)
            y = _SpectralProduct.apply(  # type: ignore[no-untyped-call]
                lanes, anchor, self.residual, self.bias, left, right, gradients, self.context.side)
        else:
            y, _ = _product(lanes, self.residual, self.bias, left, right)
        return y.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]


def _product(
    x: Tensor, residual: Tensor, bias: Tensor | None, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """x·(residual + leftᵀ·right)ᵀ + bias for x (L, R, I): the product (L·R, O), and x·rightᵀ (L, R, K)."""
    y = nn.functional.linear(x.flatten(0, 1), residual, bias)
    inner = torch.bmm(x, right.transpose(1, 2))
    y.view(*x.shape[:2], -1).baddbmm_(inner, left)
    return y, inner


class _SpectralProduct(torch.autograd.Function):
    """`_product` with a backward pass that adds to the bank's gradient buffers instead of making new tensors.

    The anchor is a tensor that asks for a gradient and gets none: it makes autograd visit layers whose
    input needs no gradient (those next to the embeddings).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, residual: Tensor, bias: Tensor | None, left: Tensor, right: Tensor,
        gradients: tuple[Tensor, Tensor], side: SideStream | None,
    ) -> Tensor:
        y, inner = _product(x, residual, bias, left, right)
        ctx.save_for_backward(x, inner)
        ctx.constants = residual, left, right, gradients, side  # static tensors of model and bank
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, inner = ctx.saved_tensors
        residual, left, right, (left_grad, right_grad), side = ctx.constants
        dy = dy.view(*x.shape[:2], -1)  # (L, R, O)
        d_inner = torch.bmm(dy, left.transpose(1, 2))  # (L, R, K)
        with side.after(x, inner, dy, d_inner) if side else contextlib.nullcontext():
            _add_product(left_grad, inner, dy)
            _add_product(right_grad, d_inner, x)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.matmul(dy, residual).baddbmm_(d_inner, right)
        return dx, *[None] * 7


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Total (L, K, D) += aᵀ·b for a (L, R, K) and b (L, R, D), summed in total's type without rounding in between."""
    a = a.transpose(1, 2)
    if a.dtype == total.dtype:
        torch.baddbmm(total, a, b, out=total)
    elif total.device.type == "cuda":
        torch.baddbmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.baddbmm_(a.to(total.dtype), b.to(total.dtype))


class LaneLinear(nn.Module):
    """An ordinary linear layer with weights of its own in every lane; computes in fp32 (task heads)."""

    def __init__(self, name: str, context: LaneContext, shape: tuple[int, int], bias: bool) -> None:
        """Make a head layer of `shape` (O, I); `bind` gives it its numbers."""
        super().__init__()
        self.name = name
        self.context = context
        self.shape = shape
        self.has_bias = bias
        self.out_features, self.in_features = shape
        self.weight = torch.zeros(0)
        self.bias: Tensor | None = None

    @property
    def size(self) -> int:
        """How many numbers a lane's copy has."""
        return self.out_features * (self.in_features + self.has_bias)

    def bind(self, weight: Tensor, bias: Tensor | None) -> None:
        """Give the layer its (L, O, I) weights and (L, O) biases."""
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply each lane's weight to its rows: (L·B, ..., I) to (L·B, ..., O), fp32."""
        weight = self.context.pick(self.weight)
        lanes = _split_lanes(x.float(), weight.shape[0], self.name)  # (L, B·T, I)
        y = torch.bmm(lanes, weight.transpose(1, 2))  # (L, B·T, O)
        if self.bias is not None:
            y = y + self.context.pick(self.bias).unsqueeze(1)
        return y.view(*x.shape[:-1], -1)


class KeyedDropout(nn.Module):
    """Dropout whose masks depend on each lane's key alone; off while the context has no keys.

    A number's fate hangs on its place (row, token, feature), not on how wide the batch is padded.
    """

    def __init__(self, rate: float, salt: int, context: LaneContext) -> None:
        """Make a dropout of `rate`; `salt` tells the dropout layers of a model apart."""
        super().__init__()
        self.rate = rate
        self.salt = salt
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        """Zero a share `rate` of the numbers and scale up the rest."""
        keys = self.context.dropout_keys
        if keys is None or x.dim() > 3:  # attention probabilities keep no dropout
            return x
        keys = self.context.pick(keys) + self.salt * 7919
        rows, width, tokens = x.shape[0] // len(keys), x.shape[-1], x.shape[1] if x.dim() == 3 else 1
        row, token, number = (torch.arange(n, device=x.device) for n in (rows, tokens, width))
        place = (row.view(-1, 1, 1) * LONGEST_ROW + token.view(-1, 1)) * width + number  # (B, T, H)
        keep = hashed_uniform(keys, place.flatten()) >= self.rate
        return torch.where(keep.view(x.shape), x / (1 - self.rate), 0.0)


def share_tensors(model: nn.Module) -> nn.Module:
    """A second module tree over the same tensors: its layers can be replaced, its weights are shared.

    Parameters become frozen parameters over the same storage; buffers are the same objects; nothing
    is copied, and the given model is not changed. Ties and modules used twice are kept.
    """
    modules: dict[int, nn.Module] = {}
    parameters: dict[int, nn.Parameter] = {}

    def freeze(parameter: nn.Parameter) -> nn.Parameter:
        if id(parameter) not in parameters:
            parameters[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        return parameters[id(parameter)]

    def clone(module: nn.Module) -> nn.Module:
        if id(module) in modules:
            return modules[id(module)]
        twin = module.__class__.__new__(module.__class__)
        modules[id(module)] = twin
        state = dict(module.__dict__)
        state["_parameters"] = {k: None if p is None else freeze(p) for k, p in module._parameters.items()}
        state["_buffers"] = dict(module._buffers)
        state["_modules"] = {k: None if m is None else clone(m) for k, m in module._modules.items()}
        twin.__dict__.update(state)
        return twin

    root = clone(model)
    if hasattr(root, "config"):
        root.config = copy.copy(root.config)
    return root.eval()


def replace_module(root: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the dotted path `name` points."""
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent) if parent else root, child, new)


@dataclass
class LaneModel:
    """A model whose adapted layers and heads have lanes.

    Attributes:
        model: The module to call; rows are lane-major.
        context: Shared by its lane layers.
        spectral: The adapted layers, one per matrix, in order.
        heads: The head layers by module name.
    """

    model: nn.Module
    context: LaneContext
    spectral: list[SpectralLinear] = field(default_factory=list)
    heads: dict[str, LaneLinear] = field(default_factory=dict)

    @property
    def head_size(self) -> int:
        """Numbers in one lane's heads."""
        return sum(head.size for head in self.heads.values())


def add_dropout(lane_model: LaneModel, rate: float) -> None:
    """Replace the model's hidden-layer dropouts by keyed ones (paper, Table 7).

    Attention probabilities keep no dropout: fused attention draws from a global generator.

    Raises:
        ModelError: The model applies no dropout that could be replaced.
    """
    named = list(lane_model.model.named_modules(remove_duplicate=False))
    found = [(name, module) for name, module in named if isinstance(module, nn.Dropout)]
    if not found:
        raise ModelError(f"dropout={rate} would have no effect: this model applies no nn.Dropout. Leave dropout at 0.")
    twins: dict[int, KeyedDropout] = {}
    for name, module in found:
        twin = twins.setdefault(id(module), KeyedDropout(rate, len(twins), lane_model.context))
        replace_module(lane_model.model, name, twin)
