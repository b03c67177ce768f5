"""Fine-tuning L lanes of one frozen model under a component mask. No word of reinforcement learning.

Shapes: L lanes · M matrices · K components · B rows a lane · N rows · P numbers a row to score.
"""

import contextlib
import warnings
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lelora_env.adapter import SideStreams
from lelora_env.attach import attach, bind, head_start, recompute_activations
from lelora_env.bank import HEAD, Bank
from lelora_env.batches import Batches, rounded, row_lengths, take_rows
from lelora_env.capture import Captured, shared_pool
from lelora_env.config import EnvConfig
from lelora_env.errors import ModelError
from lelora_env.keys import Purpose, generator
from lelora_env.memory import forward_advice, training_advice, within_memory
from lelora_env.models import Base
from lelora_env.optim import MaskedAdamW, linear_schedule
from lelora_env.tasks.base import SPLIT_NAMES, Rows, Splits, Task

SMALL_PASS = 2**28
"""Bytes of a pass's inputs and outputs of adapted layers up to which the bank's part runs beside the model's own."""

OWN_STATE = ("step", "exp_avg", "exp_avg_sq")
"""Optimiser state that belongs to a lane; masks are set anew in every step."""

FORWARD_ROWS, FORWARD_TOKENS, LOGITS_BUDGET = 64, 2**18, 2**28
"""Rows per lane, tokens of all lanes, and logits in one forward pass without gradients, at most."""


