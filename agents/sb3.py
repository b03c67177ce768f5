"""Stable-Baselines3's PPO and A2C on LeLoRA environments, in two ways.

`make_sb3` gives SB3's own model, trained by its own ``learn``. `agents.sb3_agent.SB3Agent` runs the same algorithm
under this package's `Agent` protocol, with the same updates bit for bit, so that `agents.agent.run`,
its observers and the tables treat it like every other agent.

Import this module only where Stable-Baselines3 is wanted; importing it takes seconds.
Shapes: L lanes · M matrices.
"""

import logging
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.vec_env import VecEnvWrapper, VecMonitor
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from agents.agent import AnyEnv, OnStep, Transition
from agents.baseline import loss_before
from agents.sb3_policy import PerMatrix, PerMatrixActorCriticPolicy
from agents.sb3_vec_env import SB3VecEnv
from agents.spec import AgentSpec
from lelora_env.errors import UnknownNameError

logger = logging.getLogger(__name__)

ALGORITHMS: dict[str, type[OnPolicyAlgorithm]] = {"ppo": PPO, "a2c": A2C}
"""The SB3 algorithms that `make_sb3` and `SB3Agent` know, by name."""

PER_MATRIX = "per_matrix"
"""Name of the policy `agents.sb3_policy.PerMatrixActorCriticPolicy`, the default."""


