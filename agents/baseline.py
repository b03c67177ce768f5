"""What of a reward the agent's choice can have caused: the rest is taken off before anything is learnt from it.

Shapes: L lanes.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from agents.agent import Array, Transition

CLIP = 5.0
"""Largest scaled advantage, in root mean squares."""


class RunningMean:
    """Exponential running mean, corrected for its start at 0; 0 while nothing has been seen."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.total = 0.0
        self.count = 0

    @property
    def value(self) -> float:
        """The mean of what was added so far."""
        return self.total / (1 - self.decay**self.count) if self.count else 0.0

    def add(self, value: float) -> None:
        """Let one more value count."""
        self.total = self.decay * self.total + (1 - self.decay) * value
        self.count += 1

    def state(self) -> dict[str, Any]:
        """Its numbers."""
        return {"total": self.total, "count": self.count}

    def set(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.total, self.count = state["total"], state["count"]


def loss_before(info: Mapping[str, Any]) -> Any:
    """L1 before the env step, as the info has it: L1 - L2, one number or (L,); ``None`` where it lacks either."""
    if not {"L1", "L2"} <= set(info):
        return None
    return np.asarray(info["L1"], dtype=np.float64) - np.asarray(info["L2"], dtype=np.float64)


def known_part(transition: Transition) -> Array:
    """The part of each reward that was known before the action, (L,) float64: -L1 of the env step before.

    L1 = L1_before + L2, so the reward is -L1_before - (1 + α)·L2, less what is charged. Taking the first term off
    changes no policy gradient where γ = 0, and with it goes nearly all of the drift of a run. Environments whose info
    lacks L1 or L2 have no known part: 0.
    """
    before = loss_before(transition.info)
    if before is None:
        return np.zeros(len(transition.reward))
    known: Array = -np.nan_to_num(before, nan=0.0, posinf=0.0, neginf=0.0)
    return known


def expected(surprise: Array, usable: Array, slow: float) -> Array:
    """What was to be expected of each lane's surprise, (L,), without looking at the lane's own.

    The mean of the other lanes at the same env step (leave-one-out); a lane without company falls back on a slow mean.

    Args:
        surprise: (L,) rewards less their `known_part`; anything where not usable.
        usable: (L,) bool: lanes that count.
        slow: The slow mean.
    """
    count = int(usable.sum())
    if count < 2:
        return np.full(len(surprise), slow)
    first = surprise[usable][0]  # taken off for the sum, so that equal values are expected without a rounding error
    apart = np.where(usable, surprise - first, 0.0)
    others: Array = first + (apart.sum() - apart) / (count - 1)
    return others


def scaled(advantage: Array, usable: Array, square: RunningMean) -> Array:
    """Advantages in root mean squares of the recent ones, these counted, and within ± `CLIP`: (L,).

    What is beyond `CLIP` of the root mean square so far is clipped before it counts, so that one diverged lane does not
    make all that comes after it look small.

    Args:
        advantage: (L,) 0 where not usable.
        usable: (L,) bool: lanes that count; at least one.
        square: The slow mean of their squares, which this call adds to.
    """
    limit = CLIP * math.sqrt(square.value) or math.inf  # nothing but zeros so far: no scale yet
    kept: Array = advantage.clip(-limit, limit)
    square.add(float(np.square(kept[usable]).mean()))
    size = math.sqrt(square.value)
    return (kept / size).clip(-CLIP, CLIP) if size > 0 else kept
