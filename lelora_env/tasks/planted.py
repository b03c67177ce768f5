"""`planted`: a teacher-student task whose best allocation is known by construction.

The student is a bank of parallel linear maps W_{l,t} (layer l, type t), each with inputs of its
own. The teacher differs from it only in planted components: for the components k of one window of
W_{l,t},

    W* = W + ρ Σ_k p_k v_kᵀ,   p_k orthonormal and orthogonal to every left vector in the bank.

With white inputs the gradient of the loss is -(W* - W), so training a component outside the window
meets an exactly zero expected gradient: only choices that cover the window can lower the loss.
Nothing but the allocation decides how fast that happens, and the optimum is known without search.

Shapes: N rows · I/O summed input/output sizes of all matrices.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lelora_env.allocation import component_range
from lelora_env.config import NAMED_LOCATIONS
from lelora_env.errors import DataError, LeLoRAError, UnknownNameError
from lelora_env.keys import Purpose, generator
from lelora_env.tasks.base import Head, Rows, Splits

TYPE_SHAPES: dict[str, tuple[int, int]] = {
    "query": (1, 1),
    "key": (1, 1),
    "value": (1, 1),
    "output": (1, 1),
    "up": (2, 1),
    "down": (1, 2),
}
"""(out, in) of each matrix type, in units of the model's width."""

PLANS = ("by_type", "by_depth", "by_type_and_depth", "everywhere_primary")
"""Which matrices are planted, and where: see `planted_choice`."""


@dataclass(frozen=True)
class Choice:
    """What is planted in one matrix: `rank` components at `location`; rank 0 = nothing."""

    rank: int
    location: str


def planted_choice(plan: str, layer: int, layers: int, kind: int, ranks: tuple[int, ...]) -> Choice:
    """What a plan plants in one matrix; a function of type and relative depth alone.

    So the same plan on a deeper or wider model has the same optimum per (type, relative depth).

    Args:
        plan: One of `PLANS`.
        layer: Layer index.
        layers: Number of layers.
        kind: Index of the matrix's type in the model.
        ranks: The planted ranks that alternate between matrices.
    """
    third = 3 * layer // layers
    names = tuple(NAMED_LOCATIONS)
    if plan == "everywhere_primary":
        return Choice(ranks[0], "primary")
    phase = {"by_type": kind, "by_depth": third, "by_type_and_depth": kind // 2 + third}[plan]
    if plan == "by_type_and_depth" and (kind + third) % 2:
        return Choice(0, "primary")
    return Choice(ranks[third % len(ranks)], names[phase % 3])


class ParallelLinear(nn.Module):
    """Parallel linear maps with inputs of their own: (N, I) in, (N, O) out, nothing in between."""

    def __init__(self, layers: int, width: int, types: tuple[str, ...]) -> None:
        """Make ``layers`` blocks with one bias-free linear map per type."""
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {t: nn.Linear(TYPE_SHAPES[t][1] * width, TYPE_SHAPES[t][0] * width, bias=False) for t in types}
            )
            for _ in range(layers)
        )

    def maps(self) -> list[nn.Linear]:
        """All maps, in order of layer and type."""
        return [m for block in self.layers for m in block.values()]  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """Apply each map to its slice of x."""
        maps = self.maps()
        slices = x.split([m.in_features for m in maps], dim=1)
        return torch.cat([m(part) for m, part in zip(maps, slices, strict=True)], dim=1)


