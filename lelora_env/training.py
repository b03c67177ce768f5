"""The main job: an agent allocates while a model is fine-tuned, beside controls on the same data.

Every contestant has a lane of its own in one vector environment with common random numbers: same start,
same rows in the same order, same number of optimiser steps. Only the allocations differ.

Shapes: L lanes · M matrices · F features.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from lelora_env.config import as_options
from lelora_env.errors import LeLoRAError
from lelora_env.learnt import learnt
from lelora_env.records import LaneTrace, RunRecord
from lelora_env.runs import RunFolder, check_writable, default_folder

if TYPE_CHECKING:
    from agents import Agent, Transition

BUILT_IN = "built-in"
"""Name of the small model that the planted task brings with it."""

DEMONSTRATION: dict[str, Any] = {"learning_rate": 2e-3, "head_learning_rate": 1e-2}
"""Options for the task ``docstrings``, which is trained for 100 optimiser steps only; chosen on its tune split."""

StepObserver = Callable[[int, dict[str, float]], None]
"""Called after every env step with its number, from 1, and each lane's loss on the reward batch."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What `train` is to do.

    Attributes:
        model: Folder, hub id or packaged name; ``"built-in"`` = the model that the task brings along.
        task: Name of a task, with a file or folder behind a colon where it needs one (``"text:reviews.csv"``).
        task_options: Options of the task, such as ``eval_rows``.
        agent: Who allocates, a name in ``agents.AGENT_NAMES``.
        controls: Agents to run beside it; may be empty.
        seed: Seed of the environment; every agent gets one of its own from it (`agent_seeds`).
        out: Run folder; ``None`` = a new one under ``runs/``.
        options: Fields of ``AdapterConfig`` and ``EnvConfig`` that differ from their defaults.
        agent_options: Options of the agent.
    """

    model: str = "minilm"
    task: str = "docstrings"
    task_options: dict[str, Any] = field(default_factory=dict)
    agent: str = "reinforce"
    controls: tuple[str, ...] = ("fixed", "random")
    seed: int = 0
    out: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)
    agent_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise LeLoRAError(f"seed must be an integer of at least 0 (got {self.seed})")
        for options, taken in ((self.task_options, {"name": "--task"}),
                               (self.agent_options, {"name": "--agent", "seed": "--seed", "env": "--task"})):
            for name in taken.keys() & options:
                raise LeLoRAError(f"{name} = {options[name]!r} is not an option; use {taken[name]} for it")

    @property
    def task_spec(self) -> str | dict[str, Any]:
        """The task with its options, as `lelora_env.tasks.make_task` takes it."""
        return {"name": self.task, **self.task_options} if self.task_options else self.task

    @property
    def agent_seeds(self) -> list[int]:
        """A seed for each lane's agent, in [0, 2^32), such that their draws have nothing in common."""
        sequences = [np.random.SeedSequence((self.seed, lane)) for lane in range(len(self.lanes))]
        return [int(sequence.generate_state(1)[0]) for sequence in sequences]

    @property
    def lanes(self) -> list[str]:
        """A name for each contestant, the agent's first, numbered where two are of one kind."""
        names = [self.agent, *self.controls]
        return [name if names.index(name) == i else f"{name}-{i}" for i, name in enumerate(names)]


@dataclass(frozen=True, kw_only=True)
class LaneResult:
    """One row of the closing table.

    Attributes:
        lane: Name of the lane.
        metric: Name of the task's score.
        eval_before: Score on the eval split before training.
        eval_after: Score on the eval split after it.
        tune_after: Score on the tune split after it; NaN without one.
        loss_before: Loss of the reward batch before training.
        loss_after: The same after it.
        mean_rank: Mean over env steps and matrices.
        trained_parameters: Mean number of trained parameters over env steps, heads not counted.
    """

    lane: str
    metric: str
    eval_before: float
    eval_after: float
    tune_after: float
    loss_before: float
    loss_after: float
    mean_rank: float
    trained_parameters: float


