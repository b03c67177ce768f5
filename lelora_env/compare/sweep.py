"""What is compared: methods x problems x seeds, as data that is complete and checked at birth.

A *problem* is a model, a task and how it is trained; a *method* is an agent with its options. One seed is one
independent run: its own data order, head start and agent. Runs of one problem with the same seed see the same rows in
the same order, whatever the method.
"""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from lelora_env.errors import LeLoRAError, UnknownNameError

RESERVED = ("num_envs", "vectorization_mode", "autoreset_mode", "max_episode_steps", "common_random_numbers",
            "instance", "model", "task")
"""What a sweep sets itself, or what has a place of its own."""

OF_PROBLEM = ("horizon", "steps_per_action", "batch_size", "accumulate", "reward_size", "tune_size", "split_seed")
"""Options that decide what is compared on: a method must not change them."""

PRESETS = Path(__file__).parent / "presets"
ORACLE = "oracle"
"""An agent that knows the best allocation; for problems that have a known one."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """Who allocates.

    Attributes:
        name: Its name in tables.
        agent: A name in ``agents.AGENT_NAMES``, or ``"oracle"``.
        agent_options: Options of the agent.
        options: Options of the environment that belong to the method, such as the parametrisation.
    """

    name: str
    agent: str
    agent_options: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_names("method", name=self.name, agent=self.agent)
        _check_tables(f"method {self.name!r}", agent_options=self.agent_options, options=self.options)
        for name in self.options:
            if name in OF_PROBLEM:
                raise LeLoRAError(f"method {self.name!r}: {name} belongs to the problem, where it is the same for all")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is fine-tuned, and how.

    Attributes:
        name: Its name in tables.
        instance: Id of a named instance, instead of model, task and options.
        model: As in ``gym.make``; ``None`` = the task's own.
        task: Name of a task.
        task_options: Options of the task.
        options: Options of the environment.
    """

    name: str
    instance: str | None = None
    model: str | None = None
    task: str | None = None
    task_options: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = {"instance": self.instance, "model": self.model, "task": self.task}
        _check_names("problem", name=self.name, **{key: value for key, value in named.items() if value is not None})
        _check_tables(f"problem {self.name!r}", task_options=self.task_options, options=self.options)
        if self.instance is not None and (self.model or self.task or self.task_options):
            raise LeLoRAError(f"problem {self.name!r}: an instance brings its own model and task; leave them out")
        if self.instance is None and self.task is None:
            raise LeLoRAError(f"problem {self.name!r} needs a task, or an instance")


