"""Running a sweep: runs that need the same environment share it, one lane each.

Shapes: L lanes · M matrices.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
import torch

from lelora_env.compare.store import CRASHED, DIVERGED, FINISHED, RunStore
from lelora_env.compare.sweep import ORACLE, Run, Sweep
from lelora_env.config import as_options, split_options
from lelora_env.errors import LeLoRAError, UnknownNameError
from lelora_env.runs import environment_facts
from lelora_env.training import LaneView, SideBySide

if TYPE_CHECKING:
    from agents import Agent, Transition

Observer = Callable[[int], object]
"""Called with the number of runs that have just come to their end."""


def run_sweep(sweep: Sweep, store: RunStore, *, lanes: int = 32, observer: Observer | None = None) -> None:
    """Make every run of a sweep that the store does not have yet.

    Args:
        sweep: What is to be run.
        store: Where lines go; what is there already is not run again.
        lanes: Most runs that share a model at a time.
        observer: Told of progress.

    Raises:
        LeLoRAError: `lanes` below 1, or the store cannot be written. Whatever goes wrong within runs is written down
            as their end (``crashed``), and the sweep goes on.
        KeyboardInterrupt: Ctrl-C; what was running is not written.
    """
    if lanes < 1:
        raise LeLoRAError(f"lanes must be at least 1 (got {lanes})")
    check_sweep(sweep)
    facts = environment_facts()
    waiting = list(batches(sweep, store.done(), lanes))
    while waiting:
        batch = waiting.pop(0)
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # runs that diverge are expected
                records = Contest(batch).run()
        except Exception as error:
            smaller = _halves(batch)
            waiting[:0] = smaller
            if smaller:
                continue
            records = [{"status": CRASHED, "reason": f"{type(error).__name__}: {error}"[:500]}] * len(batch)
        store.add({**_about(run, sweep), **record, "about": facts} for run, record in zip(batch, records, strict=True))
        if observer is not None:
            observer(len(batch))


def check_sweep(sweep: Sweep) -> None:
    """See, before anything is run, that every agent and every option exists.

    Raises:
        UnknownNameError: One does not.
        LeLoRAError: An option's value does not fit.
    """
    from agents import AGENT_NAMES

    for method in sweep.methods:
        if method.agent not in (*AGENT_NAMES, ORACLE):
            raise UnknownNameError(f"agent of method {method.name!r}:", method.agent, (*AGENT_NAMES, ORACLE))
    for run in sweep.runs():
        if run.problem.instance is None and run.seed == sweep.seeds[0]:  # options do not depend on the seed
            split_options({name: value for name, value in run.environment.items() if name not in ("model", "task")})


def _halves(batch: list[Run]) -> list[list[Run]]:
    """What to try instead of a batch that failed: in the end every run stands for itself, whatever its company did."""
    return [batch[: len(batch) // 2], batch[len(batch) // 2 :]] if len(batch) > 1 else []


def batches(sweep: Sweep, done: set[str], lanes: int) -> Iterator[list[Run]]:
    """The runs that are still to be made, in groups of at most `lanes` that can share an environment."""
    groups: dict[str, list[Run]] = {}
    for run in sweep.runs():
        if run.key not in done:
            groups.setdefault(repr(sorted(environment(run).items(), key=str)), []).append(run)
    for group in groups.values():
        for start in range(0, len(group), lanes):
            yield group[start : start + lanes]


def environment(run: Run) -> dict[str, Any]:
    """Every argument of the environment that a run needs, what its agent needs included."""
    from agents import required_options

    return {**required_options(run.method.agent), **run.environment}


def _about(run: Run, sweep: Sweep) -> dict[str, Any]:
    return {"key": run.key, "sweep": sweep.name, "method": run.method.name, "problem": run.problem.name,
            "seed": run.seed, "agent": run.method.agent, "agent_options": dict(run.method.agent_options),
            "agent_seed": run.agent_seed}


class Contest:
    """Runs that share an environment, from start to score."""

    def __init__(self, runs: Sequence[Run]) -> None:
        """Make the environment and the agents; nothing has been trained yet."""
        self.runs = list(runs)
        self.env: Any = gym.make_vec(
            "lelora_env:LeLoRA-v0", num_envs=len(runs), vectorization_mode="vector_entry_point",
            autoreset_mode=gym.vector.AutoresetMode.DISABLED, **environment(self.runs[0]),
        )
        self.base: Any = self.env.unwrapped
        self.agents = SideBySide([self._agent(run) for run in self.runs])

    def _agent(self, run: Run) -> "Agent":
        from agents import FixedAllocation, make_agent

        view: Any = LaneView(self.env)
        if run.method.agent != ORACLE:
            return make_agent(run.method.agent, view, seed=run.agent_seed, **run.method.agent_options)
        from agents import AgentSpec

        if not hasattr(self.base.task, "best_allocation"):
            raise LeLoRAError(f"the best allocation of {run.problem.name!r} is not known: leave the oracle out")
        best = [(choice.rank, choice.location) for choice in self.base.task.best_allocation()]
        return FixedAllocation(AgentSpec.from_env(view), allocation=best)

    def run(self) -> list[dict[str, Any]]:
        """Fine-tune every lane for one episode; one record a run."""
        from agents import run

        base, started = self.base, time.monotonic()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        seeds: Any = [run.seed for run in self.runs]
        _, infos = self.env.reset(seed=seeds)
        before = self._scores("eval")
        contestants: Any = _Contestants(self.agents, infos["L1"])
        training = time.monotonic()
        run(self.env, contestants, env_steps=base.horizon, seed=seeds)
        seconds = (time.monotonic() - training) / base.horizon
        after = self._scores("eval")
        tune = self._scores("tune") if base.env_config.tune_size else [None] * len(self.runs)
        shared = {
            "metric": base.task.metric, "lanes": len(self.runs), "seconds_a_step": seconds,
            "seconds": time.monotonic() - started, "stored_parameters": self._stored(),
            "peak_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            "settings": as_options(base.adapter_config, base.env_config), "horizon": base.horizon,
        }
        self.env.close()
        whole = contestants.alive & np.isfinite(after)
        return [{**shared, **self._record(bool(whole[lane]), before[lane], after[lane], tune[lane],
                                          contestants.history(lane))} for lane in range(len(self.runs))]

    def _scores(self, split: str) -> list[float]:
        return [score[self.base.task.metric] for score in self.base.evaluate(split)]

    def _stored(self) -> int:
        """Numbers of one lane's bank and head: what training keeps, whatever of it trains at a time."""
        return sum(rows[0].numel() for rows in self.base.tuner.bank.rows.values())

    def _record(
        self, alive: bool, before: float, after: float, tune: float | None,
        history: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    ) -> dict[str, Any]:
        losses, actions, trained, ranks = history
        return {
            "status": FINISHED if alive else DIVERGED,
            "score_before": before, "score": after if alive else None, "tune": tune if alive else None,
            "losses": losses.tolist(),
            "trained_parameters": float(trained.mean()), "trained_parameters_end": float(trained[-1]),
            "mean_rank": float(ranks.mean()),
            "actions": actions.tolist(),
        }


