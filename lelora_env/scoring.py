"""Loss on the reward rows and scores on the other splits; nothing here trains.

Shapes: L lanes · N rows · P numbers a row to score.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from lelora_env.batches import rounded, row_lengths, take_rows
from lelora_env.errors import ModelError
from lelora_env.memory import forward_advice, within_memory
from lelora_env.passes import Passes, token_width
from lelora_env.tasks.base import Rows, Splits, Task


class Scorer:
    """Measures all lanes, or one, on fixed rows."""

    def __init__(self, passes: Passes, task: Task, splits: Splits, reward_rows: Rows) -> None:
        """Remember what to measure on; rows lie on the model's device."""
        self.passes, self.task, self.splits = passes, task, splits
        self.rows, self.device = reward_rows, passes.base.device
        self.count = len(next(iter(reward_rows.values())))

    @torch.no_grad()
    def reward_loss(self, lane: int | None = None) -> Tensor:
        """Loss on the fixed reward rows, in evaluation mode (L1 of Eq. 2).

        Args:
            lane: Only this lane's, (1,); ``None`` = every lane's, (L,).
        """
        passes = self.passes
        lanes = passes.lanes if lane is None else 1
        total, weight = torch.zeros(2, lanes, device=self.device)
        size = passes.rows_at_once(self.rows, lanes)
        for start in range(0, self.count, size):
            part = {k: v[start : start + size] for k, v in self.rows.items()}
            rows = passes.in_every_lane(part) if lane is None else part
            output = passes.forward(rows) if lane is None else passes.forward_lane(lane, rows)
            row_total, row_weight = self.task.loss(output, rows)
            total += row_total.view(lanes, -1).sum(1)
            weight += row_weight.view(lanes, -1).sum(1)
        mean: Tensor = total / weight
        return mean

    @property
    def advice(self) -> str:
        """What to say when measuring the reward loss runs out of memory."""
        lanes = self.passes.lanes
        rows = min(self.passes.rows_at_once(self.rows, lanes), self.count)
        return forward_advice(lanes, rows, token_width(self.rows), self.device)

    @torch.no_grad()
    def evaluate(self, split: str) -> list[dict[str, float]]:
        """The task's score on a split, one dictionary a lane.

        Raises:
            ModelError: The split has no rows.
            MemoryLimitError: The device's memory does not suffice.
        """
        rows, lanes = self.splits[split], self.passes.lanes
        lengths = row_lengths(rows)
        if not len(lengths):
            raise ModelError(f"the split {split!r} has no rows; give it some (for tune: tune_size > 0).")
        order = np.argsort(lengths, kind="stable")
        parts = []
        size = self.passes.rows_at_once(rows, lanes)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            part = take_rows(rows, torch.from_numpy(chosen).to(self.device), rounded(int(lengths[chosen].max())))
            advice = partial(forward_advice, lanes, len(chosen), token_width(part), self.device)
            predicted = within_memory(partial(self._predict, self.passes.in_every_lane(part)), advice)
            parts.append(predicted.view(lanes, len(chosen), -1).float().cpu().numpy())
        back = np.argsort(order, kind="stable")
        predictions = np.concatenate(parts, axis=1)[:, back]  # (L, N, P)
        host = {name: column.cpu() for name, column in rows.items()}
        scores = [self.task.score(predictions[lane], host) for lane in range(lanes)]
        return [{name: float(value) for name, value in score.items()} for score in scores]

    def _predict(self, rows: Rows) -> Tensor:
        return self.task.predict(self.passes.forward(rows), rows)
