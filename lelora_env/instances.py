"""Named, frozen instances: model x task x seed x horizon x rank grid, with a train/test split.

``gym.make("LeLoRA-v0", instance="planted-free/test-0")`` asks for one; `CycleInstances` goes
through several, so that a policy can be tested on instances it was not trained on. An instance never
changes once released; a changed one gets a new name.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import gymnasium as gym
import numpy as np

from lelora_env.errors import LeLoRAError, UnknownNameError
from lelora_env.tasks.planted import PlantedTask

Split = Literal["train", "test"]

FREE_OPTIONS = frozenset({"device", "dtype", "spectrum", "raw_observation", "extra_features", "component_info",
                          "common_random_numbers", "cuda_graphs"})
"""Options that may be given beside an instance: they change the view or the machine, not the problem."""


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One problem to allocate for.

    Attributes:
        name: ``family/split-number``.
        split: Whether policies may be trained on it.
        seed: Seed of a run that is started without one; of a planted instance, also of its teacher.
        model: As in ``gym.make``; ``None`` = the task's own.
        task: Task name, or ``None`` for a planted task made of `planted`.
        planted: Arguments of `PlantedTask`.
        options: Environment options.
    """

    name: str
    split: Split
    seed: int
    model: str | None = None
    task: str | None = None
    planted: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """The name without split and number; instances of a family have the same spaces."""
        return self.name.partition("/")[0]


# Prices: under `planted-priced` a component costs more in an env step than it earns in that step, and pays over the
# rest of the run, so its optimum is that of the return; under `planted-charged` a needed component costs about half
# of what it earns in an average step, so an agent that looks at one reward at a time (γ = 0) has the same optimum.
_PLANTED: dict[str, dict[str, Any]] = {
    "planted-free": {"plan": "by_type_and_depth"},
    "planted-priced": {"plan": "by_type_and_depth", "ranks": (4, 8), "rank_cost": 1.0},
    "planted-charged": {"plan": "by_type_and_depth", "ranks": (4, 8), "rank_cost": 0.15},
    "planted-type": {"plan": "by_type"},
    "planted-deep": {"plan": "by_type_and_depth", "layers": 12, "width": 64},
}
_DOCSTRINGS: dict[str, Any] = {
    "target_modules": "query,value",
    "rank_set": (0, 2, 4, 8),
    "parametrisation": "unit",
    "horizon": 100,
    "learning_rate": 1e-3,
}


def _make_all() -> dict[str, Instance]:
    places: list[tuple[Split, int, int]] = [
        *(("train", i, 100 + i) for i in range(4)),
        *(("test", i, 200 + i) for i in range(2)),
    ]
    found = [
        Instance(name=f"{family}/{split}-{i}", split=split, seed=seed, planted={**arguments, "seed": seed})
        for family, arguments in _PLANTED.items()
        for split, i, seed in places
    ]
    found += [
        Instance(name=f"docstrings-minilm/{split}-{i}", split=split, seed=seed, model="minilm", task="docstrings",
                 options={**_DOCSTRINGS, "split_seed": seed})
        for split, i, seed in places
    ]
    return {instance.name: instance for instance in found}


INSTANCES: dict[str, Instance] = _make_all()
"""All instances by name."""


def list_instances(family: str | None = None, split: Split | None = None) -> list[str]:
    """Names of the instances of a family and split; ``None`` = all.

    Raises:
        UnknownNameError: A family nobody knows.
    """
    families = {instance.family for instance in INSTANCES.values()}
    if family is not None and family not in families:
        raise UnknownNameError("instance family", family, families)
    return [
        name
        for name, instance in INSTANCES.items()
        if family in (None, instance.family) and split in (None, instance.split)
    ]


def find_instance(name: str) -> Instance:
    """The instance called `name`.

    Raises:
        UnknownNameError: There is none.
    """
    if name not in INSTANCES:
        raise UnknownNameError("instance", name, INSTANCES, "lelora_env.instances.list_instances() names them all.")
    return INSTANCES[name]


def resolve_instance(
    name: str, model: Any, task: Any, options: dict[str, Any]
) -> tuple[Any, Any, dict[str, Any], int]:
    """The model, task, options and first seed that an instance stands for.

    Raises:
        LeLoRAError: Arguments that would change what the instance fixes.
    """
    instance = find_instance(name)
    clash = sorted(set(options) - FREE_OPTIONS) + ["model"] * (model is not None) + ["task"] * (task is not None)
    if clash:
        raise LeLoRAError(f"the instance {name!r} fixes the problem, so {', '.join(clash)} cannot be given beside it. "
                          f"Leave it out, or spell the problem out without instance= . Free: {sorted(FREE_OPTIONS)}.")
    made = PlantedTask(**instance.planted) if instance.planted else instance.task
    return instance.model, made, {**instance.options, **options}, instance.seed


class CycleInstances(gym.Wrapper[np.ndarray, np.ndarray, np.ndarray, np.ndarray]):
    """Goes on to the next instance at every ``reset``; all of them must have the same spaces."""

    def __init__(self, env: gym.Env[np.ndarray, np.ndarray], names: Sequence[str], **options: Any) -> None:
        """Wrap an environment of the same family; its first ``reset`` starts ``names[0]``.

        Args:
            env: An environment made with one of the instances; it fixes the spaces.
            names: Instances to go through, in this order, again and again.
            **options: Further options for every instance (see ``FREE_OPTIONS``).

        Raises:
            LeLoRAError: No names.
            UnknownNameError: A name that no instance has.
        """
        super().__init__(env)
        if not names:
            raise LeLoRAError("CycleInstances needs at least one instance name; see list_instances().")
        for name in names:
            find_instance(name)
        self.names = tuple(names)
        self.options = options
        self.position = -1
        self._envs: dict[str, gym.Env[np.ndarray, np.ndarray]] = {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode on the next instance.

        Raises:
            LeLoRAError: The instance's spaces differ from the first one's.
        """
        self.position = (self.position + 1) % len(self.names)
        name = self.names[self.position]
        if name not in self._envs:
            self._envs[name] = gym.make("LeLoRA-v0", instance=name, **self.options)
        env = self._envs[name]
        if env.observation_space != self.observation_space or env.action_space != self.action_space:
            raise LeLoRAError(f"the instance {name!r} has other spaces than the wrapped environment; cycle through one "
                              "family at a time (list_instances(family)).")
        self.env = env
        return env.reset(seed=seed, options=options)

    def close(self) -> None:
        """Close every instance that was made."""
        for env in self._envs.values():
            env.close()
        super().close()
