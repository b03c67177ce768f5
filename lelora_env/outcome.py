"""What came of an env step, measured on the device in one go and fetched in one go.

Shapes: L lanes · M matrices · F features.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lelora_env.capture import Captured
from lelora_env.features import Observer, change_norms
from lelora_env.finetune import FineTuner


@dataclass(frozen=True)
class Outcome:
    """The measurements of one env step, on the host.

    Attributes:
        losses: (L,) loss on the reward rows, float64 (L1 of Eq. 2).
        finite: (L,) bool: lanes whose losses and trainable numbers are all finite.
        train_loss: (L,) mean training loss of the step, before each update.
        grad_norm: (L,) gradient norm of the last optimiser step, before clipping.
        learning_rate: (L,) of the last optimiser step.
        update_norms: (L, M) ‖ΔW‖_F of the env step.
        delta_norms: (L, M) ‖ΔW‖_F since the start of the run.
        observation: (L, M, F) float32.
    """

    losses: np.ndarray
    finite: np.ndarray
    train_loss: np.ndarray
    grad_norm: np.ndarray
    learning_rate: np.ndarray
    update_norms: np.ndarray
    delta_norms: np.ndarray
    observation: np.ndarray


class Measurement:
    """Measures all lanes: reward loss, norms and observation, as one captured function."""

    def __init__(self, tuner: FineTuner, observer: Observer) -> None:
        """Allocate the static tensors.

        Args:
            tuner: The fine-tuning process.
            observer: Makes the observation.
        """
        self.tuner, self.observer = tuner, observer
        lanes, matrices, device = tuner.lanes, len(tuner.base.matrices), tuner.device
        self.before = tuner.bank.copy_rows()
        self.progress = torch.zeros(lanes, device=device)
        self.ran = torch.zeros(lanes, 1, dtype=torch.bool, device=device)
        self.extras = {name: torch.zeros(lanes, matrices, device=device) for name in ("grad_norm", "update_norm")}
        self._wants_extras = bool(observer.config.extra_features)
        self._captured = Captured("measurement", self._measure, tuner.captures, self._rehearsal)

    def begin(self) -> None:
        """Remember the bank as it is before an env step."""
        for name, rows in self.before.items():
            rows.copy_(self.tuner.bank.rows[name].detach())

    def __call__(self, progress: np.ndarray, ran: np.ndarray) -> Outcome:
        """Measure.

        Args:
            progress: (L,) share of the horizon spent, shown in the observation.
            ran: (L,) bool: lanes that took an env step since `begin`; the optional columns of the
                others stay as they are.
        """
        self.progress.copy_(torch.from_numpy(progress))
        self.ran.copy_(torch.from_numpy(ran).unsqueeze(1))
        lane, norms, observation = (x.cpu().numpy() for x in self._captured())
        losses, finite, train_loss, grad_norm, learning_rate = lane.astype(np.float64)
        return Outcome(
            losses=losses,
            finite=finite > 0,
            train_loss=train_loss,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            update_norms=norms[0],
            delta_norms=norms[1],
            observation=observation,
        )

    @torch.no_grad()
    def observe(self, progress: np.ndarray) -> np.ndarray:
        """The observation alone, (L, M, F)."""
        self.progress.copy_(torch.from_numpy(progress))
        return self.observer.observe(dict(self.tuner.bank.rows), self.progress, self.extras).cpu().numpy()

    @torch.no_grad()
    def _measure(self) -> tuple[Tensor, Tensor, Tensor]:
        tuner = self.tuner
        rows: dict[str, Tensor] = dict(tuner.bank.rows)
        losses = tuner.reward_loss()
        train_loss = tuner.losses / tuner.config.steps_per_action
        sums = [p.detach().flatten(1).sum(1) for p in rows.values()]  # finite only if every number is
        finite = torch.stack([*sums, losses, train_loss]).isfinite().all(0)
        update = change_norms(rows, self.before, tuner.base.spectrum)
        total = change_norms(rows, tuner.base.spectrum.reference, tuner.base.spectrum)
        if self._wants_extras:
            for name, value in (("update_norm", update), ("grad_norm", tuner.matrix_grad_norms())):
                self.extras[name].copy_(torch.where(self.ran, value, self.extras[name]))
        observation = self.observer.observe(rows, self.progress, self.extras)
        lane = torch.stack([losses, finite.float(), train_loss, tuner.grad_norm, tuner.learning_rate])
        return lane, torch.stack([update, total]), observation

    @contextlib.contextmanager
    def _rehearsal(self) -> Iterator[None]:
        extras = {name: value.clone() for name, value in self.extras.items()}
        try:
            yield
        finally:
            for name, value in extras.items():
                self.extras[name].copy_(value)
