"""Searching one allocation for a whole run: many short runs under common random numbers, and the file that comes of it.

A round is one run of every lane, all with the same rows in the same order; an agent chooses an allocation a lane,
hears what loss each ended with on held-out training rows, and chooses again. What is left at the end is a frozen
allocation, which ``lelora train --agent fixed --agent-set allocation=FILE`` trains with, on this task or another.

Shapes: L lanes · M matrices.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from lelora_env.config import as_options
from lelora_env.errors import LeLoRAError
from lelora_env.runs import check_writable, environment_facts, to_json
from lelora_env.training import BUILT_IN

if TYPE_CHECKING:
    from agents import Agent, Transition

RoundObserver = Callable[[int, float], None]
"""Called after every round with its number, from 1, and the mean loss of its lanes."""


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What `search` is to do.

    Attributes:
        model: As of ``lelora train``.
        task: As of ``lelora train``.
        task_options: Options of the task.
        agent: Who searches, a name in ``agents.AGENT_NAMES``.
        agent_options: Options of the agent.
        rounds: Rounds; the search costs rounds · lanes runs.
        lanes: L.
        steps: Optimiser steps of a run.
        budget: Share of what the largest ranks everywhere would train, in (0, 1]: no run trains more.
        seed: Of the environment and the agent.
        out: Folder for allocation.json and rounds.jsonl; must be new or empty.
        options: Fields of ``AdapterConfig`` and ``EnvConfig`` that differ from `SEARCH`.
    """

    model: str = "minilm"
    task: str = "docstrings"
    task_options: dict[str, Any] = field(default_factory=dict)
    agent: str = "additive"
    agent_options: dict[str, Any] = field(default_factory=dict)
    rounds: int = 10
    lanes: int = 48
    steps: int = 300
    budget: float = 0.5
    seed: int = 0
    out: Path
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("rounds", "lanes", "steps"):
            if getattr(self, name) < 1:
                raise LeLoRAError(f"{name} must be at least 1 (got {getattr(self, name)})")
        if not 0 < self.budget <= 1:
            raise LeLoRAError(f"budget must be in (0, 1] (got {self.budget})")
        if self.seed < 0:
            raise LeLoRAError(f"seed must be an integer of at least 0 (got {self.seed})")
        if "budget" in self.agent_options:
            raise LeLoRAError("the agent's budget is that of the search: use --budget")
        if self.agent in ("sensitivity", "adalora"):
            raise LeLoRAError(f"{self.agent} begins anew with every run, so there is nothing to search with it: use it "
                              "in `lelora train`, where it allots within the run")
        for name in ("horizon", "steps_per_action", "common_random_numbers", "parameter_budget"):
            if name in self.options:
                raise LeLoRAError(f"{name} is what a search sets itself: use --steps and --budget")


SEARCH: dict[str, Any] = {"target_modules": "all-linear", "rank_set": (0, 2, 4, 8), "parametrisation": "unit",
                          "reward_size": 1024, "learning_rate": 1e-3, "tune_size": 0}