@dataclass(frozen=True)
class Run:
    """One fine-tuning run of a sweep."""

    method: Method
    problem: Problem
    seed: int
    options: Mapping[str, Any]

    @property
    def environment(self) -> dict[str, Any]:
        """Every argument of the environment that the run needs; runs with the same ones can share it."""
        problem = self.problem
        task = {"name": problem.task, **problem.task_options} if problem.task_options else problem.task
        named = {"instance": problem.instance, "model": problem.model, "task": task}
        return {**{name: value for name, value in named.items() if value is not None}, **self.options,
                **problem.options, **self.method.options}

    @property
    def key(self) -> str:
        """A hash of what the sweep says of the run: what was run before is found by it.

        Versions, data files and models are not in it (records name versions and commit): after an update of those,
        begin a new folder.
        """
        told = [self.environment, self.method.name, self.method.agent, dict(self.method.agent_options),
                self.problem.name, self.seed]
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:20]

    @property
    def agent_seed(self) -> int:
        """The agent's own seed, in [0, 2^32): the same only for the same method, problem and seed."""
        place = int.from_bytes(hashlib.sha256(f"{self.method.name}\n{self.problem.name}".encode()).digest()[:6], "big")
        return int(np.random.SeedSequence((self.seed, place)).generate_state(1)[0])


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Methods x problems x seeds.

    Attributes:
        name: Its name.
        methods: Who is compared; names differ.
        problems: On what; names differ.
        seeds: Non-negative, without repeats.
        options: Options of the environment for all problems.
        reference: Name of the method that the others are compared with; default: the first.
    """

    name: str
    methods: tuple[Method, ...]
    problems: tuple[Problem, ...]
    seeds: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    reference: str = ""

    def __post_init__(self) -> None:
        _check_names("sweep", name=self.name)
        _check_tables("sweep", options=self.options)
        for kind, named in (("method", self.methods), ("problem", self.problems)):
            names = [one.name for one in named]
            if not names or len(set(names)) != len(names):
                raise LeLoRAError(f"a sweep needs at least one {kind}, and names that differ (got {names})")
        whole = all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in self.seeds)
        if not self.seeds or not whole or len(set(self.seeds)) != len(self.seeds):
            raise LeLoRAError(f"seeds must be integers of at least 0 without repeats, at least one (got {self.seeds})")
        if not self.reference:
            object.__setattr__(self, "reference", self.methods[0].name)
        if self.reference not in [method.name for method in self.methods]:
            raise UnknownNameError("reference method", self.reference, [method.name for method in self.methods])

    def runs(self) -> list[Run]:
        """Every run, problem by problem."""
        return [Run(method, problem, seed, self.options) for problem in self.problems for method in self.methods
                for seed in self.seeds]


def _check_names(kind: str, **names: Any) -> None:
    for name, value in names.items():
        if not isinstance(value, str) or not value.strip() or "|" in value or not value.isprintable():
            raise LeLoRAError(f"{name} of a {kind} must be a printable text without '|' (got {value!r})")


def _check_tables(where: str, **tables: Any) -> None:
    for name, value in tables.items():
        if not isinstance(value, Mapping):
            raise LeLoRAError(f"{where}: {name} must be a table, such as {{ horizon = 100 }} (got {value!r})")
        for option in value if name == "options" else ():
            if option in RESERVED:
                raise LeLoRAError(f"{where}: {option} cannot be an option; the sweep sets it, or it has an entry of "
                                  "its own")


def load_sweep(source: str | Path) -> Sweep:
    """Read a sweep from a TOML file, or a preset by name.

    Raises:
        LeLoRAError: No such file, not TOML, or an entry that does not belong there.
        UnknownNameError: No such preset.
    """
    path = Path(source)
    if path.suffix != ".toml":
        known = sorted(preset.stem for preset in PRESETS.glob("*.toml"))
        if str(source) not in known:
            raise UnknownNameError("preset", str(source), known, "A file of your own must end in .toml.")
        path = PRESETS / f"{source}.toml"
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LeLoRAError(f"cannot read {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise LeLoRAError(f"{path} is not a TOML file: {error}") from error
    seeds = told.pop("seeds", 5)
    entries = {"name": path.stem, **told}
    counted = isinstance(seeds, int) and not isinstance(seeds, bool) and seeds > 0
    entries["seeds"] = tuple(range(seeds) if counted else _list(seeds, "seeds (unless they are a number above 0)"))
    for kind, made in (("methods", Method), ("problems", Problem)):
        entries[kind] = tuple(_make(made, entry, kind) for entry in _list(told.get(kind, []), kind))
    return _make(Sweep, entries, "sweep")  # type: ignore[no-any-return]


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise LeLoRAError(f"{name} must be a list (got {value!r})")
    return value


def _make(made: type, entry: Any, kind: str) -> Any:
    if not isinstance(entry, dict):
        raise LeLoRAError(f"{kind} must be a list of tables, written [[{kind}]] (got {entry!r})")
    known = [one.name for one in fields(made)]
    for name in entry:
        if name not in known:
            raise UnknownNameError(f"entry of {kind}", name, known)
    try:
        return made(**entry)
    except TypeError as error:
        missing = [one for one in ("name", "agent") if one in known and one not in entry]
        raise LeLoRAError(f"an entry of {kind} lacks {', '.join(missing) or 'something'}: {error}") from None
