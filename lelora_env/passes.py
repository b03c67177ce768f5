"""Running the model for all lanes at once, or for one; how many rows fit into a pass without gradients.

Shapes: L lanes · B rows a lane.
"""

import warnings

import torch
from torch import Tensor

from lelora_env.adapter import LaneModel
from lelora_env.bank import Bank
from lelora_env.batches import take_rows
from lelora_env.errors import ModelError
from lelora_env.models import Base
from lelora_env.tasks.base import Rows, Task

FORWARD_ROWS, FORWARD_TOKENS, LOGITS_BUDGET = 64, 2**18, 2**28
"""Rows per lane, tokens of all lanes, and logits in one forward pass without gradients, at most."""

GRADIENT_TOKENS = 2**12
"""Tokens of all lanes in one pass over reward rows with gradients, unless a training pass has more rows."""


def token_width(rows: Rows) -> int:
    """Tokens of a row; 0 for rows that are not sequences."""
    return rows["input_ids"].shape[1] if "input_ids" in rows else 0


def backward(loss: Tensor) -> None:
    """Run the backward pass into the flat gradient buffers.

    Torch advises once that such gradients are views with the lane's stride; they are meant to be.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
        loss.backward()


class Passes:
    """Forward passes of a model with lanes.

    Attributes:
        lanes: L.
        looped: Whether lanes run one at a time, because the model mixes rows.
    """

    def __init__(self, base: Base, task: Task, lane_model: LaneModel, bank: Bank, example: Rows) -> None:
        """Find out how the model can be run.

        Args:
            base: The decomposed model.
            task: Says what the model reads.
            lane_model: The model with lanes, bound to `bank`.
            bank: Its components.
            example: Rows to try it on.

        Raises:
            ModelError: A matrix that the model's forward pass never uses.
        """
        self.base, self.task, self.lane_model, self.bank = base, task, lane_model, bank
        self.lanes = bank.lanes
        self.looped = False
        self.looped = self.lanes > 1 and not self._lanes_can_share(example)
        self._check_every_layer_is_called(example)

    @torch.no_grad()
    def _leading_sizes(self, example: Rows, rows: int) -> dict[str, list[int]]:
        """First dimensions of every adapted layer's inputs for a batch of `rows` rows per lane."""
        context = self.lane_model.context
        context.leading = {}
        try:
            index = torch.zeros(self.lanes * rows, dtype=torch.int64, device=self.base.device)
            self._call(take_rows(example, index, 0))
            return context.leading
        finally:
            context.leading = None

    def _lanes_can_share(self, example: Rows) -> bool:
        """Whether every adapted layer sees a batch that grows with the rows, lane by lane.

        Some models (DeBERTa) also put tensors without a batch dimension through their layers; their
        lanes run one at a time.
        """
        try:
            one, two = self._leading_sizes(example, 1), self._leading_sizes(example, 2)
        except (RuntimeError, ModelError):
            return False
        whole = all(size % self.lanes == 0 for sizes in one.values() for size in sizes)
        return whole and two == {name: [2 * size for size in sizes] for name, sizes in one.items()}

    def _check_every_layer_is_called(self, example: Rows) -> None:
        with self.lane_model.context.using(lane=0):
            called = self._leading_sizes(example, 1)
        unused = [layer.name for layer in self.lane_model.spectral if layer.name not in called]
        if unused:
            raise ModelError(f"the model's forward pass never calls {unused[0]!r} ({len(unused)} such layers): its "
                             "weight is read directly, or it is reached past the module tree. Leave it out of "
                             "target_modules.")

    def forward(self, rows: Rows) -> Tensor:
        """The model's output for lane-major rows, (L·B, ...)."""
        self.bank.refresh()
        if not self.looped:
            return self._call(rows)
        size = len(next(iter(rows.values()))) // self.lanes
        parts = [{k: v[lane * size : (lane + 1) * size] for k, v in rows.items()} for lane in range(self.lanes)]
        return torch.cat([self._call_lane(lane, part) for lane, part in enumerate(parts)])

    def forward_lane(self, lane: int, rows: Rows) -> Tensor:
        """One lane's output for its rows, (B, ...)."""
        self.bank.refresh()
        return self._call_lane(lane, rows)

    def _call_lane(self, lane: int, rows: Rows) -> Tensor:
        context = self.lane_model.context
        with context.using(lane=lane, dropout_keys=context.dropout_keys):
            return self._call(rows)

    def _call(self, rows: Rows) -> Tensor:
        inputs = {name: rows[name] for name in self.task.inputs if name in rows}
        output = self.lane_model.model(**inputs, **self.base.forward_options)
        return output.logits if hasattr(output, "logits") else output  # type: ignore[no-any-return]

    def in_every_lane(self, rows: Rows) -> Rows:
        """The same rows for every lane, lane-major."""
        return {name: c.repeat(self.lanes, *[1] * (c.dim() - 1)) for name, c in rows.items()}

    def rows_at_once(self, rows: Rows, lanes: int) -> int:
        """Rows per lane in a forward pass without gradients, so that its memory stays within a budget."""
        tokens = lanes * max(1, token_width(rows))
        limit = FORWARD_TOKENS // tokens
        if self.task.head == "causal-lm":
            vocabulary = getattr(getattr(self.base.model, "config", None), "vocab_size", 1)
            limit = min(limit, LOGITS_BUDGET // (tokens * vocabulary))
        return max(1, min(FORWARD_ROWS, limit))