"""Settings of a search that differ from the environment's defaults."""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search came to.

    Attributes:
        path: The allocation file.
        train_with: Options of ``lelora train`` that train with it as the search did.
        losses: (rounds, L) loss on the reward rows at the end of every run, NaN where it diverged.
        trained_parameters: Of the allocation.
        runs: Fine-tuning runs made.
        optimiser_steps: Optimiser steps made in all of them.
        seconds: Wall time.
    """

    path: Path
    train_with: str
    losses: np.ndarray
    trained_parameters: int
    runs: int
    optimiser_steps: int
    seconds: float


def search(settings: SearchSettings, observer: RoundObserver | None = None) -> SearchResult:
    """Search, and leave ``allocation.json`` and ``rounds.jsonl`` in the settings' folder.

    Raises:
        LeLoRAError: Bad input, before anything is run; or a folder that cannot be written to.
        KeyboardInterrupt: Ctrl-C; the files then hold what the rounds that were done have taught.
    """
    from agents import AgentSpec, run
    from agents.files import final_allocation, save_allocation

    check_writable(settings.out)
    started = time.monotonic()
    env = _make_env(settings)
    agent = _make_agent(settings, env)
    losses: list[np.ndarray] = []

    def on_step(transition: "Transition", scalars: dict[str, float], step: int) -> None:
        settings.out.mkdir(parents=True, exist_ok=True)
        losses.append(np.where(transition.info["diverged"], np.nan, transition.info["L1"]))
        line = {"round": step, "losses": losses[-1], "actions": transition.action,
                "ranks": transition.info["executed_rank"], "agent": scalars}
        with (settings.out / "rounds.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(to_json(line) + "\n")
        if observer is not None:
            observer(step, float(losses[-1].mean()))

    interrupted = False
    try:
        try:
            run(env, agent, episodes=settings.rounds, seed=settings.seed, on_step=on_step)
        except KeyboardInterrupt:
            if not losses:
                raise
            interrupted = True
        first, _ = env.reset(seed=settings.seed)
    finally:
        env.close()
    spec, base = AgentSpec.from_env(env), env.unwrapped
    action = final_allocation(agent, first, spec, settings.budget)
    runs = len(losses) * settings.lanes
    seconds = round(time.monotonic() - started, 1)
    cost = {"runs": runs, "optimiser_steps": runs * settings.steps, "seconds": seconds,
            "first_round_loss": _mean(losses[0]), "last_round_loss": _mean(losses[-1])}
    told = {name: value for name, value in asdict(settings).items() if name not in ("out", "options")}
    save_allocation(spec, action, settings.out / "allocation.json", {
        "budget": settings.budget, "interrupted": interrupted, "search": {**told, **cost}, "about": environment_facts(),
        "options": _plain(as_options(base.adapter_config, base.env_config))})
    if interrupted:
        raise KeyboardInterrupt
    return SearchResult(path=settings.out / "allocation.json", train_with=_train_options(settings, base),
                        losses=np.stack(losses), trained_parameters=spec.trained_parameters(action), runs=runs,
                        optimiser_steps=runs * settings.steps, seconds=seconds)


def _mean(losses: np.ndarray) -> float | None:
    """Mean loss of a round; ``None`` where a lane has diverged, as JSON has no other word for it."""
    return float(losses.mean()) if np.isfinite(losses).all() else None


def _train_options(settings: SearchSettings, base: Any) -> str:
    """The options of ``lelora train`` under which an allocation means what it meant in the search."""
    adapter, config = base.adapter_config, base.env_config
    modules = adapter.target_modules
    modules = modules if isinstance(modules, str) else ",".join(modules)
    places = ",".join(place if isinstance(place, str) else f"{place:g}" for place in adapter.locations)
    task = f"--model {settings.model} --task {settings.task} " if settings.model != BUILT_IN else "--model built-in "
    return (f"{task}--agent fixed --agent-set allocation={settings.out / 'allocation.json'} --target-modules {modules} "
            f"--rank-set {','.join(map(str, adapter.rank_set))} --learning-rate {config.learning_rate:g} --set "
            f"parametrisation={adapter.parametrisation} --set locations={places}")


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


def _make_env(settings: SearchSettings) -> Any:
    from agents import required_options

    task = {"name": settings.task, **settings.task_options} if settings.task_options else settings.task
    return gym.make_vec(
        "lelora_env:LeLoRA-v0", num_envs=settings.lanes, vectorization_mode="vector_entry_point",
        autoreset_mode=gym.vector.AutoresetMode.DISABLED, task=task,
        model=None if settings.model == BUILT_IN else settings.model,
        **{**required_options(settings.agent), **SEARCH, **settings.options, "horizon": 1,
           "steps_per_action": settings.steps, "common_random_numbers": True, "parameter_budget": settings.budget},
    )


def _make_agent(settings: SearchSettings, env: Any) -> "Agent":
    """The agent, told of the budget where it can use it; others are held to it by the environment."""
    from agents import make_agent, option_names

    budget = {"budget": settings.budget} if "budget" in option_names(settings.agent) else {}
    return make_agent(settings.agent, env, seed=settings.seed, **{**budget, **settings.agent_options})
