"""A hard budget of trained parameters: an action that exceeds it is brought down to it before anything trains.

Ranks are lowered to the next smaller one that is on offer, the highest ranks first, until the sum fits. Which of
several matrices with the same rank comes first is random, with a key.

Shapes: L lanes · M matrices · R ranks.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lelora_env.allocation import ChoiceTable
from lelora_env.config import AdapterConfig
from lelora_env.errors import LeLoRAError
from lelora_env.keys import hashed_uniform
from lelora_env.matrices import MatrixInfo


def component_sizes(matrices: list[MatrixInfo], config: AdapterConfig) -> Tensor:
    """Numbers that one component of each matrix trains, (M,) int64: out + in, and σ in ``usv``."""
    sigma = 1 if config.parametrisation == "usv" else 0
    return torch.tensor([m.out_features + m.in_features + sigma for m in matrices])


def share_of(share: float, total: int) -> int:
    """A share in (0, 1] of a number of parameters, rounded down (but not for the last bits of a product)."""
    return int(share * total + 1e-6)


@dataclass(frozen=True, eq=False)
class Budget:
    """What lowering a rank means, for every rank of every matrix. The tensors are int64 unless said.

    Attributes:
        limit: Numbers that an env step may train.
        ranks: (M, R) ranks, clipped to the matrix.
        cost: (M, R) numbers that each of them trains.
        lower: (M, R) index of the next smaller legal rank; the own index where there is none.
        passed: (M, R, R) bool: ranks that are lowered one after the other on the way from a rank to the smallest.
    """

    limit: int
    ranks: Tensor
    cost: Tensor
    lower: Tensor
    passed: Tensor


def build_budget(share: float, table: ChoiceTable, sizes: Tensor) -> Budget:
    """The budget of a share of what the largest rank everywhere would train.

    Args:
        share: In (0, 1].
        table: The choices on offer.
        sizes: (M,) numbers that one component of each matrix trains.

    Raises:
        LeLoRAError: Even the smallest ranks exceed it, or nothing could train under it.
    """
    cost = table.ranks * sizes.unsqueeze(1)
    total, least = int(cost[:, -1].sum()), max(int(cost[:, 0].sum()), int(cost[cost > 0].min()))
    limit = share_of(share, total)
    if least > limit:
        raise LeLoRAError(f"parameter_budget={share} allows {limit} of {total} parameters, but the least that can "
                          f"train is {least}: raise it to {least / total:.3g} or more, or give rank_set a smaller "
                          "rank.")
    lower = _next_smaller(table.ranks.numpy(), table.legal)
    index = torch.arange(cost.shape[1])
    on_the_way = (index == index.unsqueeze(1)) | (index <= lower.unsqueeze(2))  # (M, from, by way of)
    return Budget(limit, table.ranks, cost, lower, on_the_way & (lower != index).unsqueeze(1))


def _next_smaller(ranks: np.ndarray, legal: np.ndarray) -> Tensor:
    """(M, R) index of the largest legal rank below each, the own index where there is none."""
    index = np.arange(ranks.shape[1])
    below = legal[:, None, :] & (ranks[:, None, :] < ranks[:, :, None])  # (M, R, R)
    return torch.from_numpy(np.where(below.any(2), np.where(below, index, -1).max(2), index))


def project(rank_index: Tensor, budget: Budget, keys: Tensor) -> Tensor:
    """Lower ranks until every lane's action fits the budget; one that fits is left as it is.

    No rank is raised, and with the last lowering undone the action would not fit.

    Args:
        rank_index: (L, M) int64 chosen ranks, as indices.
        budget: The budget.
        keys: (L,) int64 keys of the order among equal ranks, such as `lelora_env.keys.hashed_key` makes.

    Returns:
        (L, M) int64 rank indices to train.
    """
    matrices, ranks = budget.cost.shape
    matrix = torch.arange(matrices)
    excess = budget.cost[matrix, rank_index].sum(1) - budget.limit  # (L,)
    passed = budget.passed[matrix, rank_index]  # (L, M, R)
    draw = hashed_uniform(keys, torch.arange(matrices * ranks)).view_as(passed)
    priority = (budget.ranks << 24) + (draw * 2**24).long()
    order = torch.where(passed, priority, -1).flatten(1).argsort(dim=1, descending=True, stable=True)
    saving = budget.cost - budget.cost.gather(1, budget.lower)
    saved = torch.where(passed, saving, 0).flatten(1).gather(1, order)
    needed = passed.flatten(1).gather(1, order) & (saved.cumsum(1) - saved < excess.unsqueeze(1))
    lowered = torch.zeros_like(needed).scatter(1, order, needed).view_as(passed)
    reached = torch.where(lowered, budget.lower, rank_index.unsqueeze(2))
    return reached.amin(2)
