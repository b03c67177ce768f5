"""The agent protocol, and the one loop that runs any agent on any environment.

Shapes: L lanes · M matrices · F features.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv

from lelora_env.errors import LeLoRAError

Array = npt.NDArray[Any]
SingleEnv = gym.Env[Any, Any]
LaneEnv = VectorEnv[Any, Any, Any]
AnyEnv = SingleEnv | LaneEnv


@dataclass(frozen=True)
class Transition:
    """One env step of every lane.

    Attributes:
        observation: What the agent saw, (L, M, F) float32.
        action: What it chose, (L, 2M) int64: (rank index, location index) of each matrix in turn.
        reward: (L,) float64.
        terminated: (L,) bool; the run's budget is spent, or the lane diverged.
        truncated: (L,) bool; the run was stopped from outside.
        info: The step's info by name, one entry a lane.
        next_observation: What the action led to, (L, M, F); the *last* observation of the episode
            where one ended, never the first of the next.
    """

    observation: Array
    action: Array
    reward: Array
    terminated: Array
    truncated: Array
    info: Mapping[str, Any]
    next_observation: Array

    @property
    def done(self) -> Array:
        """Lanes whose episode ended with this step, (L,) bool."""
        ended: Array = self.terminated | self.truncated
        return ended


@runtime_checkable
class Agent(Protocol):
    """A policy and its update rule. Always batched over lanes; a single environment is one lane."""

    def act(self, observation: Array) -> Array:
        """Choose an allocation for every lane: (L, M, F) float32 -> (L, 2M) int64."""
        ...

    def update(self, transition: Transition) -> dict[str, float]:
        """Learn from one env step of all lanes; returns finite scalars to log (may be empty)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that the agent's future depends on: tensors, numbers, strings, lists, dicts."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue bit for bit from where `state_dict` was called."""
        ...


OnStep = Callable[[Transition, dict[str, float], int], None]
"""An observer: called with (transition, the agent's scalars, env steps so far) after every env step."""


class Episode(NamedTuple):
    """One finished fine-tuning run."""

    lane: int
    total_reward: float
    length: int
    terminated: bool


@dataclass
class History:
    """What happened during `run`.

    Attributes:
        num_lanes: L.
        rewards: One (L,) array per env step.
        episodes: Finished episodes, in the order in which they ended.
    """

    num_lanes: int
    rewards: list[Array] = field(default_factory=list)
    episodes: list[Episode] = field(default_factory=list)
    _started: list[int] = field(init=False, repr=False)
    _ended: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._started = [0] * self.num_lanes
        self._ended = [sum(episode.lane == lane for episode in self.episodes) for lane in range(self.num_lanes)]

    @property
    def env_steps(self) -> int:
        """Env steps of each lane so far."""
        return len(self.rewards)

    def add(self, transition: Transition) -> None:
        """Record one env step."""
        self.rewards.append(transition.reward.copy())
        for lane in np.flatnonzero(transition.done).tolist():
            rewards = [float(reward[lane]) for reward in self.rewards[self._started[lane]:]]
            self.episodes.append(Episode(lane, sum(rewards), len(rewards), bool(transition.terminated[lane])))
            self._started[lane] = self.env_steps
            self._ended[lane] += 1

    def reached(self, episodes: int | None, env_steps: int | None) -> bool:
        """Whether every lane has ended `episodes` episodes, or `env_steps` env steps were made."""
        if env_steps is not None and self.env_steps >= env_steps:
            return True
        return episodes is not None and min(self._ended) >= episodes


def run(env: AnyEnv, agent: Agent, *, episodes: int | None = None, env_steps: int | None = None,
        seed: int | None = None, on_step: OnStep | None = None, progress: bool = False,
        tensorboard: Path | str | None = None) -> History:
    """Run an agent on the single or on the vector environment, and let it learn.

    Works with every autoreset mode, and gives the agent the same transitions in each: lanes that
    ended are reset by mask before the next action, so that no step is ever spent on a reset. The
    loop stops *before* that reset (except in same-step mode, where the environment resets
    itself), so the fine-tuned model of the last episode can still be scored or exported, also
    from `on_step`.

    Args:
        env: ``gym.make(...)`` or ``gym.make_vec(...)``.
        agent: Anything that follows `Agent`.
        episodes: Stop once *every* lane has ended this many episodes.
        env_steps: Stop after this many env steps (of each lane), whichever comes first.
        seed: Seed of the environment's reset; the agent has its own.
        on_step: Observer of every env step.
        progress: Whether to show a progress bar on stderr, if that is a terminal.
        tensorboard: Folder for TensorBoard events, see `agents.observers.TensorBoard`.

    Raises:
        LeLoRAError: Neither `episodes` nor `env_steps` given, or one of them below 1; or `tensorboard`
            cannot be written to.
    """
    from agents.observers import observers

    limits = [limit for limit in (episodes, env_steps) if limit is not None]
    if not limits or min(limits) < 1:
        raise LeLoRAError(f"run needs episodes or env_steps of at least 1 (got {episodes=}, {env_steps=})")
    lanes = _Lanes(env)
    history = History(lanes.num_lanes)
    total = _expected(env, episodes, env_steps)
    with observers(env, on_step, progress=progress, tensorboard=tensorboard, total=total) as observe:
        observation = lanes.reset(seed)
        while True:
            transition = lanes.step(observation, agent.act(observation))
            scalars = agent.update(transition)
            history.add(transition)
            observe(transition, scalars, history.env_steps)
            if history.reached(episodes, env_steps):
                return history
            observation = lanes.resume(transition)


