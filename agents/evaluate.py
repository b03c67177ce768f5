"""One normalised score for an agent on named instances: uniform rank = 0, the best that is known = 1.

Shapes: L lanes.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from agents.agent import Agent, AnyEnv, Array, Transition, run
from lelora_env.errors import LeLoRAError, UnknownNameError

REFERENCE = Path(__file__).with_name("reference.json")
"""Returns of uniform rank and of the best that is known, per instance; `benchmarks/reference_scores.py` makes it."""

LANES = 8
"""Episodes, from seeds of their own, by which an agent is judged on an instance."""

FIRST_SEED = 10_000
"""Seed of the first of them: far from those that anything is trained from."""


@dataclass(frozen=True)
class Evaluation:
    """An agent's normalised scores.

    Attributes:
        scores: Per instance, one score a lane, (L,).
        returns: Per instance, the mean reward of an env step in each lane, (L,).
    """

    scores: dict[str, Array]
    returns: dict[str, Array]

    @property
    def score(self) -> float:
        """The mean over instances of the mean over lanes."""
        return float(np.mean([scores.mean() for scores in self.scores.values()]))


class StandingStill:
    """An agent that acts and does not learn, as an `Agent`."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent

    def act(self, observation: Array) -> Array:
        """As the agent acts."""
        return self.agent.act(observation)

    def update(self, transition: Transition) -> dict[str, float]:
        """Learn nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The agent's state."""
        return self.agent.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the agent."""
        self.agent.load_state_dict(state)


def evaluate(agent: str | Callable[[AnyEnv], Agent], instances: str | Sequence[str], *, learn: bool | None = None,
             lanes: int = LANES, device: str | None = None, **options: Any) -> Evaluation:
    """Let an agent fine-tune named instances and score it.

    The score of a lane is (its return - that of uniform rank) / (that of the best known - that of uniform rank), with
    the return meant over env steps: 0 = the largest rank everywhere at the first location, 1 = the planted optimum, or
    where none is known the best that was found (`reference` says which). Above 1 is possible: a fixed allocation is not
    the best schedule. All agents meet the same seeds.

    Args:
        agent: A name of `make_agent`, or a function that makes an agent for an environment, such as
            ``lambda env: make_agent("reinforce", env, policy_file="policy.safetensors")``.
        instances: Name or names of instances, see ``lelora_env.instances.list_instances``.
        learn: Whether the agent hears of the episode. ``None`` = only those agents by name that do nothing without
            hearing what the environment reports (``agents.REQUIRED``).
        lanes: L, episodes for each instance.
        device: Where to compute.
        **options: Options of a named agent.

    Raises:
        LeLoRAError: No instances.
        UnknownNameError: No such agent, or an instance that there is no reference result for.
    """
    instances = [instances] if isinstance(instances, str) else list(instances)
    if not instances:
        raise LeLoRAError("evaluate needs at least one instance; lelora_env.instances.list_instances() names them")
    known = {name: reference(name) for name in instances}
    make = _maker(agent, options)
    hears = bool(_required(make)) if learn is None else learn
    returns = {name: mean_rewards(name, make, hears, lanes, device) for name in instances}
    scores = {name: (returns[name] - known[name]["uniform"]) / (known[name]["best"] - known[name]["uniform"])
              for name in instances}
    return Evaluation(scores, returns)


def reference(instance: str) -> dict[str, Any]:
    """``uniform`` and ``best`` mean reward of an env step on an instance, and what ``best_is``.

    Raises:
        UnknownNameError: There is none for this instance.
    """
    known: dict[str, Any] = json.loads(REFERENCE.read_text(encoding="utf-8"))["instances"]
    if instance not in known:
        raise UnknownNameError("instance with a reference result", instance, known)
    found: dict[str, Any] = known[instance]
    return found


def mean_rewards(instance: str, make: Callable[[AnyEnv], Agent], learn: bool = False, lanes: int = LANES,
                 device: str | None = None) -> Array:
    """Mean reward of an env step in one episode of each lane, (L,)."""
    env = gym.make_vec("LeLoRA-v0", num_envs=lanes, vectorization_mode="vector_entry_point", instance=instance,
                       autoreset_mode=gym.vector.AutoresetMode.DISABLED, device=device, **_required(make))
    try:
        agent = make(env)
        history = run(env, agent if learn else StandingStill(agent), episodes=1, seed=FIRST_SEED)
    finally:
        env.close()
    totals = np.zeros(lanes)
    for episode in reversed(history.episodes):  # a lane that diverged may have begun another: its first one counts
        totals[episode.lane] = episode.total_reward / episode.length
    return totals


def _maker(agent: str | Callable[[AnyEnv], Agent], options: dict[str, Any]) -> Callable[[AnyEnv], Agent]:
    if not isinstance(agent, str):
        if options:
            raise LeLoRAError(f"options ({', '.join(options)}) are for agents given by name")
        return agent
    from agents import make_agent, required_options

    def make(env: AnyEnv) -> Agent:
        return make_agent(agent, env, **options)

    make.required = required_options(agent)  # type: ignore[attr-defined]
    return make


def _required(make: Callable[[AnyEnv], Agent]) -> dict[str, Any]:
    """Options of the environment that the agent needs: its maker's attribute ``required``."""
    needed: dict[str, Any] = getattr(make, "required", {})
    return needed