class PlantedTask:
    """Teacher and student with a known best allocation; offline, and seconds on a CPU.

    Attributes:
        choices: What is planted in each matrix, in matrix order.
        defaults: Environment options that suit the task; the caller's own options go before them.
    """

    name = "planted"
    head: Head = "none"
    num_labels = 0
    inputs = ("x",)
    metric = "improvement"

    def __init__(
        self,
        *,
        layers: int = 6,
        width: int = 32,
        types: tuple[str, ...] = ("query", "value", "up", "down"),
        plan: str | Mapping[str, tuple[int, str]] = "by_type_and_depth",
        ranks: tuple[int, ...] = (8,),
        reach: float = 1.0,
        noise: float = 0.05,
        rows: int = 1024,
        rank_cost: float = 0.0,
        max_rank: int = 8,
        seed: int = 0,
    ) -> None:
        """Plan a teacher.

        Args:
            layers: Blocks of the model.
            width: Base size of the matrices.
            types: Matrix types in each block, of `TYPE_SHAPES`.
            plan: One of `PLANS`, or ``{matrix name: (rank, location)}``; matrices that are not
                named get nothing.
            ranks: Planted ranks; a plan alternates between them.
            reach: How far the teacher is from the student, as a multiple of the mean singular value.
            noise: Standard deviation of the targets' noise, relative to the planted signal.
            rows: Training rows.
            rank_cost: Price λ on the trained fraction, see ``EnvConfig.rank_cost``.
            max_rank: Window that is kept free of planted directions, so that choices up to it stay
                separable; also the largest rank in `defaults`.
            seed: Seed of weights, teacher and data.

        Raises:
            LeLoRAError: A type or plan nobody knows, or ranks that do not fit.
        """
        for kind in types:
            if kind not in TYPE_SHAPES:
                raise UnknownNameError("matrix type", kind, TYPE_SHAPES)
        if isinstance(plan, str) and plan not in PLANS:
            raise UnknownNameError("plan", plan, PLANS)
        if 4 * max_rank > width:
            raise LeLoRAError(f"width must be at least 4·max_rank = {4 * max_rank} (got {width}); raise width.")
        if not ranks or max(ranks) > max_rank or min(ranks) < 1:
            raise LeLoRAError(f"ranks must lie in 1..max_rank={max_rank} (got {ranks})")
        self.layers, self.width, self.types, self.seed = layers, width, tuple(types), seed
        self.reach, self.noise, self.rows, self.max_rank = reach, noise, rows, max_rank
        self.names = [f"layers.{layer}.{kind}" for layer in range(layers) for kind in types]
        self.choices = self._plan(plan, tuple(ranks))
        rank_set = sorted({0, max_rank // 4, max_rank // 2, max_rank, *ranks} - {0}) if max_rank >= 4 else [max_rank]
        self.defaults: dict[str, Any] = {
            "target_modules": "all-linear",
            "rank_set": (0, *rank_set),
            "parametrisation": "unit",
            "learning_rate": 0.008,
            "batch_size": 64,
            "reward_size": 64,
            "horizon": 40,
            "warmup": 0.0,
            "max_grad_norm": None,
            "rank_cost": rank_cost,
        }
        self._teacher: list[Tensor] | None = None

    def _plan(self, plan: str | Mapping[str, tuple[int, str]], ranks: tuple[int, ...]) -> list[Choice]:
        if isinstance(plan, str):
            return [
                planted_choice(plan, layer, self.layers, kind, ranks)
                for layer in range(self.layers)
                for kind in range(len(self.types))
            ]
        for name in plan:
            if name not in self.names:
                raise UnknownNameError("matrix", name, self.names)
        return [Choice(*plan.get(name, (0, "primary"))) for name in self.names]

    def build_model(self) -> ParallelLinear:
        """The student: random singular vectors, singular values falling from 2 to 1/4."""
        with torch.random.fork_rng(devices=[]):  # nn.Linear draws first weights, which are replaced below
            model = ParallelLinear(self.layers, self.width, self.types)
        with torch.no_grad():
            for index, linear in enumerate(model.maps()):
                left, values, right, _ = self._factors(index, linear.out_features, linear.in_features)
                linear.weight.copy_(torch.from_numpy((left * values) @ right.T))
        return model

    def _factors(self, index: int, out: int, into: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Left (O, m), values (m,), right (I, m) and free left directions (O, ≥ m/4), float64."""
        rng = generator(self.seed, Purpose.MODEL, index)
        m = min(out, into)
        left = np.linalg.qr(rng.standard_normal((out, out)))[0]
        right = np.linalg.qr(rng.standard_normal((into, m)))[0]
        values = np.geomspace(2.0, 0.25, m)
        bank = sorted(
            {c for f in NAMED_LOCATIONS.values() for c in component_range(m, self.max_rank, f)}
        )
        free = np.delete(left, bank, axis=1)
        return left[:, :m], values, right, free

    def changes(self) -> list[np.ndarray]:
        """What the teacher adds to each matrix, (O, I) float64; zeros where nothing is planted."""
        scale = self.reach
        result = []
        for index, (name, choice) in enumerate(zip(self.names, self.choices, strict=True)):
            out, into = (x * self.width for x in TYPE_SHAPES[name.rpartition(".")[2]])
            _, values, right, free = self._factors(index, out, into)
            window = component_range(min(out, into), choice.rank, NAMED_LOCATIONS[choice.location])
            rng = generator(self.seed, Purpose.TASK, index)
            mix = np.linalg.qr(rng.standard_normal((free.shape[1], free.shape[1])))[0][:, : len(window)]
            result.append(scale * values.mean() * (free @ mix) @ right[:, list(window)].T)
        return result

    def splits(self, tokenizer: Any, *, reward_size: int, tune_size: int, seed: int) -> Splits:
        """Draw the rows of the four splits; `tokenizer` is not used. See `Task.splits`."""
        if self.rows < 1:
            raise DataError(f"rows must be at least 1 (got {self.rows})")
        model = self.build_model()
        changes = self.changes()
        signal = float(sum(np.square(c).sum() for c in changes)) or 1.0
        for linear, change in zip(model.maps(), changes, strict=True):
            linear.weight.data.add_(torch.from_numpy(change).to(linear.weight.dtype))
        sizes = {"train": self.rows, "reward": reward_size, "tune": tune_size, "eval": 512}
        parts: dict[str, Rows] = {}
        inputs = sum(m.in_features for m in model.maps())
        for place, (name, count) in enumerate(sizes.items()):
            rng = generator(self.seed, Purpose.DATA, seed, place)
            x = torch.from_numpy(rng.standard_normal((count, inputs))).float()
            with torch.no_grad():
                y = model(x)
            spread = self.noise * (signal / y.shape[1]) ** 0.5
            y = y + spread * torch.from_numpy(rng.standard_normal(tuple(y.shape))).float()
            parts[name] = {"x": x, "y": y, "signal": torch.full((count,), signal)}
        sources = {name: [f"{name}:{i}" for i in range(count)] for name, count in sizes.items()}
        return Splits(parts["train"], parts["reward"], parts["tune"], parts["eval"], sources=sources)

    def loss(self, logits: Tensor, batch: Rows) -> tuple[Tensor, Tensor]:
        """Squared error over the planted signal: 1 + noise² at the start, noise² at the optimum."""
        total = (logits.float() - batch["y"]).square().sum(1) / batch["signal"]
        return total, torch.ones_like(total)

    def predict(self, logits: Tensor, batch: Rows) -> Tensor:
        """The loss of each row, (N, 1)."""
        return self.loss(logits, batch)[0].unsqueeze(1)

    def score(self, predictions: np.ndarray, rows: Rows) -> dict[str, float]:
        """``improvement``: the share of the planted signal that has been learnt (1 = all of it)."""
        loss = float(predictions.mean())
        return {"improvement": 1.0 + self.noise**2 - loss, "loss": loss}

    def best_allocation(self) -> list[Choice]:
        """The best fixed allocation: exactly what is planted.

        Without a price on rank every choice that covers the planted components does as well; with
        one, this is the only best.
        """
        return list(self.choices)