def sb3_defaults(name: str, num_lanes: int, horizon: int | None = None) -> dict[str, Any]:
    """Settings in which we differ from SB3's defaults, for an algorithm on L lanes of episodes of a horizon.

    γ = 0, because the reward of an allocation arrives in the same env step (as in the paper);
    the CPU, because the policy is small. PPO: learning rate 1e-3 instead of 3e-4, and rollouts of
    about 128 transitions in four minibatches instead of 2,048, because an episode is one
    fine-tuning run of a few hundred env steps (and an eighth of an episode where two such rollouts
    would not fit into it: within one run it has to learn several times). A2C: as long rollouts (SB3:
    5 env steps), advantages normalised, because the reward's scale is the task's, and learning rate
    3e-3 instead of 7e-4.
    Both: ``ent_coef`` 0.05, as our REINFORCE; without it a price on rank drives every rank to 0
    before a location is found.

    SB3's ``clip_range`` of 0.2 is kept: the per-matrix policy gives ratio and entropy as means over
    matrices, so what is set here suits any number of them. A stock policy gives sums: divide
    ``ent_coef`` by M there, and raise ``clip_range`` to about 0.5.

    Raises:
        UnknownNameError: No such algorithm.
    """
    if name not in ALGORITHMS:
        raise UnknownNameError("SB3 algorithm", name, ALGORITHMS)
    steps = 4 * max(1, 32 // num_lanes)
    if horizon is not None and 8 <= horizon < 2 * steps:
        steps = max(4, horizon // 8)
    own = {"ppo": {"learning_rate": 1e-3, "n_steps": steps, "batch_size": max(2, steps * num_lanes // 4)},
           "a2c": {"learning_rate": 3e-3, "n_steps": steps, "normalize_advantage": True}}
    return {"gamma": 0.0, "ent_coef": 0.05, "device": "cpu", **own[name]}


def make_sb3(name: str, env: AnyEnv, *, policy: Any = PER_MATRIX, known_baseline: bool = True,
             seed: int | None = None, **options: Any) -> OnPolicyAlgorithm:
    """SB3's own model on the single environment, unmodified, or on the vector environment.

    As SB3 always does, this seeds the global random generators when `seed` is given.

    Args:
        name: ``"ppo"`` or ``"a2c"``.
        env: A single environment, or a vector environment with same-step autoreset.
        policy: ``"per_matrix"``, or a policy class or name of SB3.
        known_baseline: With γ = 0, take off the reward what was known before the action
            (`beyond_known`); the model's episode returns stay those of the environment.
        seed: SB3's seed.
        **options: Arguments of the SB3 class, over `sb3_defaults`.

    Raises:
        UnknownNameError: No such algorithm.
        LeLoRAError: A vector environment with another autoreset mode.
    """
    spec = AgentSpec.from_env(env)
    settings = {**sb3_defaults(name, spec.num_lanes, spec.horizon), **options}
    policy, settings = with_policy(policy, spec, settings)
    adapted: Any = VecMonitor(SB3VecEnv(env)) if isinstance(env, VectorEnv) else Monitor(env)
    if known_baseline and settings["gamma"] == 0:
        adapted = VecKnownBaseline(adapted) if isinstance(env, VectorEnv) else KnownBaseline(adapted)
    return ALGORITHMS[name](policy, adapted, seed=seed, **settings)


def with_policy(policy: Any, spec: AgentSpec, settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """SB3's policy argument for one of ours, and the settings with what that policy needs to know.

    Args:
        policy: As in `make_sb3`.
        spec: What is observed and chosen.
        settings: Arguments of the SB3 class.
    """
    warn_if_flat(policy)
    chosen = PerMatrixActorCriticPolicy if policy == PER_MATRIX else policy
    if not (isinstance(chosen, type) and issubclass(chosen, PerMatrix)):
        return chosen, settings
    return chosen, {**settings, "policy_kwargs": {"spec": spec, **(settings.get("policy_kwargs") or {})}}


TRUE_REWARD = "true_reward"
"""Entry of the info that holds what the environment gave, where `KnownBaseline` or `VecKnownBaseline` changed it."""


def beyond_known(reward: Any, info: Mapping[str, Any]) -> Any:
    """The part of the reward that the action decided: reward + L1 before the env step.

    R = -(L1 + α·L2) and L1 = L1_before + L2, so R = -L1_before - (1 + α)·L2. The first term was
    known before the action: with γ = 0, taking it off leaves the policy gradient as it is in
    expectation and takes the drift of the run out of it. With γ > 0 it would change what is best.

    Args:
        reward: One reward or (L,) of them. They are taken in float32, the type of SB3's rewards,
            so that the result is the same wherever in a chain of wrappers it is worked out.
        info: The step's info with ``L1`` and ``L2``, as `reward` one or (L,); without them the
            reward is left as it is.

    Returns:
        As `reward`, float32.
    """
    plain = np.asarray(reward, dtype=np.float32)
    before = loss_before(info)
    return plain if before is None else np.asarray(plain + before, dtype=np.float32)


class KnownBaseline(gym.Wrapper[Any, Any, Any, Any]):
    """Rewards of the single environment without what was known beforehand, see `beyond_known`.

    The environment's own reward is ``info["true_reward"]``. Put SB3's ``Monitor`` inside it, and
    the episode returns are those of the environment.
    """

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """One env step."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        info = {**info, TRUE_REWARD: float(reward)}
        return observation, float(beyond_known(reward, info)), terminated, truncated, info


class VecKnownBaseline(VecEnvWrapper):
    """`KnownBaseline` for SB3's vector environments; put ``VecMonitor`` inside it."""

    def reset(self) -> Any:
        """Start every lane anew."""
        return self.venv.reset()

    def step_wait(self) -> VecEnvStepReturn:
        """One env step of every lane."""
        observation, reward, done, infos = self.venv.step_wait()
        for info, given in zip(infos, reward, strict=True):
            info[TRUE_REWARD] = float(given)
        if all("L1" in info and "L2" in info for info in infos):
            losses = {name: np.array([info[name] for info in infos]) for name in ("L1", "L2")}
            reward = beyond_known(reward, losses)
        return observation, reward, done, infos


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
        names = sorted(set.intersection(*[set(info) for info in infos]) - {"terminal_observation", TRUE_REWARD})
        rewards = [info.get(TRUE_REWARD, given) for info, given in zip(infos, self.locals["rewards"], strict=True)]
        transition = Transition(np.asarray(self.model._last_obs), self.locals["actions"],
                                np.array(rewards, dtype=np.float64), done & ~cut, cut,
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