def _backward(loss: Tensor) -> None:
    """Run the backward pass into the flat gradient buffers.

    Torch advises once that such gradients are views with the lane's stride; they are meant to be.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
        loss.backward()


def _width(rows: Rows) -> int:
    """Tokens of a row; 0 for rows that are not sequences."""
    return rows["input_ids"].shape[1] if "input_ids" in rows else 0


class FineTuner:
    """L fine-tuning runs that share one frozen model.

    Each lane has its own bank, head, optimiser state, data order and clock. A lane's numbers depend
    on its own seed, episode and masks only.
    """

    def __init__(
        self, base: Base, task: Task, splits: Splits, config: EnvConfig, lanes: int, pad_token_id: int | None = None
    ) -> None:
        """Allocate all lanes; `start` puts a lane at the beginning of a run.

        Args:
            base: The decomposed model.
            task: Loss and score.
            splits: The task's rows.
            config: Optimiser, batch and split settings.
            lanes: L.
            pad_token_id: Pad token of the tokenizer, for models whose config names none.

        Raises:
            ModelError: A matrix that the model's forward pass never uses.
        """
        self.base, self.task, self.config, self.lanes = base, task, config, lanes
        self.pad_token_id = pad_token_id
        self.device = base.device
        self.splits = Splits(
            **{name: self._to_device(splits[name]) for name in SPLIT_NAMES},
            sources=splits.sources,
            notes=splits.notes,
        )
        self.batches = Batches(self.splits.train, config.batch_size, config.split_seed)
        self.lane_model = attach(base, config.dropout, pad_token_id)
        if config.activation_checkpointing:
            recompute_activations(self.lane_model)
        self.bank = Bank(base.spectrum, lanes, self.lane_model.head_size)
        bind(self.lane_model, self.bank)
        self.optimiser = self._make_optimiser()
        self.seeds = np.zeros(lanes, dtype=np.int64)
        self.episodes = np.zeros(lanes, dtype=np.int64)
        self.steps = np.zeros(lanes, dtype=np.int64)
        self.active = np.ones(lanes, dtype=bool)
        self._reward_rows = self._trimmed(self.splits.reward)
        self._allocate_inputs()
        self.looped = self.lanes > 1 and not self._lanes_can_share()
        if self.looped and config.activation_checkpointing:
            raise ModelError("activation_checkpointing needs a model whose lanes run together; those of this one run "
                             "one at a time (it mixes rows). Leave activation_checkpointing out, or use one lane.")
        self._check_every_layer_is_called()

    @torch.no_grad()
    def _leading_sizes(self, rows: int) -> dict[str, list[int]]:
        """First dimensions of every adapted layer's inputs for a batch of `rows` rows per lane."""
        context = self.lane_model.context
        context.leading = {}
        try:
            index = torch.zeros(self.lanes * rows, dtype=torch.int64, device=self.device)
            self._call(take_rows(self._reward_rows, index, 0))
            return context.leading
        finally:
            context.leading = None

    def _lanes_can_share(self) -> bool:
        """Whether every adapted layer sees a batch that grows with the rows, lane by lane.

        Some models (DeBERTa) also put tensors without a batch dimension through their layers; their
        lanes run one at a time.
        """
        self.looped = False
        try:
            one, two = self._leading_sizes(1), self._leading_sizes(2)
        except (RuntimeError, ModelError):
            return False
        whole = all(size % self.lanes == 0 for sizes in one.values() for size in sizes)
        return whole and two == {name: [2 * size for size in sizes] for name, sizes in one.items()}

    def _check_every_layer_is_called(self) -> None:
        with self.lane_model.context.using(lane=0):
            called = self._leading_sizes(1)
        unused = [layer.name for layer in self.lane_model.spectral if layer.name not in called]
        if unused:
            raise ModelError(f"the model's forward pass never calls {unused[0]!r} ({len(unused)} such layers): its "
                             "weight is read directly, or it is reached past the module tree. Leave it out of "
                             "target_modules.")

    @property
    def captures(self) -> bool:
        """Whether steps are recorded as CUDA graphs."""
        return self.config.cuda_graphs and self.device.type == "cuda"

    def _allocate_inputs(self) -> None:
        """The static tensors that steps read and write, so that they can be captured."""
        lanes = torch.zeros(5, self.lanes, device=self.device)
        self.losses, self.grad_norm, self.learning_rate, self._factor, self.weight = lanes
        self.weight.fill_(1)
        self._active = torch.ones(self.lanes, dtype=torch.bool, device=self.device)
        self._mask = torch.zeros(self.lanes, *self.base.spectrum.layout.slots, dtype=torch.bool, device=self.device)
        self._indices = torch.zeros(self.lanes, self.config.batch_size, dtype=torch.int64, device=self.device)
        self._dropout_keys: Tensor | None = None
        if self.config.dropout:
            self._dropout_keys = torch.zeros(self.config.accumulate, self.lanes, dtype=torch.int64, device=self.device)
        self._next: tuple[bytes, np.ndarray, Tensor, int] = (b"", np.zeros(0), torch.zeros(0), 0)
        self._train_step: dict[int, Captured[None]] = {}
        self.pool = shared_pool() if self.captures else None
        self._side = SideStreams(torch.cuda.Stream(), torch.cuda.Stream()) if self.captures else None

    def _to_device(self, rows: Rows) -> Rows:
        return {name: column.to(self.device) for name, column in rows.items()}

    def _trimmed(self, rows: Rows) -> Rows:
        width = rounded(int(row_lengths(rows).max(initial=0)))
        count = len(next(iter(rows.values())))
        return take_rows(rows, torch.arange(count, device=self.device), width)

    def _make_optimiser(self) -> MaskedAdamW:
        config = self.config
        groups = [
            {
                "params": [parameter],
                "lr": torch.zeros(self.lanes, device=self.device),
                "reference": None if name == HEAD else self.bank.reference[name],
            }
            for name, parameter in self.bank.rows.items()
        ]
        return MaskedAdamW(groups, betas=config.betas, eps=config.adam_eps, weight_decay=config.weight_decay)

    # ------------------------------------------------------------------ starting a run

    def start(self, lane: int, seed: int, episode: int) -> None:
        """Put one lane at the start of a run: pretrained components, fresh moments, its own head.

        Args:
            lane: Which lane.
            seed: Key of its data order, dropout and head start.
            episode: Further part of the key.
        """
        rows = dict(self.bank.reference)
        if HEAD in rows:
            rows[HEAD] = head_start(self.base, self.lane_model, seed, episode).unsqueeze(0)
        self.put_rows(lane, rows)
        self.seeds[lane], self.episodes[lane], self.steps[lane] = seed, episode, 0

    def put_rows(self, lane: int, rows: dict[str, Tensor]) -> None:
        """Replace a lane's trained numbers and forget its moments; clock and data order stay.

        Args:
            lane: Which lane.
            rows: Per buffer, (N, D).
        """
        with torch.no_grad():
            for name, parameter in self.bank.rows.items():
                parameter[lane].copy_(rows[name])
                for key in OWN_STATE:
                    self.optimiser.state[parameter][key][lane].zero_()

    # ------------------------------------------------------------------ training

    def begin(self, mask: Tensor, active: np.ndarray) -> None:
        """Choose what the next calls of `train` update.

        Args:
            mask: (L, M, K) bool: components that are updated.
            active: (L,) bool: lanes that step at all; the others stay bitwise as they are.
        """
        self.active = active
        self._mask.copy_(mask, non_blocking=True)
        self._active.copy_(torch.from_numpy(active), non_blocking=True)
        self.losses.zero_()

    def train(self, steps: int) -> None:
        """Take optimiser steps (Eq. 6) on what `begin` chose; heads train in every step.

        Leaves the summed training losses in `losses`, and the gradient norm of the last step (before
        clipping) and its learning rate in `grad_norm` and `learning_rate`, each (L,).
        """
        for _ in range(steps):
            width = self._load_step()
            if width not in self._train_step:
                self._train_step[width] = Captured(
                    f"training step at width {width}", partial(self._step, width), self.captures, self._rehearsal,
                    self.pool,
                )
            within_memory(self._train_step[width], partial(self._advice, width))
            self.steps += self.active

    def _advice(self, width: int) -> str:
        config = self.config

        def try_rows(rows: int) -> None:
            batch = self.batches.gather(self._indices[:, :1].expand(-1, rows).clamp_min(0), width)
            _backward(self.task.loss(self.forward(batch.rows), batch.rows)[0].sum())

        return training_advice(self.lanes, config.batch_size, config.accumulate, width, self.device, try_rows)

    def _side_streams(self, rows: int, width: int) -> SideStreams | None:
        """Streams for the bank's part of a pass over `rows` rows a lane, where what it reads can be held so long."""
        numbers = sum(m.out_features + m.in_features for m in self.base.matrices)
        small = 2 * self.lanes * rows * max(1, width) * numbers <= SMALL_PASS
        return self._side if small else None

    def _load_step(self) -> int:
        """Put the next step's row indices, learning rates and dropout keys into place; returns its width."""
        self.prefetch()
        _, indices, keys, width = self._next
        self._indices.copy_(torch.from_numpy(indices), non_blocking=True)
        factor = linear_schedule(torch.from_numpy(self.steps), self.config.total_steps, self.config.warmup)
        self._factor.copy_(factor, non_blocking=True)
        if self._dropout_keys is not None:
            self._dropout_keys.copy_(keys, non_blocking=True)
        return width

    def prefetch(self) -> None:
        """Draw rows and dropout keys of the next training step, if they are not drawn yet.

        Call it while the device is busy; the draws are a function of the clocks, so nothing changes but the time.
        """
        clocks = np.stack([self.seeds, self.episodes, self.steps], axis=1)
        if self._next[0] == clocks.tobytes():
            return
        indices = np.stack([self.batches.indices(lane, *map(int, clock)) for lane, clock in enumerate(clocks)])
        keys = self._draw_dropout_keys() if self._dropout_keys is not None else torch.zeros(0)
        width = max(self.batches.width(step) for step in set(self.steps.tolist()))
        self._next = clocks.tobytes(), indices, keys, width

    @torch.enable_grad()
    def _step(self, width: int) -> None:
        """One optimiser step of all lanes from static inputs; nothing here waits for the device."""
        self.optimiser.set_masks(list(self.bank.row_masks(self._mask, self._active).values()))
        self.bank.zero_grad()
        side = self._side_streams(self.config.batch_size // self.config.accumulate, width)
        self.lane_model.context.side = side
        total, weight = torch.zeros_like(self.losses), torch.zeros_like(self.losses)
        for part, indices in enumerate(self._indices.chunk(self.config.accumulate, dim=1)):
            batch = self.batches.gather(indices, width)
            keys = None if self._dropout_keys is None else self._dropout_keys[part]
            with self.lane_model.context.using(dropout_keys=keys):
                row_total, row_weight = self.task.loss(self.forward(batch.rows), batch.rows)
                lane_total = (row_total * batch.weight).view(self.lanes, -1).sum(1)
                _backward(lane_total.sum())
            total += lane_total.detach()
            weight += (row_weight * batch.weight).view(self.lanes, -1).sum(1)
        if side:
            side.join()
        self.bank.collect()
        self.weight.copy_(weight.clamp_min(1e-30))
        self.losses.add_(total / self.weight)
        for name, group in zip(self.bank.rows, self.optimiser.param_groups, strict=True):
            group["lr"].copy_(self._peak(name) * self._factor)
        self.learning_rate.copy_(self.config.learning_rate * self._factor)
        self.grad_norm.copy_(self.optimiser.clip_lanes(self.config.max_grad_norm, scale=1 / self.weight))
        self.optimiser.step()

    def _peak(self, buffer: str) -> float:
        config = self.config
        return (config.head_learning_rate or config.learning_rate) if buffer == HEAD else config.learning_rate

    @contextlib.contextmanager
    def _rehearsal(self) -> Iterator[None]:
        """With no lane active, a training step leaves no trace but in the reported numbers."""
        active, losses = self._active.clone(), self.losses.clone()
        self._active.zero_()
        try:
            yield
        finally:
            self._active.copy_(active)
            self.losses.copy_(losses)

    def _draw_dropout_keys(self) -> Tensor:
        clocks = list(zip(self.seeds, self.episodes, self.steps, strict=True))
        keys = [
            [int(generator(int(s), Purpose.DROPOUT, int(e), int(t), part).integers(2**31)) for s, e, t in clocks]
            for part in range(self.config.accumulate)
        ]
        return torch.tensor(keys)

    # ------------------------------------------------------------------ forward passes

    def forward(self, rows: Rows) -> Tensor:
        """The model's output for lane-major rows, (L·B, ...)."""
        self.bank.refresh()
        if not self.looped:
            return self._call(rows)
        size = len(next(iter(rows.values()))) // self.lanes
        parts = [{k: v[lane * size : (lane + 1) * size] for k, v in rows.items()} for lane in range(self.lanes)]
        return torch.cat([self._call_lane(lane, part) for lane, part in enumerate(parts)])

    def _forward_lane(self, lane: int, rows: Rows) -> Tensor:
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

    def _in_every_lane(self, rows: Rows) -> Rows:
        return {name: c.repeat(self.lanes, *[1] * (c.dim() - 1)) for name, c in rows.items()}

    @torch.no_grad()
    def reward_loss(self, lane: int | None = None) -> Tensor:
        """Loss on the fixed reward rows, in evaluation mode (L1 of Eq. 2).

        Args:
            lane: Only this lane's, (1,); ``None`` = every lane's, (L,).
        """
        lanes = self.lanes if lane is None else 1
        total, weight = torch.zeros(2, lanes, device=self.device)
        size = self._rows_at_once(self._reward_rows, lanes)
        self.lane_model.context.side = self._side_streams(size, _width(self._reward_rows)) if lane is None else None
        for start in range(0, len(next(iter(self._reward_rows.values()))), size):
            part = {k: v[start : start + size] for k, v in self._reward_rows.items()}
            rows = self._in_every_lane(part) if lane is None else part
            output = self.forward(rows) if lane is None else self._forward_lane(lane, rows)
            row_total, row_weight = self.task.loss(output, rows)
            total += row_total.view(lanes, -1).sum(1)
            weight += row_weight.view(lanes, -1).sum(1)
        mean: Tensor = total / weight
        return mean

    def _rows_at_once(self, rows: Rows, lanes: int) -> int:
        """Rows per lane in a forward pass without gradients, so that its memory stays within a budget."""
        tokens = lanes * max(1, _width(rows))
        limit = FORWARD_TOKENS // tokens
        if self.task.head == "causal-lm":
            vocabulary = getattr(getattr(self.base.model, "config", None), "vocab_size", 1)
            limit = min(limit, LOGITS_BUDGET // (tokens * vocabulary))
        return max(1, min(FORWARD_ROWS, limit))

    @torch.no_grad()
    def evaluate(self, split: str) -> list[dict[str, float]]:
        """The task's score on a split, one dictionary a lane.

        Raises:
            ModelError: The split has no rows.
        """
        rows = self.splits[split]
        lengths = row_lengths(rows)
        if not len(lengths):
            raise ModelError(f"the split {split!r} has no rows; give it some (for tune: tune_size > 0).")
        order = np.argsort(lengths, kind="stable")
        parts = []
        size = self._rows_at_once(rows, self.lanes)
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            part = take_rows(rows, torch.from_numpy(chosen).to(self.device), rounded(int(lengths[chosen].max())))
            repeated = self._in_every_lane(part)
            advice = partial(forward_advice, self.lanes, len(chosen), _width(part), self.device)
            predicted = within_memory(partial(self._predict, repeated), advice)
            parts.append(predicted.view(self.lanes, len(chosen), -1).float().cpu().numpy())
        back = np.argsort(order, kind="stable")
        predictions = np.concatenate(parts, axis=1)[:, back]  # (L, N, P)
        host = {name: column.cpu() for name, column in rows.items()}
        scores = [self.task.score(predictions[lane], host) for lane in range(self.lanes)]
        return [{name: float(value) for name, value in score.items()} for score in scores]

    def _predict(self, rows: Rows) -> Tensor:
        return self.task.predict(self.forward(rows), rows)

    @property
    def forward_advice(self) -> str:
        """What to say when measuring the reward loss runs out of memory."""
        rows = min(self._rows_at_once(self._reward_rows, self.lanes), len(next(iter(self._reward_rows.values()))))
        return forward_advice(self.lanes, rows, _width(self._reward_rows), self.device)

    @torch.no_grad()
    def matrix_grad_norms(self) -> Tensor:
        """Norm of the last gradient of the mean loss by every matrix's bank, (L, M), before clipping and masks."""
        square = torch.zeros(self.lanes, len(self.base.matrices), device=self.device)
        for name, owner in self.base.spectrum.layout.row_matrix.items():
            gradient = self.bank.rows[name].grad
            assert gradient is not None
            square.index_add_(1, owner, gradient.square().sum(-1))
        norms: Tensor = square.sqrt() / self.weight.unsqueeze(1)
        return norms

    # ------------------------------------------------------------------ state

    def get_state(self, lane: int) -> dict[str, Tensor]:
        """A copy of everything that is one lane's own, as plain tensors by name."""
        clock = torch.tensor([int(x[lane]) for x in (self.seeds, self.episodes, self.steps)])
        spectrum = self.base.spectrum
        return {
            "finetune.clock": clock,
            "finetune.structure": torch.tensor(spectrum.structure),
            "finetune.probe": spectrum.probe.clone(),
            **{name: value[lane].clone() for name, value in self._owned().items()},
        }

    def _owned(self) -> dict[str, Tensor]:
        """Everything on the device that lanes own, by name, all lanes together: (L, ...)."""
        tensors = {}
        for name, parameter in self.bank.rows.items():
            tensors[f"rows.{name}"] = parameter.detach()
            for key in OWN_STATE:
                tensors[f"optimiser.{key}.{name}"] = self.optimiser.state[parameter][key]
        return tensors

    def check_state(self, state: dict[str, Tensor]) -> None:
        """See whether `set_state` would take a state; changes nothing.

        Raises:
            ModelError: It belongs to another model, bank or head.
        """
        marks = {"finetune.clock": torch.zeros(3), "finetune.structure": torch.tensor(0)}
        owned = {name: value[0] for name, value in self._owned().items()}
        for key, target in {**marks, "finetune.probe": self.base.spectrum.probe, **owned}.items():
            if key not in state or state[key].shape != target.shape:
                raise ModelError(f"this state does not fit: {key!r} is missing or has another shape. It was taken from "
                                 "an environment with another model, rank_set or head.")
        if not self.base.spectrum.same_as(int(state["finetune.structure"]), state["finetune.probe"]):
            raise ModelError("this state does not fit: it was taken from other pretrained weights, another bank or "
                             "another parametrisation.")

    def set_state(self, lanes: list[int], state: dict[str, Tensor]) -> None:
        """Put a state that `check_state` accepts into lanes, bitwise: one copy per buffer, however many lanes."""
        with torch.no_grad():
            for key, target in self._owned().items():
                put_lanes(target, lanes, state[key])
        self.seeds[lanes], self.episodes[lanes], self.steps[lanes] = (int(x) for x in state["finetune.clock"])


def put_lanes(target: Tensor, lanes: list[int], value: Tensor) -> None:
    """Copy `value` (...) into some lanes of `target` (L, ...), in one operation."""
    value = value.to(target)
    if len(lanes) == len(target):
        target.copy_(value)
    elif len(lanes) == 1:
        target[lanes[0]].copy_(value)
    else:
        target[torch.tensor(lanes, device=target.device)] = value
