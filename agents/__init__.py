"""Agents for LeLoRA environments: one protocol, one loop, a few algorithms.

Swapping the algorithm is one name::

    agent = make_agent("reinforce", env, seed=0)      # or "ppo", "a2c", "random", "fixed", ...
    history = run(env, agent, episodes=1, seed=0)
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from agents.additive import AdditiveModel
from agents.agent import Agent, AnyEnv, Episode, History, OnStep, Transition, run
from agents.bandit import MatrixBandit
from agents.controls import FixedAllocation, RandomAllocation
from agents.evaluate import evaluate
from agents.options import annotations_of, check_options
from agents.policy import ActionDistribution, PerMatrixPolicy
from agents.reinforce import Reinforce, ReinforceConfig
from agents.rules import Credit, Sensitivity, SpectralEnergy
from agents.spec import AgentSpec
from lelora_env.errors import LeLoRAError, UnknownNameError

__all__ = ["AGENT_NAMES", "REQUIRED", "ActionDistribution", "AdditiveModel", "Agent", "AgentSpec", "Credit", "Episode",
           "FixedAllocation", "History", "MatrixBandit", "OnStep", "PerMatrixPolicy", "RandomAllocation", "Reinforce",
           "ReinforceConfig", "Sensitivity", "SpectralEnergy", "Transition", "evaluate", "make_agent", "option_names",
           "required_options", "run"]


def _unseeded(build: Callable[..., Agent]) -> Callable[..., Agent]:
    """A builder for an agent that draws nothing."""
    return lambda spec, *, seed, **options: build(spec, **options)


def _sb3(algorithm: str) -> Callable[..., Agent]:
    def build(spec: AgentSpec, *, seed: int, **options: Any) -> Agent:
        from agents.sb3_agent import SB3Agent

        return SB3Agent(spec, algorithm=algorithm, seed=seed, **options)

    return build


def _adalora(spec: AgentSpec, **options: Any) -> Agent:
    return Sensitivity(spec, measure="adalora", **options)


_CLASSES: dict[str, type[Any]] = {
    "reinforce": Reinforce, "random": RandomAllocation, "fixed": FixedAllocation, "energy": SpectralEnergy,
    "sensitivity": Sensitivity, "adalora": Sensitivity, "credit": Credit, "bandit": MatrixBandit,
    "additive": AdditiveModel}

_BUILDERS: dict[str, Callable[..., Agent]] = {
    "reinforce": Reinforce, "ppo": _sb3("ppo"), "a2c": _sb3("a2c"), "random": RandomAllocation,
    "fixed": _unseeded(FixedAllocation), "energy": _unseeded(SpectralEnergy), "sensitivity": _unseeded(Sensitivity),
    "adalora": _unseeded(_adalora), "credit": _unseeded(Credit), "bandit": MatrixBandit, "additive": AdditiveModel}

REQUIRED: dict[str, dict[str, Any]] = {
    "sensitivity": {"component_info": ("sensitivity",)}, "adalora": {"component_info": ("sensitivity",)},
    "credit": {"component_info": ("credit",)}}
"""Options that the environment must be made with, by agent; see `required_options`."""


def required_options(*names: str) -> dict[str, Any]:
    """Options that an environment needs so that all the named agents can be used on it."""
    infos = {info: None for name in names for info in REQUIRED.get(name, {}).get("component_info", ())}
    return {"component_info": tuple(infos)} if infos else {}


AGENT_NAMES = tuple(_BUILDERS)
"""The names that `make_agent` knows."""


def make_agent(name: str, env: AnyEnv, *, seed: int = 0, **options: Any) -> Agent:
    """Build an agent for an environment by name.

    Args:
        name: One of `AGENT_NAMES`. They learn: ``"reinforce"`` (options ``preset`` and those of `ReinforceConfig`),
            ``"ppo"`` and ``"a2c"`` (options of `SB3Agent` and of the Stable-Baselines3 class), ``"bandit"``,
            ``"additive"``, ``"credit"``. They do not: ``"random"`` (uniform, anew at every env step, or ``frozen``),
            ``"fixed"`` (options ``rank`` and ``location``, or ``allocation``), ``"energy"``, ``"sensitivity"``,
            ``"adalora"``. `REQUIRED` says what the environment must be made with for some of them.
        env: The single or the vector environment that it will run on.
        seed: Seed of everything that the agent draws; the environment has its own.
        **options: See `name`.

    Raises:
        UnknownNameError: No such agent, or an option that it does not have.
        LeLoRAError: An option's value is of the wrong kind or out of range.
    """
    if name not in _BUILDERS:
        raise UnknownNameError("agent", name, AGENT_NAMES)
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or seed < 0:
        raise LeLoRAError(f"seed must be an integer of at least 0 (got {seed!r})")
    check_options(name, options, _known_options(name))
    return _BUILDERS[name](AgentSpec.from_env(env), seed=seed, **options)


def option_names(name: str) -> tuple[str, ...]:
    """The options that an agent has.

    Raises:
        UnknownNameError: No such agent.
    """
    if name not in _BUILDERS:
        raise UnknownNameError("agent", name, AGENT_NAMES)
    return tuple(_known_options(name))


def _known_options(name: str) -> dict[str, Any]:
    """The annotations of an agent's options."""
    if name in _CLASSES:
        known = annotations_of(_CLASSES[name]) | (annotations_of(ReinforceConfig) if name == "reinforce" else {})
    else:
        from agents.sb3 import ALGORITHMS
        from agents.sb3_agent import SB3Agent

        known = annotations_of(ALGORITHMS[name]) | annotations_of(SB3Agent)
    private = {"spec", "seed", "env", "algorithm", "_init_setup_model"} | ({"measure"} if name == "adalora" else set())
    return {option: annotation for option, annotation in known.items() if option not in private}