def _expected(env: AnyEnv, episodes: int | None, env_steps: int | None) -> int | None:
    """Env steps until the end, if no lane diverges; ``None`` where the environment does not say."""
    horizon = getattr(env.unwrapped, "horizon", None)
    whole = None if episodes is None or horizon is None else episodes * int(horizon)
    return min((limit for limit in (whole, env_steps) if limit is not None), default=None)


class _Lanes:
    """Single and vector environments in one form: batched, and reset where an episode ended."""

    def __init__(self, env: AnyEnv) -> None:
        self.env = env
        self.vector = isinstance(env, VectorEnv)
        self.num_lanes = env.num_envs if isinstance(env, VectorEnv) else 1
        mode = (env.metadata or {}).get("autoreset_mode")
        self.resets_itself = self.vector and mode == AutoresetMode.SAME_STEP
        self._first_of_next: Array | None = None

    def reset(self, seed: int | None) -> Array:
        """The first observation, (L, M, F)."""
        observation, _ = self.env.reset(seed=seed)
        return np.asarray(observation) if self.vector else np.asarray(observation)[None]

    def step(self, observation: Array, action: Array) -> Transition:
        """One env step of every lane."""
        if not self.vector:
            after, reward, terminated, truncated, info = self.env.step(action[0])
            batched = {name: np.asarray([value]) for name, value in info.items()}
            return Transition(observation, action, np.asarray([reward], dtype=np.float64), np.asarray([terminated]),
                              np.asarray([truncated]), batched, np.asarray(after)[None])
        after, reward, terminated, truncated, info = self.env.step(action)
        done = np.asarray(terminated) | np.asarray(truncated)
        self._first_of_next, after = after, np.array(after)
        if self.resets_itself and done.any():
            after[done] = np.stack(list(info["final_obs"][done]))
        return Transition(observation, action, np.array(reward), np.array(terminated), np.array(truncated),
                          step_info(info, done), after)

    def resume(self, transition: Transition) -> Array:
        """The observation to act on next: lanes that ended start their next episode."""
        done = transition.done
        if not done.any():
            return transition.next_observation
        if self.resets_itself:
            return np.asarray(self._first_of_next)
        if not self.vector:
            return self.reset(None)
        first, _ = self.env.reset(options={"reset_mask": done})
        following = transition.next_observation.copy()
        following[done] = np.asarray(first)[done]
        return following


def step_info(info: Mapping[str, Any], done: Array) -> dict[str, Any]:
    """The info of the *step* in a vector environment's info, without what a reset has put there.

    In same-step mode, lanes that ended carry the info of their reset, and that of the step lies
    in ``final_info``. Entries are (L, ...) arrays; the ``_name`` masks are dropped.
    """
    final: Mapping[str, Any] = info.get("final_info", {})
    ended = done if "final_info" in info else np.zeros_like(done)
    result: dict[str, Any] = {}
    for name in sorted({*info, *final} - {"final_info", "final_obs"}):
        if name.startswith("_"):
            continue
        present = np.where(ended, _mask(final, name, done), _mask(info, name, done))
        if present.any():
            result[name] = _merge(info.get(name), final.get(name), ended)
    return result


def _mask(info: Mapping[str, Any], name: str, done: Array) -> Array:
    return np.asarray(info.get(f"_{name}", np.full_like(done, name in info)))


def _merge(now: Any, final: Any, ended: Array) -> Any:
    if final is None or isinstance(now, Mapping) or isinstance(final, Mapping):
        return now if final is None or not ended.all() else final
    if now is None:
        return np.array(final)
    where = ended.reshape(-1, *[1] * (np.ndim(final) - 1))
    return np.where(where, final, now)
