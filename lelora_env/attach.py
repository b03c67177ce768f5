"""Putting lane layers into a model and tying them to a bank.

Shapes: L lanes · M matrices · H numbers of a head.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lelora_env.adapter import (
    LaneContext,
    LaneLinear,
    LaneModel,
    SpectralLinear,
    add_dropout,
    replace_module,
    share_tensors,
)
from lelora_env.bank import Bank
from lelora_env.errors import ModelError
from lelora_env.keys import Purpose, torch_generator
from lelora_env.matrices import linear_weight
from lelora_env.models import Base


def attach(base: Base, dropout: float, pad_token_id: int | None) -> LaneModel:
    """Give a model's matrices and heads lane layers, over the same frozen tensors.

    Args:
        base: The decomposed model.
        dropout: Rate of its hidden-layer dropouts.
        pad_token_id: For a config that names none.
    """
    context = LaneContext()
    root = share_tensors(base.model)
    config = getattr(root, "config", None)
    if config is not None and getattr(config, "pad_token_id", 0) is None:
        config.pad_token_id = pad_token_id  # a copy of the config: the model itself keeps its own
    lane_model = LaneModel(root, context)
    where = {m: (group, i) for group, g in enumerate(base.spectrum.layout.groups) for i, m in enumerate(g.matrices)}
    for index, matrix in enumerate(base.matrices):
        if not matrix.name:
            raise ModelError("the model is a single linear layer; wrap it, as in nn.Sequential(layer).")
        group, place = where[index]
        bias = getattr(root.get_submodule(matrix.name), "bias", None)
        layer = SpectralLinear(matrix.name, base.spectrum.residual[group][place], bias, context)
        replace_module(root, matrix.name, layer)
        lane_model.spectral.append(layer)
    for name in base.heads:
        linear = root.get_submodule(name)
        head = LaneLinear(name, context, tuple(linear_weight(linear).shape), linear.bias is not None)  # type: ignore[arg-type]
        replace_module(root, name, head)
        lane_model.heads[name] = head
    if dropout:
        add_dropout(lane_model, dropout)
    return lane_model


def bind(lane_model: LaneModel, bank: Bank) -> None:
    """Let a model's lane layers compute with a bank: factors, gradients and head are shared with it."""
    for group in bank.spectrum.layout.groups:
        size = len(group.components)
        for i, matrix in enumerate(group.matrices):
            left = bank.share(str(group.out_features), group.left + i * size, size)
            right = bank.share(str(group.in_features), group.right + i * size, size)
            lane_model.spectral[matrix].bind(left, right)
    start = 0
    for head in lane_model.heads.values():
        weight = bank.head_leaf(start, head.shape)
        start += head.out_features * head.in_features
        bias = bank.head_leaf(start, (head.out_features,)) if head.has_bias else None
        start += head.out_features if head.has_bias else 0
        head.bind(weight, bias)


def head_start(base: Base, lane_model: LaneModel, seed: int, episode: int) -> Tensor:
    """A head's first numbers (H,): the checkpoint's where it has them, N(0, 0.02²) otherwise."""
    rng = torch_generator(seed, Purpose.HEAD, episode)
    spread = getattr(getattr(base.model, "config", None), "initializer_range", 0.02)
    parts = []
    for name, head in lane_model.heads.items():
        linear = base.model.get_submodule(name)
        weight = torch.randn(head.shape, generator=rng) * spread
        fresh = name in base.fresh_heads
        parts.append((weight if fresh else linear_weight(linear).detach().float().cpu()).flatten())
        if head.has_bias:
            bias: Tensor = linear.bias  # type: ignore[assignment]
            parts.append(torch.zeros(head.out_features) if fresh else bias.detach().float().cpu())
    return torch.cat(parts).to(base.device)


def recompute_activations(lane_model: LaneModel) -> None:
    """Let the model's blocks keep their inputs only and compute the rest anew in the backward pass.

    A third more arithmetic in training, memory of one block instead of all; the same numbers.

    Raises:
        ModelError: The model has no list of blocks with adapted layers in it.
    """
    adapted = set(lane_model.spectral)
    lists = [module for module in lane_model.model.modules() if isinstance(module, nn.ModuleList)]
    blocks = [block for blocks in lists for block in blocks if adapted.intersection(block.modules())]
    inner = {module for block in blocks for module in block.modules() if module is not block}
    outermost = [block for block in dict.fromkeys(blocks) if block not in inner]
    if not outermost:
        raise ModelError("activation_checkpointing needs a model made of blocks (an nn.ModuleList); this one has none. "
                         "Leave it out.")
    for block in outermost:
        block.forward = partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **options)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **options)
