"""Controls: agents that do not learn, and that every table needs beside those that do.

Shapes: L lanes · M matrices.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.agent import Array, Transition
from agents.files import load_allocation
from agents.policy import ActionDistribution
from agents.spec import AgentSpec, one_hot
from lelora_env.errors import LeLoRAError


class RandomAllocation:
    """Draws every rank and every location anew at every env step, uniformly over the legal ones.

    The mandatory control: per-step re-drawing alone moves a run's score, without any learning. `frozen` draws once
    and keeps to it: the control for what re-drawing itself does.
    """

    def __init__(self, spec: AgentSpec, *, frozen: bool = False, seed: int = 0) -> None:
        """Only a generator is kept, and the draw where it is `frozen`; it neither reads nor moves the global one."""
        self.spec, self.frozen = spec, frozen
        self.generator = torch.Generator().manual_seed(seed)
        self._kept: Array | None = None

    def act(self, observation: Array) -> Array:
        """Draw (L, 2M) int64 choices; the observation gives only the number of lanes."""
        if self.frozen and self._kept is not None and len(self._kept) == len(observation):
            return self._kept.copy()
        self._kept = self._draw(len(observation))
        return self._kept.copy()

    def _draw(self, lanes: int) -> Array:
        action: Array = self._uniform(lanes).sample(self.generator).flatten(1).numpy()
        return action

    def _uniform(self, lanes: int) -> ActionDistribution:
        masks = torch.as_tensor(self.spec.rank_mask), torch.as_tensor(self.spec.location_mask)
        flat = [torch.zeros(lanes, *mask.shape) for mask in masks]
        return ActionDistribution.from_logits(*flat, rank_mask=masks[0], location_mask=masks[1])

    def probabilities(self, observation: Array) -> Array:
        """The probability of every choice: (L, M, F) -> (L, M, R, S) float32."""
        if self.frozen and self._kept is not None and len(self._kept) == len(observation):
            return one_hot(self._kept, self.spec)
        found: Array = self._uniform(len(observation)).joint().numpy()
        return found

    def update(self, transition: Transition) -> dict[str, float]:
        """Learns nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The generator's state, and the draw that is kept."""
        kept = self._kept.tolist() if self.frozen and self._kept is not None else None
        return {"agent": "random", "spec": self.spec.fingerprint(), "generator": self.generator.get_state(),
                "kept": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the same draws.

        Raises:
            LeLoRAError: The state is of another agent, or keeps a draw for other matrices.
        """
        _check_kind(state, "random")
        self.spec.check_fingerprint(state["spec"])
        if state.get("kept") and len(state["kept"][0]) != 2 * self.spec.num_matrices:
            raise LeLoRAError(f"the saved draw is for {len(state['kept'][0]) // 2} matrices, the environment has "
                              f"{self.spec.num_matrices}")
        self.generator.set_state(state["generator"])
        self._kept = None if state.get("kept") is None else np.array(state["kept"], dtype=np.int64)


class FixedAllocation:
    """The same allocation at every env step: plain low-rank training, as a control.

    Rank r at ``primary`` trains the components that PiSSA trains, at ``minor`` those of MiLoRA.
    """

    def __init__(self, spec: AgentSpec, *, rank: int | None = None, location: str | float | None = None,
                 allocation: Sequence[tuple[int, str | float]] | str | Path | None = None) -> None:
        """Fix the allocation.

        Args:
            spec: What can be chosen.
            rank: Rank of every matrix, from the environment's rank set; ``None`` = its largest.
                Matrices too small for it get their largest legal rank.
            location: Location of every matrix, by name or fraction; ``None`` = the first one.
            allocation: Instead of both: one (rank, location) per matrix, in the matrices' order; or the name of
                a file that `lelora search` wrote.

        Raises:
            LeLoRAError: Both forms given, a rank or location that cannot be chosen, or an
                allocation of the wrong length.
        """
        if allocation is not None and not (rank is None and location is None):
            raise LeLoRAError("give either allocation, or rank and location for all matrices, not both")
        self.spec = spec
        if isinstance(allocation, str | Path):
            allocation = load_allocation(allocation, spec)
        if allocation is None:
            allocation = _uniform(spec, rank, spec.locations[0] if location is None else location)
        if len(allocation) != spec.num_matrices:
            raise LeLoRAError(f"allocation must have one (rank, location) for each of the {spec.num_matrices} matrices "
                              f"(got {len(allocation)})")
        if any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in allocation):
            raise LeLoRAError(f"allocation must hold one (rank, location) pair a matrix (got {list(allocation)!r})")
        pairs = [spec.choice(m, r, s) for m, (r, s) in enumerate(allocation)]
        self.action: Array = np.array(pairs, dtype=np.int64).reshape(-1)  # (2M,)

    def act(self, observation: Array) -> Array:
        """The allocation once for every lane, (L, 2M) int64."""
        return np.tile(self.action, (len(observation), 1))

    def probabilities(self, observation: Array) -> Array:
        """1 for the allocation's choices: (L, M, F) -> (L, M, R, S) float32."""
        return one_hot(self.act(observation), self.spec)

    def update(self, transition: Transition) -> dict[str, float]:
        """Learns nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The allocation, as indices."""
        return {"agent": "fixed", "spec": self.spec.fingerprint(), "action": self.action.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved allocation.

        Raises:
            LeLoRAError: The state is of another agent, or was saved for other actions.
        """
        _check_kind(state, "fixed")
        self.spec.check_fingerprint(state["spec"])
        if len(state["action"]) != len(self.action):
            raise LeLoRAError(f"the saved allocation is for {len(state['action']) // 2} matrices, the environment has "
                              f"{self.spec.num_matrices}")
        self.action = np.array(state["action"], dtype=np.int64)


def _uniform(spec: AgentSpec, rank: int | None, location: str | float) -> list[tuple[int, str | float]]:
    """`rank` for every matrix, or its largest legal rank below."""
    wanted = spec.rank_set[-1] if rank is None else rank
    if wanted not in spec.rank_set:
        raise LeLoRAError(f"rank must be one of the environment's rank set {spec.rank_set} (got {wanted})")
    legal = [[r for r, ok in zip(spec.rank_set, mask, strict=True) if ok and r <= wanted] for mask in spec.rank_mask]
    return [(max(ranks, default=wanted), location) for ranks in legal]


def _check_kind(state: dict[str, Any], kind: str) -> None:
    if state.get("agent") != kind:
        raise LeLoRAError(f"expected the state of a {kind} agent (got one of {state.get('agent')!r})")
