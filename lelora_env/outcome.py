"""What came of an env step, measured on the device in one go and fetched in one go.

Shapes: L lanes · M matrices · F features · K bank slots a matrix.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lelora_env.attribution import loss_and_components
from lelora_env.capture import Captured
from lelora_env.features import Observer
from lelora_env.finetune import FineTuner
from lelora_env.grams import RUN, STEP, Grams
from lelora_env.memory import within_memory


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
        components: For every name of ``component_info``, (L, M, K) float32; see `lelora_env.attribution`.
    """

    losses: np.ndarray
    finite: np.ndarray
    train_loss: np.ndarray
    grad_norm: np.ndarray
    learning_rate: np.ndarray
    update_norms: np.ndarray
    delta_norms: np.ndarray
    observation: np.ndarray
    components: dict[str, np.ndarray]


class Measurement:
    """Measures all lanes: reward loss, norms and observation, as one captured function."""

    def __init__(self, tuner: FineTuner, observer: Observer) -> None:
        """Allocate the static tensors.

        Args:
            tuner: The fine-tuning process.
            observer: Makes the observation.
        """
        self.tuner, self.observer = tuner, observer
        self.shape = lanes, matrices = tuner.lanes, len(tuner.base.matrices)
        device = tuner.device
        self.grams = Grams(tuner.bank)
        self.progress = torch.zeros(lanes, device=device)
        self.ran = torch.zeros(lanes, 1, dtype=torch.bool, device=device)
        self.extras = {name: torch.zeros(lanes, matrices, device=device) for name in ("grad_norm", "update_norm")}
        self._wants_extras = bool(observer.config.extra_features)
        self.components = observer.config.component_info
        slots = tuner.base.spectrum.layout.slots
        self._shapes = [(5, lanes), (2, lanes, matrices), (lanes, matrices, len(observer.table)),
                        (len(self.components), lanes, *slots)]
        self._captured = Captured("measurement", self._measure, tuner.captures, self._rehearsal, tuner.pool)
        self._result = torch.zeros(0)

    def begin(self) -> None:
        """Remember the bank as it is before an env step."""
        self.grams.begin()

    def __call__(self, progress: np.ndarray, ran: np.ndarray) -> Outcome:
        """Measure.

        Args:
            progress: (L,) share of the horizon spent, shown in the observation.
            ran: (L,) bool: lanes that took an env step since `begin`; the optional columns of the
                others stay as they are.
        """
        self.launch(progress, ran)
        return self.fetch()

    def launch(self, progress: np.ndarray, ran: np.ndarray) -> None:
        """Start a measurement without waiting for it; see `__call__` for the arguments."""
        self.progress.copy_(torch.from_numpy(progress), non_blocking=True)
        self.ran.copy_(torch.from_numpy(ran).unsqueeze(1), non_blocking=True)
        self._result = within_memory(self._captured, self._advice)

    def _advice(self) -> str:
        said = self.tuner.scorer.advice
        return said + " Without component_info='credit' it needs less." if "credit" in self.components else said

    def fetch(self) -> Outcome:
        """Wait for what `launch` started: one transfer from the device."""
        flat = self._result.cpu().numpy()
        ends = np.cumsum([math.prod(shape) for shape in self._shapes])
        lane, norms, observation, components = (
            part.reshape(shape) for part, shape in zip(np.split(flat, ends[:-1]), self._shapes, strict=True))
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
            components=dict(zip(self.components, components, strict=True)),
        )

    def reward_loss(self, lane: int) -> float:
        """One lane's loss on the reward rows."""
        return float(within_memory(lambda: self.tuner.reward_loss(lane), lambda: self.tuner.scorer.advice))

    def observe(self, progress: np.ndarray) -> np.ndarray:
        """The observation alone, (L, M, F)."""
        self.progress.copy_(torch.from_numpy(progress), non_blocking=True)
        return within_memory(self._observe, lambda: self.tuner.scorer.advice).cpu().numpy()

    @torch.no_grad()
    def _observe(self) -> Tensor:
        return self.observer.observe(self.grams(), self.progress, self.extras)

    @torch.no_grad()
    def _measure(self) -> Tensor:
        """Everything that `fetch` takes apart, as one flat tensor."""
        tuner = self.tuner
        grad_norms = tuner.matrix_grad_norms() if self._wants_extras else None
        losses, components = loss_and_components(tuner)
        train_loss = tuner.losses / tuner.config.steps_per_action
        sums = [p.detach().flatten(1).sum(1) for p in tuner.bank.rows.values()]  # finite only if every number is
        finite = torch.stack([*sums, losses, train_loss]).isfinite().all(0)
        products = self.grams()
        update, total = products.change(STEP), products.change(RUN)
        if grad_norms is not None:
            for name, value in (("update_norm", update), ("grad_norm", grad_norms)):
                self.extras[name].copy_(torch.where(self.ran, value, self.extras[name]))
        observation = self.observer.observe(products, self.progress, self.extras)
        lane = torch.stack([losses, finite.float(), train_loss, tuner.grad_norm, tuner.learning_rate])
        return torch.cat([part.flatten() for part in (lane, update, total, observation, *components)])

    @contextlib.contextmanager
    def _rehearsal(self) -> Iterator[None]:
        """Measuring changes the optional columns and, with credit, the gradients that it reads."""
        written = list(self.extras.values())
        if "credit" in self.components:
            written += [row.grad for row in self.tuner.bank.rows.values() if row.grad is not None]
        before = [value.clone() for value in written]
        try:
            yield
        finally:
            for value, old in zip(written, before, strict=True):
                value.copy_(old)
