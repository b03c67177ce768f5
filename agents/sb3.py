"""Stable-Baselines3's PPO and A2C on LeLoRA environments, in two ways.

`make_sb3` gives SB3's own model, trained by its own ``learn``. `agents.sb3_agent.SB3Agent` runs the same algorithm
under this package's `Agent` protocol, with the same updates bit for bit, so that `agents.agent.run`,
its observers and the tables treat it like every other agent.

Import this module only where Stable-Baselines3 is wanted; importing it takes seconds.
Shapes: L lanes · M matrices.
"""

import logging
from typing import Any

import numpy as np
from gymnasium.vector import VectorEnv
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecMonitor

from agents.agent import AnyEnv, OnStep, Transition
from agents.sb3_vec_env import SB3VecEnv
from lelora_env.errors import UnknownNameError

logger = logging.getLogger(__name__)

ALGORITHMS: dict[str, type[OnPolicyAlgorithm]] = {"ppo": PPO, "a2c": A2C}
"""The SB3 algorithms that `make_sb3` and `SB3Agent` know, by name."""


def sb3_defaults(name: str, num_lanes: int) -> dict[str, Any]:
    """Settings in which we differ from SB3's defaults, for an algorithm on L lanes.

    γ = 0, because the reward of an allocation arrives in the same env step (as in the paper);
    the CPU, because the stock policy is small; for PPO, rollouts of about 128 transitions instead
    of 2,048, because an episode is one fine-tuning run of a few hundred env steps.

    Raises:
        UnknownNameError: No such algorithm.
    """
    if name not in ALGORITHMS:
        raise UnknownNameError("SB3 algorithm", name, ALGORITHMS)
    steps = 4 * max(1, 32 // num_lanes)
    rollout = {"n_steps": steps, "batch_size": steps * num_lanes // 4} if name == "ppo" else {}
    return {"gamma": 0.0, "device": "cpu", **rollout}


def make_sb3(name: str, env: AnyEnv, *, policy: Any = "MlpPolicy", seed: int | None = None,
             **options: Any) -> OnPolicyAlgorithm:
    """SB3's own model on the single environment, unmodified, or on the vector environment.

    As SB3 always does, this seeds the global random generators when `seed` is given.

    Args:
        name: ``"ppo"`` or ``"a2c"``.
        env: A single environment, or a vector environment with same-step autoreset.
        policy: A policy class or name of SB3.
        seed: SB3's seed.
        **options: Arguments of the SB3 class, over `sb3_defaults`.

    Raises:
        UnknownNameError: No such algorithm.
        LeLoRAError: A vector environment with another autoreset mode.
    """
    adapted: Any = VecMonitor(SB3VecEnv(env)) if isinstance(env, VectorEnv) else env
    settings = {**sb3_defaults(name, getattr(adapted, "num_envs", 1)), **options}
    warn_if_flat(policy)
    return ALGORITHMS[name](policy, adapted, seed=seed, **settings)


class StepCallback(BaseCallback):
    """Calls our observers from SB3's own ``learn``: ``model.learn(n, callback=StepCallback(on_step))``."""

    def __init__(self, on_step: OnStep) -> None:
        """Call `on_step` after every env step; SB3's training scalars come with the first one after a training."""
        super().__init__()
        self._observer = on_step
        self._scalars: dict[str, float] = {}

    def _on_rollout_start(self) -> None:
        self._scalars = training_scalars(self.model)

    def _on_step(self) -> bool:
        infos, done = self.locals["infos"], np.asarray(self.locals["dones"])
        cut = np.array([bool(info.get("TimeLimit.truncated", False)) for info in infos])
        after = np.array(self.locals["new_obs"])
        for lane in np.flatnonzero(done):
            after[lane] = infos[lane]["terminal_observation"]
        names = sorted(set.intersection(*[set(info) for info in infos]) - {"terminal_observation"})
        transition = Transition(np.asarray(self.model._last_obs), self.locals["actions"],
                                self.locals["rewards"].astype(np.float64), done & ~cut, cut,
                                {name: np.asarray([info[name] for info in infos]) for name in names}, after)
        self._observer(transition, self._scalars, self.n_calls)
        self._scalars = {}
        return True


def warn_if_flat(policy: Any) -> None:
    """Say in the log why SB3's stock policy is not the one to use."""
    if policy == "MlpPolicy":
        logger.warning("SB3's MlpPolicy reads all matrices as one flat vector: one reward has to teach 2 x M heads "
                       "that share nothing. Where features change it learns next to nothing (24 matrices, 16,000 "
                       "samples: 0.35, chance 0.29, one network for every matrix 0.83); where they do not, it learns "
                       "one choice by heart for each matrix, which no other model can use")


def training_scalars(model: Any) -> dict[str, float]:
    """The finite ``train/...`` scalars of a model's last training."""
    values = model.logger.name_to_value
    return {name: float(value) for name, value in values.items() if name.startswith("train/") and np.isfinite(value)}
