"""Fine-tuning L lanes of one frozen model under a component mask. No word of reinforcement learning.

Shapes: L lanes · M matrices · K components · B rows a lane · N rows · P numbers a row to score.
"""

import contextlib
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lelora_env.adapter import SideStream
from lelora_env.attach import attach, bind, head_start, recompute_activations
from lelora_env.bank import HEAD, Bank
from lelora_env.batches import Batches, rounded, row_lengths, take_rows
from lelora_env.capture import Captured, SharedPool
from lelora_env.config import EnvConfig
from lelora_env.errors import ModelError
from lelora_env.inputs import StepInputs
from lelora_env.memory import training_advice, within_memory
from lelora_env.models import Base
from lelora_env.optim import MaskedAdamW
from lelora_env.passes import Passes, backward, token_width
from lelora_env.scoring import Scorer
from lelora_env.tasks.base import SPLIT_NAMES, Rows, Splits, Task

SMALL_PASS = 2**28
"""Bytes of a pass's inputs and outputs of adapted layers up to which the bank's gradients run beside it."""

OWN_STATE = ("step", "exp_avg", "exp_avg_sq")
"""Optimiser state that belongs to a lane; masks are set anew in every step."""


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
        self.inputs = StepInputs(self.batches, config, lanes, base.spectrum.layout.slots, self.device)
        self.losses, self.grad_norm, self.learning_rate, self.weight = torch.zeros(4, lanes, device=self.device)
        self.weight.fill_(1)
        self._clipping = torch.ones(lanes, device=self.device) if "credit" in config.component_info else None
        reward_rows = self._trimmed(self.splits.reward)
        self.passes = Passes(base, task, self.lane_model, self.bank, reward_rows)
        if self.passes.looped and config.activation_checkpointing:
            raise ModelError("activation_checkpointing needs a model whose lanes run together; those of this one run "
                             "one at a time (it mixes rows). Leave activation_checkpointing out, or use one lane.")
        self.scorer = Scorer(self.passes, task, self.splits, reward_rows)
        self.pool = SharedPool() if self.captures else None
        self._stepping = np.ones(lanes, dtype=bool)
        self._side = SideStream() if self.captures else None
        self._train_step: dict[int, Captured[None]] = {}

    @property
    def captures(self) -> bool:
        """Whether steps are recorded as CUDA graphs."""
        return self.config.cuda_graphs and self.device.type == "cuda"

    @property
    def rows_at_once(self) -> int:
        """Training rows a lane in one pass."""
        return self.config.batch_size // self.config.accumulate

    @property
    def steps(self) -> np.ndarray:
        """Optimiser steps of each lane since the start of its run, (L,)."""
        return self.inputs.steps

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
        inputs = self.inputs
        inputs.seeds[lane], inputs.episodes[lane], inputs.steps[lane] = seed, episode, 0

    def put_rows(self, lane: int, rows: dict[str, Tensor]) -> None:
        """Replace a lane's trained numbers and forget its moments; clock and data order stay.

        Args:
            lane: Which lane.
            rows: Per buffer, (N, D).

        Raises:
            ModelError: They hold NaN or infinity; nothing has been changed then.
        """
        with torch.no_grad():
            for name in self.bank.rows:
                if not bool(rows[name].isfinite().all()):
                    raise ModelError(f"the rows {name!r} hold NaN or infinity; nothing has been changed.")
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
        self._stepping = active
        self.inputs.choose(mask, active)
        self.losses.zero_()

    def train(self, steps: int) -> None:
        """Take optimiser steps (Eq. 6) on what `begin` chose; heads train in every step.

        Leaves the summed training losses in `losses`, and the gradient norm of the last step (before
        clipping) and its learning rate in `grad_norm` and `learning_rate`, each (L,).

        Raises:
            MemoryLimitError: The device's memory does not suffice; nothing has been trained by this step.
        """
        for _ in range(steps):
            width = self.inputs.load()
            if width not in self._train_step:
                self._train_step[width] = Captured(
                    f"training step at width {width}", partial(self._step, width), self.captures, self._rehearsal,
                    self.pool,
                )
            within_memory(self._train_step[width], partial(self._advice, width))
            self.inputs.steps += self._stepping

    def _advice(self, width: int) -> str:
        config = self.config

        @torch.enable_grad()
        def try_rows(rows: int) -> None:
            batch = self.batches.gather(self.inputs.indices[:, :1].expand(-1, rows).clamp_min(0), width)
            backward(self.task.loss(self.forward(batch.rows), batch.rows)[0].sum())

        return training_advice(self.lanes, config.batch_size, config.accumulate, width, self.device, try_rows)

    def _side_stream(self, lane_rows: int, width: int) -> SideStream | None:
        """A stream for the bank's gradients, where all that they are computed from can be held till the pass ends."""
        rows = self.lanes * lane_rows
        numbers = sum(m.out_features + m.in_features for m in self.base.matrices)
        size = self.base.spectrum.residual[0].element_size()
        return self._side if size * rows * max(1, width) * numbers <= SMALL_PASS else None

    @torch.enable_grad()
    def _step(self, width: int) -> None:
        """One optimiser step of all lanes from static inputs; nothing here waits for the device."""
        self.optimiser.set_masks(list(self.bank.row_masks(self.inputs.mask, self.inputs.active).values()))
        self.bank.zero_grad()
        side = self.lane_model.context.side = self._side_stream(self.rows_at_once, width)
        total, weight = torch.zeros_like(self.losses), torch.zeros_like(self.losses)
        for part, indices in enumerate(self.inputs.indices.chunk(self.config.accumulate, dim=1)):
            batch = self.batches.gather(indices, width)
            keys = None if self.inputs.dropout_keys is None else self.inputs.dropout_keys[part]
            with self.lane_model.context.using(dropout_keys=keys):
                row_total, row_weight = self.task.loss(self.forward(batch.rows), batch.rows)
                lane_total = (row_total * batch.weight).view(self.lanes, -1).sum(1)
                backward(lane_total.sum())
            total += lane_total.detach()
            weight += (row_weight * batch.weight).view(self.lanes, -1).sum(1)
        if side:
            side.join()
        self.bank.collect()
        self.weight.copy_(weight.clamp_min(1e-30))
        self.losses.add_(total / self.weight)
        for name, group in zip(self.bank.rows, self.optimiser.param_groups, strict=True):
            group["lr"].copy_(self._peak(name) * self.inputs.factor)
        self.learning_rate.copy_(self.config.learning_rate * self.inputs.factor)
        self.grad_norm.copy_(self.optimiser.clip_lanes(self.config.max_grad_norm, scale=1 / self.weight))
        if self._clipping is not None:
            self._clipping.copy_(self.optimiser.factor)
        self.optimiser.step()

    def _peak(self, buffer: str) -> float:
        config = self.config
        return (config.head_learning_rate or config.learning_rate) if buffer == HEAD else config.learning_rate

    @contextlib.contextmanager
    def _rehearsal(self) -> Iterator[None]:
        """With no lane active, a training step leaves no trace but in the reported numbers."""
        active, losses = self.inputs.active.clone(), self.losses.clone()
        self.inputs.active.zero_()
        try:
            yield
        finally:
            self.inputs.active.copy_(active)
            self.losses.copy_(losses)

    # ------------------------------------------------------------------ measuring

    def forward(self, rows: Rows) -> Tensor:
        """The model's output for lane-major rows, (L·B, ...)."""
        return self.passes.forward(rows)

    def reward_loss(self, lane: int | None = None) -> Tensor:
        """Loss on the reward rows, see `Scorer.reward_loss`."""
        return self.scorer.reward_loss(lane)

    def evaluate(self, split: str) -> list[dict[str, float]]:
        """The task's score on a split, one dictionary a lane; see `Scorer.evaluate`."""
        return self.scorer.evaluate(split)

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

    def changes(self) -> dict[str, Tensor]:
        """What the last optimiser step added to each row, or would have added were it not masked out, (L, N, D).

        Only with the component info ``"credit"``, and as long as the buffers hold the training gradient.
        """
        assert self._clipping is not None
        return dict(zip(self.bank.rows, self.optimiser.changes(self._clipping), strict=True))

    def replace_gradient(self) -> tuple[Tensor, Tensor]:
        """Measure the reward loss and put its gradient by the rows where the training gradient was.

        Returns:
            The loss of every lane, see `reward_loss`, and the weight that its gradient is yet to be divided by;
            both (L,).
        """
        self.bank.zero_grad()
        rows = self.scorer.rows_with_gradients(self.rows_at_once)
        side = self.lane_model.context.side = self._side_stream(rows, token_width(self.scorer.rows))
        losses, weight = self.scorer.reward_loss_backward(self.rows_at_once)
        if side:
            side.join()
        self.bank.collect()
        return losses, weight

    # ------------------------------------------------------------------ state

    def get_state(self, lane: int) -> dict[str, Tensor]:
        """A copy of everything that is one lane's own, as plain tensors by name."""
        inputs, spectrum = self.inputs, self.base.spectrum
        clock = torch.tensor([int(x[lane]) for x in (inputs.seeds, inputs.episodes, inputs.steps)])
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
        seed, episode, step = (int(x) for x in state["finetune.clock"])
        inputs = self.inputs
        inputs.seeds[lanes], inputs.episodes[lanes], inputs.steps[lanes] = seed, episode, step


def put_lanes(target: Tensor, lanes: list[int], value: Tensor) -> None:
    """Copy `value` (...) into some lanes of `target` (L, ...), in one operation."""
    value = value.to(target)
    if len(lanes) == len(target):
        target.copy_(value)
    elif len(lanes) == 1:
        target[lanes[0]].copy_(value)
    else:
        target[torch.tensor(lanes, device=target.device)] = value
