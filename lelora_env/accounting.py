"""What an env step is worth and what is said about it: rewards, divergence, info values.

Shapes: L lanes · M matrices · K bank slots a matrix.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lelora_env.allocation import Allocation, ChoiceTable, allocated_ranks
from lelora_env.budget import component_sizes
from lelora_env.config import AdapterConfig, EnvConfig
from lelora_env.matrices import MatrixInfo
from lelora_env.outcome import Outcome
from lelora_env.reward import divergence_penalty, reward_parts


class LaneClocks:
    """Where every lane stands in its episode. All arrays are (L,).

    Attributes:
        seeds: Seed of each lane, -1 before its first.
        episodes: Episodes since that seed was given.
        env_steps: Env steps in the episode.
        losses: L1 after the last env step (or at the start).
        worst: Worst finite reward of the episode.
        finished: Lanes whose episode is over.
    """

    def __init__(self, lanes: int) -> None:
        """All lanes unseeded and finished."""
        self.seeds = np.full(lanes, -1, dtype=np.int64)
        self.episodes = np.zeros(lanes, dtype=np.int64)
        self.env_steps = np.zeros(lanes, dtype=np.int64)
        self.losses = np.zeros(lanes)
        self.worst = np.zeros(lanes)
        self.finished = np.ones(lanes, dtype=bool)

    def get(self, lane: int) -> dict[str, Tensor]:
        """One lane's clock as tensors by name."""
        whole = [self.seeds[lane], self.episodes[lane], self.env_steps[lane], self.finished[lane]]
        return {
            "env.clock": torch.tensor([int(x) for x in whole]),
            "env.losses": torch.tensor([self.losses[lane], self.worst[lane]], dtype=torch.float64),
        }

    def set(self, lane: int, state: dict[str, Tensor]) -> None:
        """Set one lane's clock from `get`."""
        seed, episode, env_step, finished = (int(x) for x in state["env.clock"])
        self.seeds[lane], self.episodes[lane], self.env_steps[lane] = seed, episode, env_step
        self.finished[lane] = bool(finished)
        self.losses[lane], self.worst[lane] = (float(x) for x in state["env.losses"])


@dataclass(frozen=True)
class Account:
    """What an env step is worth.

    Attributes:
        rewards: (L,) rewards; 0 for lanes that did not run.
        diverged: (L,) bool: lanes whose loss or weights are no longer finite.
        values: Info values by name, each (L,), and (L, M, K) what ``component_info`` asks for.
    """

    rewards: np.ndarray
    diverged: np.ndarray
    values: dict[str, np.ndarray]


class Accountant:
    """Draws up the account of every env step."""

    def __init__(
        self, matrices: list[MatrixInfo], table: ChoiceTable, adapter: AdapterConfig, config: EnvConfig
    ) -> None:
        """Remember what does not change."""
        self.table, self.adapter, self.config = table, adapter, config
        self.sizes = component_sizes(matrices, adapter)
        self.adaptable = float(sum(m.out_features * m.in_features for m in matrices))

    def account(self, allocation: Allocation, outcome: Outcome, clocks: LaneClocks, running: np.ndarray) -> Account:
        """Reward a step and describe it; updates ``clocks.worst`` of the lanes that ran.

        Args:
            allocation: What was chosen.
            outcome: What came of it.
            clocks: Where the lanes stood before the step.
            running: (L,) bool: lanes that took the step.
        """
        diverged = running & ~outcome.finite
        losses = np.where(diverged, clocks.losses, outcome.losses)
        ranks = allocated_ranks(allocation, self.table)
        trained = (ranks * self.sizes).sum(1).double().numpy()
        config = self.config
        parts = reward_parts(losses, clocks.losses, trained / self.adaptable, config.alpha, config.rank_cost)
        rewards = sum(parts.values(), np.zeros(len(losses)))
        clocks.worst = np.where(running & ~diverged, np.minimum(clocks.worst, rewards), clocks.worst)
        penalty = divergence_penalty(clocks.worst, config.horizon - clocks.env_steps)
        for name in parts:
            parts[name] = np.where(diverged, penalty if name == "reward_divergence" else 0.0, parts[name])
        values = {
            "L2": losses - clocks.losses,
            "train_loss": outcome.train_loss,
            "trained_parameters": trained,
            "trained_fraction": trained / self.adaptable,
            "mean_rank": ranks.double().mean(1).numpy(),
            **self._norms(allocation, outcome),
            "learning_rate": outcome.learning_rate,
            "diverged": diverged,
            **parts,
        }
        rewards = np.where(running, np.where(diverged, penalty, rewards), 0.0)
        table = np.stack([np.asarray(value, dtype=np.float64) for value in values.values()])
        values = dict(zip(values, np.where(np.isnan(table), np.inf, table), strict=True))
        components = self._components(outcome, running & ~diverged)
        return Account(rewards, diverged, {**values, "diverged": diverged, **components})

    @staticmethod
    def _components(outcome: Outcome, kept: np.ndarray) -> dict[str, np.ndarray]:
        """What is said about every component; 0 for lanes that did not run or diverged."""
        here = kept[:, None, None]
        return {f"component_{name}": np.where(here, value, np.float32(0)) for name, value in outcome.components.items()}

    def _norms(self, allocation: Allocation, outcome: Outcome) -> dict[str, np.ndarray]:
        """‖ΔW‖ of this step by chosen location, of the run so far, and the gradient's norm."""
        square = outcome.update_norms.astype(np.float64) ** 2
        chosen = allocation.location_index.numpy()
        norms = {
            f"update_norm_{name}": np.sqrt(np.where(chosen == index, square, 0.0).sum(1))
            for index, name in enumerate(self.adapter.location_names)
        }
        norms["delta_norm"] = np.sqrt((outcome.delta_norms.astype(np.float64) ** 2).sum(1))
        norms["grad_norm"] = outcome.grad_norm
        return norms
