"""What an agent has to know about an environment before its first action.

Shapes: L lanes · M matrices · R ranks to choose from · S locations to choose from.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv

from agents.agent import AnyEnv, Array
from lelora_env.budget import component_sizes, share_of
from lelora_env.errors import LeLoRAError, UnknownNameError
from lelora_env.matrices import MatrixInfo


@dataclass(frozen=True, eq=False)
class AgentSpec:
    """Names and sizes of what is observed and of what can be chosen.

    Attributes:
        feature_names: The observation's columns, F of them.
        rank_set: The ranks that a rank index stands for, R of them.
        locations: Names of the locations that a location index stands for, S of them.
        rank_mask: Legal ranks of each matrix, (M, R) bool.
        location_mask: Legal locations of each matrix, (M, S) bool.
        index_ranges: Smallest and largest index in the columns ``layer`` and ``type``.
        num_lanes: L.
        observation_space: The single environment's observation space.
        action_space: The single environment's action space.
        device: Where the environment computes, such as ``"cpu"`` or ``"cuda"``.
        component_mask: The bank slots that each choice trains, (M, R, S, K) bool; ``None`` where there is no bank.
        choice_sizes: Parameters that each rank trains, (M, R) int64, heads not counted; ``None`` where not known.
        matrices: What is known of each matrix: name, type, layer, shape; empty where nothing is.
        horizon: Env steps in an episode; ``None`` where the environment does not say.
    """

    feature_names: tuple[str, ...]
    rank_set: tuple[int, ...]
    locations: tuple[str, ...]
    rank_mask: Array = field(repr=False)
    location_mask: Array = field(repr=False)
    index_ranges: dict[str, tuple[int, int]]
    num_lanes: int
    observation_space: spaces.Box = field(repr=False)
    action_space: spaces.MultiDiscrete = field(repr=False)
    device: str = "cpu"
    component_mask: Array | None = field(default=None, repr=False)
    choice_sizes: Array | None = field(default=None, repr=False)
    matrices: tuple[MatrixInfo, ...] = field(default=(), repr=False)
    horizon: int | None = None

    @classmethod
    def from_env(cls, env: AnyEnv) -> "AgentSpec":
        """Read it from a single or a vector environment, wrapped or not.

        Raises:
            LeLoRAError: The environment is not a LeLoRA environment, or its action space does
                not fit its rank set and locations.
        """
        base: Any = env.unwrapped
        observation_space, action_space = _spaces(env)
        missing = [name for name in ("adapter_config", "feature_names", "action_masks") if not hasattr(base, name)]
        own_spaces = isinstance(observation_space, spaces.Box) and isinstance(action_space, spaces.MultiDiscrete)
        if missing or not own_spaces:
            raise LeLoRAError(f"{env} is not a LeLoRA environment (lacks {', '.join(missing) or 'its spaces'}): make "
                              "one with gym.make or gym.make_vec of 'LeLoRA-v0', and leave its spaces alone")
        config = base.adapter_config
        num_ranks, num_locations = len(config.rank_set), len(config.locations)
        num_matrices = int(observation_space.shape[0])
        if action_space.nvec.tolist() != [num_ranks, num_locations] * num_matrices:
            raise LeLoRAError(f"the action space must be MultiDiscrete([{num_ranks}, {num_locations}] * {num_matrices})"
                              f" (got {action_space}); do not wrap the environment's actions")
        masks = np.asarray(base.action_masks(), dtype=bool).reshape(-1, num_matrices, num_ranks + num_locations)[0]
        names = tuple(base.feature_names)
        columns = {name: names.index(name) for name in ("layer", "type") if name in names}
        low, high = observation_space.low, observation_space.high  # (M, F)
        ranges = {name: (int(low[:, i].min()), int(high[:, i].max())) for name, i in columns.items()}
        return cls(names, tuple(config.rank_set), tuple(config.location_names), masks[:, :num_ranks],
                   masks[:, num_ranks:], ranges,
                   env.num_envs if isinstance(env, VectorEnv) else int(getattr(env, "num_lanes", 1)),
                   observation_space, action_space, str(getattr(base, "device", "cpu")), *_bank(base),
                   tuple(getattr(base, "matrices", ())), getattr(base, "horizon", None))

    @property
    def num_matrices(self) -> int:
        """M."""
        return len(self.rank_mask)

    def location_name(self, location: str | float) -> str:
        """The name of a location that is given by name or by its fraction of the spectrum.

        Raises:
            UnknownNameError: No such location.
            LeLoRAError: Neither a name nor a number.
        """
        if not isinstance(location, str | float | int):
            raise LeLoRAError(f"location must be a name or a fraction of the spectrum (got {location!r})")
        name = location if isinstance(location, str) else f"at_{location:g}"
        if name not in self.locations:
            raise UnknownNameError("location", str(location), self.locations)
        return name

    def choice(self, matrix: int, rank: int, location: str | float) -> tuple[int, int]:
        """The (rank index, location index) of a choice for one matrix.

        Args:
            matrix: Index of the matrix.
            rank: A rank of the rank set (not its index).
            location: A location's name, or its fraction of the spectrum.

        Raises:
            LeLoRAError: The rank is not in the rank set, or is above this matrix.
            UnknownNameError: No such location.
        """
        name = self.location_name(location)
        if rank not in self.rank_set:
            raise LeLoRAError(f"rank must be one of the environment's rank set {self.rank_set} (got {rank})")
        index, place = self.rank_set.index(rank), self.locations.index(name)
        if not (self.rank_mask[matrix, index] and self.location_mask[matrix, place]):
            legal = [r for r, ok in zip(self.rank_set, self.rank_mask[matrix], strict=True) if ok]
            raise LeLoRAError(f"rank {rank} at {name!r} is not legal for matrix {matrix}; its legal ranks are {legal}")
        return index, place

    @property
    def legal(self) -> Array:
        """Legal choices, (M, R, S) bool."""
        both: Array = self.rank_mask[:, :, None] & self.location_mask[:, None, :]
        return both

    def sizes(self) -> Array:
        """Parameters that each rank trains, (M, R) int64.

        Raises:
            LeLoRAError: The environment does not say.
        """
        if self.choice_sizes is None:
            raise LeLoRAError("this agent needs to know how many parameters a choice trains, which this environment "
                              "does not say: use it on LeLoRA-v0")
        return self.choice_sizes

    def trained_parameters(self, action: Array) -> int:
        """Parameters that one flat action (2M,) trains, heads not counted."""
        return int(self.sizes()[np.arange(self.num_matrices), action.reshape(-1, 2)[:, 0]].sum())

    def limit(self, budget: float) -> int:
        """A budget as a number of parameters.

        Args:
            budget: Share of what the largest ranks everywhere train, in (0, 1], as ``EnvConfig.parameter_budget``.

        Raises:
            LeLoRAError: Not such a share, or even the smallest ranks exceed it.
        """
        sizes = self.sizes()
        if not 0 < budget <= 1:
            raise LeLoRAError(f"budget must be in (0, 1], a share of what the largest ranks train (got {budget!r})")
        least = max(int(sizes[:, 0].sum()), int(sizes[sizes > 0].min()))
        limit = share_of(budget, int(sizes[:, -1].sum()))
        if limit < least:
            raise LeLoRAError(f"the budget of {limit} parameters is below the least that can train, {least}: raise "
                              "budget, or give rank_set a smaller rank")
        return limit

    def fingerprint(self) -> dict[str, Any]:
        """What a saved policy must agree with, as plain values."""
        return {"feature_names": list(self.feature_names), "rank_set": list(self.rank_set),
                "locations": list(self.locations)}

    def check_fingerprint(self, saved: dict[str, Any]) -> None:
        """Refuse a state that was saved for other features or actions.

        Raises:
            LeLoRAError: They differ; the message says in what.
        """
        for name, here in self.fingerprint().items():
            if saved.get(name) != here:
                raise LeLoRAError(f"this agent state was saved for {name} = {saved.get(name)!r}, but the environment "
                                  f"has {here!r}; make the environment with the same options as then")


def one_hot(action: Array, spec: AgentSpec) -> Array:
    """Actions (L, 2M) as probabilities of all choices, (L, M, R, S) float32."""
    pairs = action.reshape(len(action), spec.num_matrices, 2)
    result = np.zeros((*pairs.shape[:2], len(spec.rank_set), len(spec.locations)), dtype=np.float32)
    np.put_along_axis(result.reshape(*pairs.shape[:2], -1),
                      (pairs[..., :1] * len(spec.locations) + pairs[..., 1:]), 1.0, axis=2)
    return result


def _bank(base: Any) -> tuple[Array | None, Array | None]:
    """What each choice trains: its slots of the bank, and its number of parameters."""
    if not hasattr(base, "table") or not hasattr(base, "matrices"):
        return None, None
    sizes = component_sizes(list(base.matrices), base.adapter_config).numpy()
    return base.table.mask.numpy(), base.table.ranks.numpy() * sizes[:, None]


def _spaces(env: AnyEnv) -> tuple[Any, Any]:
    """Observation and action space of the single environment."""
    if isinstance(env, VectorEnv):
        return env.single_observation_space, env.single_action_space
    return env.observation_space, env.action_space