class _Contestants:
    """The agents as the loop sees them: those of lanes that diverged neither learn nor count any longer."""

    def __init__(self, agents: SideBySide, losses: np.ndarray) -> None:
        self.agents = agents
        self.alive = np.ones(len(losses), dtype=bool)
        self._steps = np.zeros(len(losses), dtype=np.int64)  # of each lane, up to the one in which it diverged
        self._losses = [losses.copy()]
        self._actions: list[np.ndarray] = []
        self._trained: list[np.ndarray] = []
        self._ranks: list[np.ndarray] = []

    def act(self, observation: np.ndarray) -> np.ndarray:
        return self.agents.act(observation)

    def update(self, transition: "Transition") -> dict[str, float]:
        for lane in np.flatnonzero(self.alive):
            self.agents.update_one(int(lane), transition)
        self._steps += self.alive
        self.alive &= ~transition.info["diverged"].astype(bool)
        self._losses.append(np.where(self.alive, transition.info["L1"], np.nan))
        self._actions.append(transition.action)
        self._trained.append(transition.info["trained_parameters"])
        self._ranks.append(transition.info["mean_rank"])
        return {}

    def history(self, lane: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """A lane's losses (from before its first step on), actions, trained parameters and mean ranks."""
        steps = self._steps[lane]
        kept = (self._losses, self._actions, self._trained, self._ranks)
        losses, actions, trained, ranks = (np.stack(part)[:, lane] for part in kept)
        return losses[: steps + 1], actions[:steps], trained[:steps], ranks[:steps]