class LaneView(gym.Env[np.ndarray, np.ndarray]):
    """A vector environment as an agent with some of its lanes sees it: names and spaces, no step."""

    def __init__(self, vector: Any, num_lanes: int = 1) -> None:
        """Show the spaces of a lane of `vector` to an agent that will have `num_lanes` of them."""
        self._vector, self.num_lanes = vector, num_lanes
        self.observation_space = vector.single_observation_space
        self.action_space = vector.single_action_space

    @property
    def unwrapped(self) -> Any:
        """The vector environment itself, for its configuration and names."""
        return self._vector.unwrapped


class SideBySide:
    """Several agents, each on lanes of its own, under the protocol of one (an `Agent`)."""

    def __init__(self, agents: Sequence["Agent"], lanes_each: int = 1) -> None:
        """Take L / lanes_each agents for L lanes, in order."""
        self.agents, self.lanes_each = list(agents), lanes_each

    def lanes(self, index: int) -> slice:
        """The lanes of an agent."""
        return slice(index * self.lanes_each, (index + 1) * self.lanes_each)

    def act(self, observation: np.ndarray) -> np.ndarray:
        """(L, M, F) -> (L, 2M): each agent sees and answers its own lanes only."""
        return np.concatenate([agent.act(observation[self.lanes(i)]) for i, agent in enumerate(self.agents)])

    def update(self, transition: "Transition") -> dict[str, float]:
        """Let each agent learn from its lanes; scalars come back as ``<agent's index>/<name>``."""
        scalars: dict[str, float] = {}
        for i in range(len(self.agents)):
            scalars.update({f"{i}/{name}": value for name, value in self.update_one(i, transition).items()})
        return scalars

    def update_one(self, index: int, transition: "Transition") -> dict[str, float]:
        """Let one agent learn from its lanes."""
        return self.agents[index].update(_part(transition, self.lanes(index)))

    def state_dict(self) -> dict[str, Any]:
        """The agents' states, by index."""
        return {str(i): agent.state_dict() for i, agent in enumerate(self.agents)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore each agent."""
        for i, agent in enumerate(self.agents):
            agent.load_state_dict(state[str(i)])


LOGGED_POLICIES = 100
"""Env steps of a run, at most, for which the agents' probabilities are noted."""


class Watched:
    """Agents with one lane each, as one `Agent`, with the probabilities noted that their actions are drawn from.

    Attributes:
        probabilities: How likely every choice was in the env step that was acted on last, for each lane: (M, R, S), or
            ``None`` for an agent that does not say or an env step that is not noted.
    """

    def __init__(self, agents: SideBySide, env_steps: int) -> None:
        """Watch up to `LOGGED_POLICIES` of `env_steps`, evenly spread, the first and the last among them."""
        count = min(LOGGED_POLICIES, env_steps)
        self._steps = set(np.linspace(1, env_steps, count).round().astype(int).tolist())
        self._agents, self._step = agents, 0
        self.probabilities: list[np.ndarray | None] = [None] * len(agents.agents)

    def act(self, observation: np.ndarray) -> np.ndarray:
        """(L, M, F) -> (L, 2M), as the agents themselves; each is asked for its own lane only."""
        self._step += 1
        for lane, agent in enumerate(self._agents.agents):
            ask = getattr(agent, "probabilities", None) if self._step in self._steps else None
            self.probabilities[lane] = None if ask is None else ask(observation[lane:lane + 1])[0]
        return self._agents.act(observation)

    def update(self, transition: "Transition") -> dict[str, float]:
        """As the agents themselves."""
        return self._agents.update(transition)

    def state_dict(self) -> dict[str, Any]:
        """As the agents themselves."""
        return self._agents.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As the agents themselves."""
        self._agents.load_state_dict(state)


def _part(transition: "Transition", here: slice) -> "Transition":
    return type(transition)(
        observation=transition.observation[here], action=transition.action[here], reward=transition.reward[here],
        terminated=transition.terminated[here], truncated=transition.truncated[here],
        info={name: np.asarray(value)[here] for name, value in transition.info.items()},
        next_observation=transition.next_observation[here],
    )


class Training:
    """One run of the main job: prepared when made, done by `run`.

    Args:
        settings: What to do.

    Raises:
        LeLoRAError: Bad input; nothing has been written by then.
    """

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings
        self.path = settings.out or default_folder(settings.task, settings.agent)
        check_writable(self.path)
        self.env = make_lanes(settings)
        self.base: Any = self.env.unwrapped
        self.contestants = make_contestants(settings, self.env)

    @property
    def metric(self) -> str:
        """Name of the task's score."""
        return str(self.base.task.metric)

    def resolved(self) -> dict[str, Any]:
        """Every setting of the run, as plain values, with what ``None`` stood for: what config.json holds.

        Only after the environment's first ``reset``, which loads the model.
        """
        settings, options = self.settings, as_options(self.base.adapter_config, self.base.env_config)
        named = {name: value for name, value in asdict(settings).items() if name not in ("options", "out")}
        base = self.base.tuner.base
        used = {"device": str(base.device), "dtype": str(base.spectrum.residual[0].dtype).removeprefix("torch."),
                "head_learning_rate": options["head_learning_rate"] or options["learning_rate"]}
        return {**named, "agent_seeds": settings.agent_seeds, **options, **used}

    def run(self, observer: StepObserver | None = None) -> list[LaneResult]:
        """Fine-tune every lane for one episode and leave the run folder.

        Raises:
            LeLoRAError: Data or weights that cannot be used, before anything is written; or a lane
                that diverged, and the folder says ``failed``.
            KeyboardInterrupt: Ctrl-C; the folder says ``interrupted`` and has what was reached.
        """
        from lelora_env.export import save_adapter
        from lelora_env.plots import draw_run

        seed, path = self.settings.seed, self.path
        _, info = self.env.reset(seed=seed)
        try:
            with RunFolder(path, config=self.resolved(), matrices=self.base.matrices, lanes=self.settings.lanes,
                           seed=seed) as folder:
                results = self._contest(info, folder, observer)
                folder.write_json("result.json", [asdict(result) for result in results])
                save_adapter(self.env, path)
                self._save_policy(path / "policy.safetensors")
                record = RunRecord(path)
                folder.write_json("learnt.json", learnt(record))
                draw_run(record)
        except KeyboardInterrupt:
            with suppress(Exception):  # without a picture if need be: the interruption is what counts
                if len(RunRecord(path).lanes[-1].ranks):
                    draw_run(RunRecord(path))
            raise
        finally:
            self.env.close()
        return results

    def _contest(self, info: dict[str, Any], folder: RunFolder, observer: StepObserver | None) -> list[LaneResult]:
        """Score, fine-tune, score again."""
        from agents import AgentSpec, run
        from agents.observers import AllocationScalars

        lanes, watched = self.settings.lanes, Watched(self.contestants, self.base.horizon)
        describe = AllocationScalars(AgentSpec.from_env(self.env))
        before = self.base.evaluate("eval")
        for i, lane in enumerate(lanes):
            folder.log(lane, 0, {"L1": float(info["L1"][i]), "eval_score": before[i][self.metric]})

        def on_step(transition: "Transition", scalars: dict[str, float], step: int) -> None:
            log_step(folder, lanes, transition, scalars, step, describe(transition))
            for lane, probabilities in zip(lanes, watched.probabilities, strict=True):
                if probabilities is not None:
                    folder.log_policy(lane, step, probabilities)
            self._check_finite(transition, step)
            if observer is not None:
                observer(step, dict(zip(lanes, transition.info["L1"].tolist(), strict=True)))

        run(self.env, watched, env_steps=self.base.horizon, seed=self.settings.seed, on_step=on_step)
        after = self.base.evaluate("eval")
        tune = self.base.evaluate("tune") if self.base.env_config.tune_size else [{}] * len(lanes)
        traces = RunRecord(folder.path).lanes
        return [_row(trace, self.metric, *scores) for trace, *scores in zip(traces, before, after, tune, strict=True)]


    def _save_policy(self, path: Path) -> None:
        """Keep the agent's network, where it has one: another run can start from it."""
        from agents import AgentSpec
        from agents.files import save_policy

        network = getattr(self.contestants.agents[0], "network", None)
        if network is not None:
            about = {"agent": self.settings.agent, "task": self.settings.task, "model": self.settings.model,
                     "env_steps": self.base.horizon}
            save_policy(network, AgentSpec.from_env(self.env), path, about)

    def _check_finite(self, transition: "Transition", step: int) -> None:
        """Stop the run at the first lane that diverged."""
        diverged = [lane for lane, bad in zip(self.settings.lanes, transition.info["diverged"], strict=True) if bad]
        if diverged:
            clip = self.base.env_config.max_grad_norm
            also = "or set max_grad_norm" if clip is None else f"or max_grad_norm, which is {clip:g}"
            raise LeLoRAError(f"{' and '.join(diverged)} diverged at env step {step}: a loss or a weight is no longer "
                              f"finite. Lower --learning-rate, {also}.")


def make_lanes(settings: TrainSettings) -> Any:
    """The vector environment with a lane for each contestant."""
    from agents import required_options

    demonstration = DEMONSTRATION if settings.task == "docstrings" else {}
    return gym.make_vec(
        "lelora_env:LeLoRA-v0", num_envs=len(settings.lanes), vectorization_mode="vector_entry_point",
        autoreset_mode=gym.vector.AutoresetMode.DISABLED, task=settings.task_spec,
        model=None if settings.model == BUILT_IN else settings.model,
        **{"common_random_numbers": True, **demonstration, **required_options(settings.agent, *settings.controls),
           **settings.options},
    )


def make_contestants(settings: TrainSettings, env: Any) -> SideBySide:
    """The agent and its controls, each for one lane and with a seed of its own."""
    from agents import make_agent

    view, (seed, *seeds) = LaneView(env), settings.agent_seeds
    first = make_agent(settings.agent, view, seed=seed, **settings.agent_options)
    controls = zip(settings.controls, seeds, strict=True)
    return SideBySide([first, *(make_agent(name, view, seed=own) for name, own in controls)])


def log_step(folder: RunFolder, lanes: list[str], transition: "Transition", scalars: dict[str, float],
             step: int, allocation: Mapping[str, np.ndarray]) -> None:
    """Write one env step of every lane.

    Args:
        folder: Where to.
        lanes: Names of the L lanes.
        transition: What happened.
        scalars: What the agents report, as ``<lane index>/<name>``.
        step: Number of the env step, from 1.
        allocation: What was allocated: `agents.observers.AllocationScalars` of the transition, each (L,).
    """
    executed = transition.info.get("executed_rank", [None] * len(lanes))
    numbers = {name: np.asarray(value) for name, value in transition.info.items() if name != "env_step"}
    numbers = {name: value for name, value in numbers.items() if value.ndim == 1 and value.dtype.kind in "biuf"}
    for i, lane in enumerate(lanes):
        own = {f"agent/{name.partition('/')[2]}": value for name, value in scalars.items() if name.startswith(f"{i}/")}
        folder.log_action(lane, step, transition.action[i], executed[i])
        folder.log(lane, step, {"reward": float(transition.reward[i]),
                                **{name: float(value[i]) for name, value in {**allocation, **numbers}.items()}, **own})


def _row(trace: LaneTrace, metric: str, before: dict[str, float], after: dict[str, float],
         tune: dict[str, float]) -> LaneResult:
    losses = trace.series("L1")[1]
    return LaneResult(
        lane=trace.name, metric=metric, eval_before=before[metric], eval_after=after[metric],
        tune_after=tune.get(metric, float("nan")), loss_before=float(losses[0]), loss_after=float(losses[-1]),
        mean_rank=float(trace.ranks.mean()), trained_parameters=float(trace.series("trained_parameters")[1].mean()),
    )
