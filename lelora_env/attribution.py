"""What every component of every bank has done, or would have done, for the loss; chosen or not.

Shapes: L lanes · M matrices · K bank slots a matrix · N rows · D numbers a row.
"""

import torch
from torch import Tensor

from lelora_env.finetune import FineTuner
from lelora_env.spectrum import Layout


@torch.no_grad()
def loss_and_components(tuner: FineTuner) -> tuple[Tensor, list[Tensor]]:
    """Measure the reward loss, and what ``component_info`` asks for on the way.

    Call it while the gradient buffers hold the training gradient; with ``"credit"`` they hold the reward loss's after.

    Returns:
        L1 of every lane, (L,), and a (L, M, K) fp32 for every name of ``component_info``, in its order.
    """
    wanted = tuner.config.component_info
    found: dict[str, Tensor] = {}
    if "sensitivity" in wanted:
        found["sensitivity"] = sensitivity(tuner)
    if "credit" in wanted:
        losses, found["credit"] = loss_and_credit(tuner)
    else:
        losses = tuner.reward_loss()
    return losses, [found[name] for name in wanted]


def sensitivity(tuner: FineTuner) -> Tensor:
    """Σ |θ·g| over the numbers of each component's rows, (L, M, K); unused slots are 0.

    g is the gradient of the mean training loss in the last optimiser step, before clipping; θ are the rows after it.
    With moving averages it is AdaLoRA's importance (Zhang et al., 2023); TLoRA (ACL 2026) takes means over matrices.
    """
    rows = {}
    for name in tuner.base.spectrum.layout.row_slot:
        parameter = tuner.bank.rows[name]
        assert parameter.grad is not None
        rows[name] = (parameter.detach() * parameter.grad).abs_().sum(-1) / tuner.weight.unsqueeze(1)
    return by_component(rows, tuner.base.spectrum.layout)


def loss_and_credit(tuner: FineTuner) -> tuple[Tensor, Tensor]:
    """L1, (L,), and the first-order credit -⟨∂L1/∂θ, Δ⟩ of each component's rows θ, (L, M, K); unused slots are 0.

    Δ is what the last optimiser step added to the rows, or would have added to rows that were masked out; positive =
    that change lowers L1. L1 and its gradient come from one forward pass, after the step.
    """
    changes = tuner.changes()
    losses, weight = tuner.replace_gradient()
    rows = {}
    for name in tuner.base.spectrum.layout.row_slot:
        gradient = tuner.bank.rows[name].grad
        assert gradient is not None
        rows[name] = -changes[name].mul_(gradient).sum(-1) / weight.unsqueeze(1)
    return losses, by_component(rows, tuner.base.spectrum.layout)


def by_component(rows: dict[str, Tensor], layout: Layout) -> Tensor:
    """Sum a number for every row, (L, N) of each buffer, over the rows of a component: (L, M, K)."""
    matrices, slots = layout.slots
    sums = []
    for name, values in rows.items():
        empty = values.new_zeros(len(values), matrices * slots)
        sums.append(empty.index_add_(1, layout.row_slot[name], values))
    total: Tensor = torch.stack(sums).sum(0)
    return total.view(-1, matrices, slots)
