"""A stationary contextual bandit with the shapes of LeLoRA-v0, on which agents can be tested in seconds.

Every matrix has one best rank and one best location, which its features give away. The reward is
the share of all 2M choices that are right, whatever has happened before. Shapes: L lanes · M matrices.
"""

from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from lelora_env.allocation import build_choice_table
from lelora_env.config import AdapterConfig
from lelora_env.matrices import MATRIX_TYPES, MatrixInfo

Array = npt.NDArray[Any]
SPECTRUM = 4
SIDE, SMALL_SIDE = 32, 6  # inputs of a matrix; a small one has too few for rank 8


def toy_matrices(count: int, small: int) -> list[MatrixInfo]:
    """Two to a layer, query and key in turn, 32 x 32; the first `small` of them 32 x 6."""
    sides = [SMALL_SIDE if i < small else SIDE for i in range(count)]
    return [MatrixInfo(f"layers.{i // 2}.{MATRIX_TYPES[i % 2]}", i // 2, MATRIX_TYPES[i % 2], SIDE, side, False, False)
            for i, side in enumerate(sides)]


class ToyVectorEnv(VectorEnv[Array, Array, Array]):
    """L lanes; lane i ends its episodes after ``horizons[i]`` env steps."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - as Gymnasium declares it

    def __init__(self, num_envs: int = 1, *, num_matrices: int = 6, horizons: int | list[int] = 8,
                 autoreset_mode: AutoresetMode = AutoresetMode.NEXT_STEP, truncates: bool = False,
                 small_matrices: int = 0, problem: int = 0) -> None:
        self.num_envs, self.num_matrices, self.truncates = num_envs, num_matrices, truncates
        self.metadata = {**self.metadata, "autoreset_mode": autoreset_mode}
        self.autoreset_mode = autoreset_mode
        self.adapter_config = AdapterConfig()
        self.matrices = toy_matrices(num_matrices, small_matrices)
        self.table = build_choice_table([m.in_features for m in self.matrices], self.adapter_config)
        self.feature_names = ("layer", "type", "norm", *(f"sv_{i}" for i in range(SPECTRUM)), "progress")
        self.horizons = np.broadcast_to(np.asarray(horizons), (num_envs,))
        self.horizon = int(self.horizons[0])
        rng = np.random.default_rng(problem)
        self.best = np.stack([rng.integers(4, size=num_matrices), rng.integers(3, size=num_matrices)], axis=1)  # (M, 2)
        self.features = rng.normal(size=(num_matrices, 1 + SPECTRUM)).astype(np.float32)
        self.small_matrices = small_matrices
        low = np.full((num_matrices, len(self.feature_names)), -10, dtype=np.float32)
        high = -low
        low[:, [0, 1, -1]], high[:, 0], high[:, 1], high[:, -1] = 0, (num_matrices - 1) // 2, 1, 1
        self.single_observation_space = spaces.Box(low, high, dtype=np.float32)
        self.single_action_space = spaces.MultiDiscrete([4, 3] * num_matrices)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.steps = np.zeros(num_envs, dtype=np.int64)
        self.episode = np.full(num_envs, -1, dtype=np.int64)
        self.ended = np.zeros(num_envs, dtype=bool)

    def action_masks(self) -> Array:
        masks = np.ones((self.num_envs, self.num_matrices, 7), dtype=bool)
        masks[:, :self.small_matrices, 3] = False
        return masks.reshape(self.num_envs, -1)

    def best_action(self) -> Array:
        return self.best.reshape(-1)

    def reset(self, *, seed: int | list[int | None] | None = None,
              options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool))
        if seed is not None:
            self.episode[:] = -1
        self._restart(mask)
        return self._observe(), {"start": self.episode.copy(), "_start": mask.copy()}

    def _restart(self, mask: Array) -> None:
        self.steps[mask], self.ended[mask] = 0, False
        self.episode[mask] += 1

    def _observe(self) -> Array:
        index = np.arange(self.num_matrices)
        own = np.concatenate([np.stack([index // 2, index % 2], axis=1), self.features], axis=1)  # (M, 2 + 1 + S)
        observation = np.broadcast_to(own, (self.num_envs, *own.shape)).copy()
        observation[..., -1] += 0.01 * self.episode[:, None]  # so that episodes can be told apart
        progress = np.broadcast_to((self.steps / self.horizons)[:, None, None], (*observation.shape[:2], 1))
        return np.concatenate([observation, progress], axis=-1).astype(np.float32)

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        assert actions.shape == (self.num_envs, 2 * self.num_matrices), actions.shape
        assert actions.dtype == np.int64, actions.dtype
        resetting = self.ended.copy()
        assert not (resetting.any() and self.autoreset_mode == AutoresetMode.DISABLED), "a finished lane was stepped"
        right = (actions.reshape(self.num_envs, -1, 2) == self.best).mean(axis=(1, 2))
        self._restart(resetting)
        self.steps[~resetting] += 1
        ended = ~resetting & (self.steps >= self.horizons)
        reward = np.where(resetting, 0.0, right)
        info = {"L1": 1 - right, "_L1": ~resetting, "env_step": self.steps.copy(), "_env_step": ~resetting}
        observation = self._observe()
        if self.autoreset_mode == AutoresetMode.SAME_STEP and ended.any():
            observation, info = self._same_step_reset(observation, info, ended)
        else:
            self.ended = ended.copy()
        none = np.zeros(self.num_envs, dtype=bool)
        flags = (none, ended) if self.truncates else (ended, none)
        return observation, reward, *flags, info

    def _same_step_reset(self, last: Array, info: dict[str, Any], ended: Array) -> tuple[Array, dict[str, Any]]:
        final_obs = np.full(self.num_envs, None, dtype=object)
        for lane in np.flatnonzero(ended):
            final_obs[lane] = last[lane]
        final = {name: np.where(ended, values, 0) for name, values in info.items() if not name.startswith("_")}
        masks = {f"_{name}": ended.copy() for name in final}
        now = {name: np.where(ended, 0, values) for name, values in info.items() if not name.startswith("_")}
        now_masks = {f"_{name}": ~ended for name in now}
        self._restart(ended)
        return self._observe(), {**now, **now_masks, "final_obs": final_obs, "_final_obs": ended.copy(),
                                 "final_info": {**final, **masks}, "_final_info": ended.copy(),
                                 "start": self.episode.copy(), "_start": ended.copy()}


class ToyEnv(gym.Env[Array, Array]):
    """The one-lane view of `ToyVectorEnv`."""

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - as Gymnasium declares it

    def __init__(self, **options: Any) -> None:
        self.lane = ToyVectorEnv(1, autoreset_mode=AutoresetMode.DISABLED, **options)
        self.observation_space, self.action_space = self.lane.single_observation_space, self.lane.single_action_space
        self.adapter_config, self.feature_names = self.lane.adapter_config, self.lane.feature_names
        self.num_matrices, self.best = self.lane.num_matrices, self.lane.best
        self.table, self.matrices = self.lane.table, self.lane.matrices

    def action_masks(self) -> Array:
        masks: Array = self.lane.action_masks()[0]
        return masks

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        observation, info = self.lane.reset(seed=seed)
        return observation[0], {"start": int(info["start"][0])}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.lane.step(np.asarray(action, dtype=np.int64)[None])
        plain = {name: values[0].item() for name, values in info.items() if not name.startswith("_")}
        return observation[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), plain
