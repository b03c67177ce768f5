"""The native vector environment as a Stable-Baselines3 ``VecEnv``: the one adapter that is needed.

Import this module only where Stable-Baselines3 is wanted; importing it takes seconds.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from agents.agent import Array, LaneEnv
from lelora_env.errors import LeLoRAError


class SB3VecEnv(VecEnv):
    """Lanes of a Gymnasium vector environment, in the form that Stable-Baselines3 trains on.

    - needs ``autoreset_mode=AutoresetMode.SAME_STEP``, which is how SB3 resets;
    - ``infos[i]["terminal_observation"]`` is the last observation of a lane that ended,
      ``infos[i]["TimeLimit.truncated"]`` says whether it was stopped from outside (only then does
      SB3 bootstrap), and `reset_infos` holds the info of the reset that followed;
    - ``env_method("action_masks")`` gives one flat mask a lane, as MaskablePPO wants it.

    Wrap it in SB3's ``VecMonitor`` for episode returns (`agents.sb3.make_sb3` does).
    """

    def __init__(self, env: LaneEnv) -> None:
        """Adapt `env`, which stays owned by the caller until `close`.

        Raises:
            LeLoRAError: The environment does not reset in the same step.
        """
        mode = (env.metadata or {}).get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise LeLoRAError("Stable-Baselines3 needs a vector environment that resets in the same step: pass "
                              f"autoreset_mode=AutoresetMode.SAME_STEP to gym.make_vec (this one has {mode})")
        self.env = env
        self._actions: Array = np.empty(0, dtype=np.int64)
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> Array:
        """Start every lane anew, with the seed and the options set before; (L, M, F)."""
        options = self._options[0]
        if any(other != options for other in self._options):
            raise LeLoRAError("the lanes share their reset options: call set_options with one dict for all of them")
        observation, info = self.env.reset(seed=self._seeds[0], options=dict(options) or None)
        self.reset_infos = [lane_info(info, lane) for lane in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return np.asarray(observation)

    def step_async(self, actions: Array) -> None:
        """Keep the (L, 2M) actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """One env step of every lane: observations, rewards, dones, and one info dict a lane."""
        observation, reward, terminated, truncated, info = self.env.step(self._actions)
        done = np.asarray(terminated | truncated)
        infos = [self._lane_step_info(info, lane, bool(done[lane])) for lane in range(self.num_envs)]
        for lane, entry in enumerate(infos):
            entry["TimeLimit.truncated"] = bool(truncated[lane] and not terminated[lane])
        return np.asarray(observation), np.asarray(reward).astype(np.float32), done, infos

    def _lane_step_info(self, info: Mapping[str, Any], lane: int, done: bool) -> dict[str, Any]:
        """Step info of one lane; of a lane that ended, keeps the reset's info in `reset_infos`."""
        now = lane_info(info, lane)
        if not done:
            return now
        self.reset_infos[lane] = now
        entry = lane_info(info.get("final_info", {}), lane)
        entry["terminal_observation"] = np.array(info["final_obs"][lane])
        return entry

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def get_images(self) -> Sequence[Array | None]:
        """One frame a lane."""
        frames: Any = self.env.render()
        return [None] * self.num_envs if frames is None else list(frames)

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of the vector environment, which all lanes share, once per index."""
        target = self.env if hasattr(self.env, attr_name) else self.env.unwrapped
        return [getattr(target, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Set an attribute of the vector environment; for all lanes only."""
        if len(set(self._get_indices(indices))) != self.num_envs:
            raise LeLoRAError(f"the lanes share {attr_name!r}: it can only be set for all of them (indices=None)")
        setattr(self.env.unwrapped, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: VecEnvIndices = None,
                   **method_kwargs: Any) -> list[Any]:
        """Call a method of the vector environment once; a result with L entries is dealt out to its lanes."""
        target = self.env if hasattr(self.env, method_name) else self.env.unwrapped
        result = getattr(target, method_name)(*method_args, **method_kwargs)
        per_lane = isinstance(result, list | tuple | np.ndarray) and len(result) == self.num_envs
        return [result[lane] if per_lane else result for lane in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]],
                       indices: VecEnvIndices = None) -> list[bool]:
        """Never: wrappers of single environments cannot be around a vector environment."""
        return [False for _ in self._get_indices(indices)]


def lane_info(info: Mapping[str, Any], lane: int) -> dict[str, Any]:
    """One lane's entries of a vector environment's info, as plain values where they are scalars."""
    result = {}
    for name, values in info.items():
        if name.startswith("_") or name in ("final_info", "final_obs") or not _has(info, name, lane):
            continue
        value = lane_info(values, lane) if isinstance(values, Mapping) else values[lane]
        result[name] = value.item() if isinstance(value, np.generic) else value
    return result


def _has(info: Mapping[str, Any], name: str, lane: int) -> bool:
    mask = info.get(f"_{name}")
    return mask is None or bool(mask[lane])
