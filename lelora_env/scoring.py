"""Loss on the reward rows and scores on the other splits; nothing here trains.

Shapes: L lanes · N rows · P numbers a row to score.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lelora_env.batches import rounded, row_lengths, take_rows
from lelora_env.errors import ModelError
from lelora_env.memory import forward_advice, within_memory
from lelora_env.passes import GRADIENT_TOKENS, Passes, backward, token_width
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
        lanes = self.passes.lanes if lane is None else 1
        total, weight = torch.zeros(2, lanes, device=self.device)
        for part_total, part_weight in self._parts(lane, self.passes.rows_at_once(self.rows, lanes)):
            total += part_total
            weight += part_weight
        mean: Tensor = total / weight
        return mean

    @torch.enable_grad()
    def reward_loss_backward(self, training_rows: int) -> tuple[Tensor, Tensor]:
        """The loss on the reward rows, and its gradient in the bank's buffers, which must be cleared before.

        Args:
            training_rows: Rows a lane in a training pass, so many rows fit with gradients.

        Returns:
            Every lane's loss, the numbers of `reward_loss` (to the last bits where it takes the rows in other
            portions), and the weight that divides it and has yet to divide the gradient; both (L,).
        """
        total, weight = torch.zeros(2, self.passes.lanes, device=self.device)
        for part_total, part_weight in self._parts(None, self.rows_with_gradients(training_rows)):
            backward(part_total.sum())
            total += part_total.detach()
            weight += part_weight
        return total / weight, weight

    def rows_with_gradients(self, training_rows: int) -> int:
        """Reward rows a lane in one pass with gradients, so that it needs no more than a training pass or is small."""
        lanes = self.passes.lanes
        small = GRADIENT_TOKENS // (lanes * max(1, token_width(self.rows)))
        return min(self.passes.rows_at_once(self.rows, lanes), max(training_rows, small))

    def _parts(self, lane: int | None, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Summed loss and weight of `size` reward rows at a time, each (L,), or (1,) for one lane."""
        passes = self.passes
        lanes = passes.lanes if lane is None else 1
        for start in range(0, self.count, size):
            part = {k: v[start : start + size] for k, v in self.rows.items()}
            rows = passes.in_every_lane(part) if lane is None else part
            output = passes.forward(rows) if lane is None else passes.forward_lane(lane, rows)
            row_total, row_weight = self.task.loss(output, rows)
            yield row_total.view(lanes, -1).sum(1), row_weight.view(lanes, -1).sum(1)

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
