"""Agents for LeLoRA environments: one protocol, one loop, a few algorithms.

Swapping the algorithm is one name::

    agent = make_agent("reinforce", env, seed=0)      # or "random", "fixed", "ppo", "a2c"
    history = run(env, agent, episodes=1, seed=0)
"""

from collections.abc import Callable
from typing import Any

from agents.agent import Agent, AnyEnv, Episode, History, OnStep, Transition, run
from agents.controls import FixedAllocation, RandomAllocation
from agents.options import annotations_of, check_options
from agents.policy import ActionDistribution, PerMatrixPolicy
from agents.reinforce import Reinforce, ReinforceConfig
from agents.spec import AgentSpec
from lelora_env.errors import UnknownNameError

__all__ = ["AGENT_NAMES", "ActionDistribution", "Agent", "AgentSpec", "Episode", "FixedAllocation", "History", "OnStep",
           "PerMatrixPolicy", "RandomAllocation", "Reinforce", "Transition", "make_agent", "run"]


def _fixed(spec: AgentSpec, *, seed: int, **options: Any) -> Agent:
    return FixedAllocation(spec, **options)


def _ppo(spec: AgentSpec, *, seed: int, **options: Any) -> Agent:
    from agents.sb3_agent import SB3Agent

    return SB3Agent(spec, algorithm="ppo", seed=seed, **options)


def _a2c(spec: AgentSpec, *, seed: int, **options: Any) -> Agent:
    from agents.sb3_agent import SB3Agent

    return SB3Agent(spec, algorithm="a2c", seed=seed, **options)


_BUILDERS: dict[str, Callable[..., Agent]] = {
    "random": RandomAllocation, "fixed": _fixed, "reinforce": Reinforce, "ppo": _ppo, "a2c": _a2c}

AGENT_NAMES = tuple(_BUILDERS)
"""The names that `make_agent` knows."""


def make_agent(name: str, env: AnyEnv, *, seed: int = 0, **options: Any) -> Agent:
    """Build an agent for an environment by name.

    Args:
        name: One of `AGENT_NAMES`: ``"random"`` (uniform, anew at every env step), ``"fixed"``
            (options ``rank`` and ``location``, or ``allocation``), ``"reinforce"`` (options
            ``preset`` and those of `ReinforceConfig`), ``"ppo"`` and ``"a2c"`` (options of the
            Stable-Baselines3 class).
        env: The single or the vector environment that it will run on.
        seed: Seed of everything that the agent draws; the environment has its own.
        **options: See `name`.

    Raises:
        UnknownNameError: No such agent, or an option that it does not have.
        LeLoRAError: An option's value is of the wrong kind or out of range.
    """
    if name not in _BUILDERS:
        raise UnknownNameError("agent", name, AGENT_NAMES)
    check_options(name, options, _known_options(name))
    return _BUILDERS[name](AgentSpec.from_env(env), seed=seed, **options)


def _known_options(name: str) -> dict[str, Any]:
    """The annotations of an agent's options."""
    own: dict[str, Callable[..., Any]] = {"random": RandomAllocation, "fixed": FixedAllocation, "reinforce": Reinforce}
    if name in own:
        known = annotations_of(own[name]) | (annotations_of(ReinforceConfig) if name == "reinforce" else {})
    else:
        from agents.sb3 import ALGORITHMS
        from agents.sb3_agent import SB3Agent

        known = annotations_of(ALGORITHMS[name]) | annotations_of(SB3Agent)
    private = {"spec", "seed", "env", "algorithm", "_init_setup_model"}
    return {option: annotation for option, annotation in known.items() if option not in private}
