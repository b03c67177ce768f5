"""What a training step reads, in tensors that stay where they are, and the clocks that decide it.

Shapes: L lanes · M matrices · K components · B rows a lane.
"""

import numpy as np
import torch
from torch import Tensor

from lelora_env.batches import Batches
from lelora_env.config import EnvConfig
from lelora_env.keys import Purpose, generator
from lelora_env.optim import linear_schedule


class StepInputs:
    """Static inputs of a training step, and where every lane stands. Host arrays and device tensors are (L, ...).

    Attributes:
        seeds: Key of each lane's data order, dropout and head start.
        episodes: Further part of the key.
        steps: Optimiser steps since the start of the run.
        mask: (L, M, K) bool: components that are updated.
        active: (L,) bool: lanes that step at all.
        indices: (L, B) rows of the next step, -1 for filling.
        factor: (L,) factor of the learning rate.
        dropout_keys: (accumulate, L) int64, or ``None`` without dropout.
    """

    def __init__(
        self, batches: Batches, config: EnvConfig, lanes: int, slots: tuple[int, int], device: torch.device
    ) -> None:
        """Allocate; `slots` is (M, K)."""
        self.batches, self.config = batches, config
        self.seeds, self.episodes, self.steps = np.zeros((3, lanes), dtype=np.int64)
        self.active = torch.ones(lanes, dtype=torch.bool, device=device)
        self.mask = torch.zeros(lanes, *slots, dtype=torch.bool, device=device)
        self.indices = torch.zeros(lanes, config.batch_size, dtype=torch.int64, device=device)
        self.factor = torch.zeros(lanes, device=device)
        self.dropout_keys: Tensor | None = None
        if config.dropout:
            self.dropout_keys = torch.zeros(config.accumulate, lanes, dtype=torch.int64, device=device)
        self._drawn_for = b""
        self._drawn: tuple[Tensor, Tensor, Tensor, int]

    def choose(self, mask: Tensor, active: np.ndarray) -> None:
        """Say what the next steps update: (L, M, K) components and (L,) lanes."""
        self.mask.copy_(mask, non_blocking=True)
        self.active.copy_(torch.from_numpy(active), non_blocking=True)

    def load(self) -> int:
        """Put the next step's rows, learning rates and dropout keys into place; returns its width in tokens."""
        self.prefetch()
        indices, factor, keys, width = self._drawn
        self.indices.copy_(indices, non_blocking=True)
        self.factor.copy_(factor, non_blocking=True)
        if self.dropout_keys is not None:
            self.dropout_keys.copy_(keys, non_blocking=True)
        return width

    def prefetch(self) -> None:
        """Draw what the next step needs, if that is not done yet.

        Call it while the device is busy; the draws are a function of the clocks, so nothing changes but the time.
        """
        clocks = np.stack([self.seeds, self.episodes, self.steps], axis=1)
        if self._drawn_for == clocks.tobytes():
            return
        indices = np.stack([self.batches.indices(lane, *map(int, clock)) for lane, clock in enumerate(clocks)])
        factor = linear_schedule(torch.from_numpy(self.steps), self.config.total_steps, self.config.warmup)
        keys = torch.zeros(0) if self.dropout_keys is None else self._draw_dropout_keys(clocks)
        width = max(self.batches.width(step) for step in set(self.steps.tolist()))
        self._drawn_for, self._drawn = clocks.tobytes(), (torch.from_numpy(indices), factor, keys, width)

    def _draw_dropout_keys(self, clocks: np.ndarray) -> Tensor:
        keys = [
            [int(generator(int(s), Purpose.DROPOUT, int(e), int(t), part).integers(2**31)) for s, e, t in clocks]
            for part in range(self.config.accumulate)
        ]
        return torch.tensor(keys)
