"""Environments without a model: the spaces and infos of `LeLoRA-v0` around a loss that is a formula.

For tests and comparisons of agents, where a run of the real environment would take minutes: a step takes about a tenth
of a millisecond. `SyntheticVectorEnv` is everything but the loss; `lelora_env.drift` and `lelora_env.surrogate` say
what that is.

Shapes: L lanes · M matrices · F features · R ranks · S locations.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor

from lelora_env.accounting import LaneClocks
from lelora_env.allocation import action_masks, build_choice_table, decode_action
from lelora_env.arguments import checked_mode, lane_seeds, reset_mask
from lelora_env.budget import Budget, build_budget, component_sizes, project
from lelora_env.config import ADAPTER_FIELDS, ENV_FIELDS, AdapterConfig, EnvConfig, split_options
from lelora_env.errors import ActionError, DataError, LeLoRAError, NotReadyError, UnknownNameError
from lelora_env.features import LOG_RANGE, feature_table, spectrum_points
from lelora_env.infos import Infos, add, first, split
from lelora_env.keys import hashed_key
from lelora_env.matrices import MATRIX_TYPES, MatrixInfo
from lelora_env.reward import reward_parts

# ---------------------------------------------------------------------- numbers with an address, for all lanes at once

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mixed(*keys: Any) -> np.ndarray:
    """One uint64 for each combination of keys: integer arrays that broadcast against one another.

    The finaliser of SplitMix64 (Steele, Lea and Flood 2014), applied once for every key.
    """
    state: Any = np.uint64(len(keys))
    with np.errstate(over="ignore"):
        for key in keys:
            state = (np.asarray(key).astype(np.uint64) ^ state) + _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


def keyed_normal(*keys: Any) -> np.ndarray:
    """Standard normal numbers as a pure function of integer keys, which broadcast; float64.

    Of one address the number is always the same, whatever else is drawn; of different addresses the numbers are
    independent for all that matters here (Box-Muller over the two halves of `mixed`; up to 6.6 in size).
    """
    bits = mixed(*keys)
    one, two = (bits >> np.uint64(32)) * 2.0**-32, (bits & np.uint64(0xFFFFFFFF)) * 2.0**-32
    normal: np.ndarray = np.sqrt(-2 * np.log1p(-one)) * np.cos(2 * np.pi * two)
    return normal


# ---------------------------------------------------------------------- what there is to see


def feature_rows(matrices: Sequence[MatrixInfo], spectra: Sequence[np.ndarray], points: int) -> np.ndarray:
    """The scaled observation of untrained matrices with the given singular values, (M, F) float32, at progress 0.

    The columns ``layer``, ``type``, ``norm``, ``sv_0`` .. and ``progress`` of `lelora_env.LeLoRAEnv`, by the formulas
    given there.

    Args:
        matrices: M matrices.
        spectra: Of each matrix its singular values, descending, (min(out, in),).
        points: Singular values in a row, at least 2.

    Raises:
        DataError: A spectrum's length is not that of its matrix.
    """
    for matrix, spectrum in zip(matrices, spectra, strict=True):
        size = min(matrix.out_features, matrix.in_features)
        if np.shape(spectrum) != (size,):
            raise DataError(f"the matrix {matrix.name!r} has {size} singular values, but its spectrum has the shape "
                            f"{np.shape(spectrum)}; give all of them, descending.")
    rows = np.stack([_row(*pair, points) for pair in zip(matrices, spectra, strict=True)])
    return rows.astype(np.float32)


def _row(matrix: MatrixInfo, spectrum: np.ndarray, points: int) -> np.ndarray:
    rms = np.sqrt(np.mean(np.square(spectrum, dtype=np.float64)))

    def scaled(x: np.ndarray) -> np.ndarray:
        return np.asarray(np.clip(np.log(np.maximum(x, 1e-30)), -LOG_RANGE, LOG_RANGE) / 4)

    place = np.linspace(0, 1, points) * (len(spectrum) - 1)
    values = np.interp(place, np.arange(len(spectrum)), scaled(spectrum / rms))
    return np.array([matrix.layer, MATRIX_TYPES.index(matrix.type), scaled(rms), *values, 0.0])


def chosen_options(options: dict[str, Any], allowed: Sequence[str],
                   defaults: dict[str, Any]) -> tuple[AdapterConfig, EnvConfig]:
    """Both configs from keyword options of which only some mean anything where nothing is trained.

    Raises:
        UnknownNameError: An option that is not allowed.
    """
    for name in options:
        if name not in allowed:
            real = name in ADAPTER_FIELDS or name in ENV_FIELDS
            raise UnknownNameError("option", name, allowed, "It is an option of LeLoRA-v0 that changes nothing here: "
                                   "leave it out." if real else "")
    return split_options({**defaults, **options})


# ---------------------------------------------------------------------- the environments


class SyntheticVectorEnv(gym.vector.VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """L lanes in which nothing is trained: a subclass says what the loss is, everything else is as in `LeLoRA-v0`.

    Observation: the given rows, the same in every step but for ``progress``. Action, reward -(L1 + α·L2), autoreset
    modes and seeds: those of `lelora_env.LeLoRAVectorEnv`. Infos of a step: ``L1``, ``L2``, ``trained_parameters``,
    ``trained_fraction``, ``mean_rank``, ``diverged`` (never), the parts of the reward, ``env_step`` and
    ``optimiser_steps``, and with ``parameter_budget`` ``executed_rank`` and ``projected``; of a reset: ``L1``,
    ``env_step``, ``optimiser_steps``.

    A subclass defines `start_losses` and `step_losses`; what is random in them is drawn with `keyed_normal` from
    ``clocks.seeds``, ``clocks.episodes`` and ``clocks.env_steps``.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012
    single_action_space: gym.spaces.MultiDiscrete
    device = "cpu"

    def __init__(
        self,
        num_envs: int,
        matrices: Sequence[MatrixInfo],
        rows: np.ndarray,
        adapter_config: AdapterConfig,
        env_config: EnvConfig,
        *,
        max_episode_steps: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
    ) -> None:
        """Put the spaces and tables up.

        Args:
            num_envs: L, at least 1.
            matrices: M matrices.
            rows: (M, F) scaled observation rows, see `feature_rows`.
            adapter_config: The choices on offer.
            env_config: Horizon, α, price, budget and spectrum points; what concerns training is only recorded.
            max_episode_steps: Outside limit that truncates.
            autoreset_mode: What happens to finished lanes: next step, same step, or disabled.
            render_mode: Must be ``None``.

        Raises:
            LeLoRAError: A number of lanes or steps below 1, or a render mode.
            DataError: `rows` do not fit the matrices and the config.
        """
        for name, number in (("num_envs", num_envs), ("max_episode_steps", max_episode_steps)):
            if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
                raise LeLoRAError(f"{name} must be an integer of at least 1 (got {number!r})")
        if render_mode is not None:
            raise LeLoRAError(f"render_mode must be None (got {render_mode!r}); this environment does not render.")
        self.num_envs, self.max_episode_steps, self.render_mode = num_envs, max_episode_steps, None
        self.autoreset_mode = checked_mode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.adapter_config, self.env_config = adapter_config, env_config
        self.matrices = list(matrices)
        self.table = build_choice_table([min(m.out_features, m.in_features) for m in self.matrices], adapter_config)
        self._make_spaces(rows)
        sizes = component_sizes(self.matrices, adapter_config)
        share = env_config.parameter_budget
        self._budget = None if share is None else build_budget(share, self.table, sizes)
        self._choice_ranks = self.table.ranks.numpy()  # (M, R)
        self._choice_sizes = self._choice_ranks * sizes.numpy()[:, None]
        self.adaptable = float(sum(m.out_features * m.in_features for m in self.matrices))
        self._index = np.arange(len(self.matrices))
        self.clocks = LaneClocks(num_envs)
        self._started = False

    def _make_spaces(self, rows: np.ndarray) -> None:
        features = feature_table(self.matrices, self.env_config, spectrum_points(self.matrices, self.env_config))
        self.feature_names = tuple(f.name for f in features)
        shape = (len(self.matrices), len(features))
        low, high = (np.tile(np.array(bound, dtype=np.float32), (shape[0], 1))
                     for bound in ([f.low for f in features], [f.high for f in features]))
        self.single_observation_space = gym.spaces.Box(low, high, dtype=np.float32)
        rows = np.asarray(rows, dtype=np.float32)
        if rows.shape != shape or not self.single_observation_space.contains(rows):
            raise DataError(f"the observation rows must have the shape {shape} and lie in the bounds of the columns "
                            f"{self.feature_names} (got {rows.shape}); make them with feature_rows().")
        self._rows = np.tile(rows, (self.num_envs, 1, 1))
        self._progress = self.feature_names.index("progress")
        self.single_action_space = gym.spaces.MultiDiscrete(self.table.nvec)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    # ------------------------------------------------------------------ what a subclass defines

    def start_losses(self, starting: np.ndarray) -> np.ndarray:
        """L1 at the start of an episode.

        Args:
            starting: (L,) bool: lanes that start now; their clocks show the new episode at env step 0. State that a
                subclass keeps for each lane is set up for these.

        Returns:
            (L,) losses, of which only those of the starting lanes are used.
        """
        raise NotImplementedError

    def step_losses(self, rank_index: np.ndarray, location_index: np.ndarray, running: np.ndarray) -> np.ndarray:
        """L1 after an env step.

        Args:
            rank_index: (L, M) indices into the rank set.
            location_index: (L, M) indices into the locations.
            running: (L,) bool: lanes that take the step; ``clocks.env_steps`` counts it already.

        Returns:
            (L,) losses, finite, of which only those of the running lanes are used.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------ what does not change

    @property
    def num_matrices(self) -> int:
        """M."""
        return len(self.matrices)

    @property
    def horizon(self) -> int:
        """Env steps in an episode."""
        return self.env_config.horizon

    @property
    def seeded(self) -> bool:
        """Whether lane 0 has a seed: ``reset`` without one then moves on to the next episode."""
        return bool(self.clocks.seeds[0] >= 0)

    def action_masks(self) -> np.ndarray:
        """Legal entries of every lane's action, bool (L, M·(R+S))."""
        return np.tile(action_masks(self.table), (self.num_envs, 1))

    # ------------------------------------------------------------------ reset and step

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, Infos]:
        """Start a new episode in all lanes, or in those of ``options["reset_mask"]``; as `LeLoRAVectorEnv.reset`.

        Raises:
            LeLoRAError: A list of seeds with ``common_random_numbers``, or a mask that does not fit.
        """
        shared = self.env_config.common_random_numbers
        seeds = lane_seeds(seed, self.num_envs, shared)
        mask = reset_mask(options, self.num_envs)
        if isinstance(seed, int | np.integer):
            super().reset(seed=int(seed))
        given = np.array([-1 if one is None else one for one in seeds], dtype=np.int64)
        unseeded = mask & (given < 0) & (self.clocks.seeds < 0)
        if unseeded.any():
            known = self.clocks.seeds[self.clocks.seeds >= 0]
            base = int(known[0]) if shared and len(known) else int(self.np_random.integers(2**31))
            given = np.where(unseeded, base + (0 if shared else 1) * np.arange(self.num_envs), given)
        self._started = True
        self._start(mask, given)
        infos: Infos = {}
        self._add_clocks(infos, mask)
        return self._observe(), infos

    def _start(self, mask: np.ndarray, seeds: np.ndarray) -> None:
        """Start an episode in the lanes of `mask`: the first of a seed where `seeds` is not -1, else the next."""
        clocks, new = self.clocks, mask & (seeds >= 0)
        clocks.episodes = np.where(new, 0, clocks.episodes + mask)
        clocks.seeds = np.where(new, seeds, clocks.seeds)
        clocks.env_steps = np.where(mask, 0, clocks.env_steps)
        clocks.finished = clocks.finished & ~mask
        clocks.losses = np.where(mask, self.start_losses(mask), clocks.losses)

    def _observe(self) -> np.ndarray:
        observation = self._rows.copy()
        observation[..., self._progress] = (self.clocks.env_steps / self.horizon)[:, None]
        return observation

    def _add_clocks(self, infos: Infos, mask: np.ndarray) -> None:
        add(infos, "L1", self.clocks.losses, mask)
        add(infos, "env_step", self.clocks.env_steps, mask)
        add(infos, "optimiser_steps", self.clocks.env_steps * self.env_config.steps_per_action, mask)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Infos]:
        """Take one env step in every running lane; as `LeLoRAVectorEnv.step`.

        Args:
            actions: (L, 2M) integers. A lane that this step merely resets ignores its action.

        Returns:
            Observations (L, M, F), rewards (L,) float64, terminated (L,), truncated (L,), infos.

        Raises:
            NotReadyError: Before ``reset``, or for a finished lane with autoreset disabled.
            ActionError: Wrong shape, type or range; nothing has changed.
        """
        if not self._started:
            raise NotReadyError("the environment has not been started: call reset() first.")
        clocks, resetting = self.clocks, self.clocks.finished.copy()
        if resetting.any() and np.shape(actions) == self.action_space.shape:
            actions = np.where(resetting[:, None], 0, actions)
        allocation = decode_action(actions, self.num_envs, self.table)
        if resetting.any():
            self._start_finished(resetting)
        running = ~resetting
        before = clocks.losses
        chosen, location_index = allocation.rank_index.numpy(), allocation.location_index.numpy()
        rank_index = chosen if self._budget is None else self._within(self._budget, allocation.rank_index)
        clocks.env_steps = clocks.env_steps + running
        clocks.losses = np.where(running, self.step_losses(rank_index, location_index, running), before)
        infos, rewards = self._account(rank_index, before, running)
        if self._budget is not None:
            add(infos, "executed_rank", self._choice_ranks[self._index, rank_index], running)
            add(infos, "projected", (rank_index < chosen).sum(1), running)
        self._add_clocks(infos, np.ones_like(running))
        terminated = running & (clocks.env_steps >= self.horizon)
        limit = self.max_episode_steps
        truncated = running & ~terminated & (limit is not None and clocks.env_steps >= limit)
        clocks.finished = terminated | truncated
        observations = self._observe()
        if self.autoreset_mode == AutoresetMode.SAME_STEP and clocks.finished.any():
            observations, infos = self._reset_in_place(observations, infos)
        return observations, rewards, terminated, truncated, infos

    def _start_finished(self, resetting: np.ndarray) -> None:
        if self.autoreset_mode != AutoresetMode.NEXT_STEP:
            raise NotReadyError(f"lanes {np.flatnonzero(resetting).tolist()} have finished their episode: call "
                                "reset(options={'reset_mask': ...}) before stepping them.")
        self._start(resetting, np.full(self.num_envs, -1))

    def _within(self, budget: Budget, rank_index: Tensor) -> np.ndarray:
        """The ranks that the budget allows of a choice, as indices (L, M); as in `LeLoRAVectorEnv`."""
        clocks = self.clocks
        keys = hashed_key(*map(torch.from_numpy, (clocks.seeds, clocks.episodes, clocks.env_steps)))
        return np.asarray(project(rank_index, budget, keys))

    def _account(self, rank_index: np.ndarray, before: np.ndarray, running: np.ndarray) -> tuple[Infos, np.ndarray]:
        """Infos and rewards (L,) of a step; 0 for lanes that did not take it."""
        trained = self._choice_sizes[self._index, rank_index].sum(1).astype(np.float64)
        losses, config = self.clocks.losses, self.env_config
        parts = reward_parts(losses, before, trained / self.adaptable, config.alpha, config.rank_cost)
        values = {
            "L2": losses - before,
            "trained_parameters": trained,
            "trained_fraction": trained / self.adaptable,
            "mean_rank": self._choice_ranks[self._index, rank_index].mean(1),
            "diverged": np.zeros(self.num_envs, dtype=bool),
            **parts,
        }
        infos: Infos = {}
        for key, value in values.items():
            add(infos, key, value, running)
        return infos, np.where(running, sum(parts.values(), np.zeros(self.num_envs)), 0.0)

    def _reset_in_place(self, observations: np.ndarray, infos: Infos) -> tuple[np.ndarray, Infos]:
        """SAME_STEP: hand out the last observation and info of finished lanes, then start them anew."""
        done = self.clocks.finished.copy()
        final_obs = np.full(self.num_envs, None, dtype=object)
        for lane in np.flatnonzero(done):
            final_obs[lane] = observations[lane]
        kept, final = split(infos, done)
        self._start(done, np.full(self.num_envs, -1))
        self._add_clocks(kept, np.ones_like(done))
        add(kept, "final_obs", final_obs, done)
        kept["final_info"], kept["_final_info"] = final, done
        return self._observe(), kept


class SyntheticEnv(gym.Env[np.ndarray, np.ndarray]):
    """The one-lane view of a `SyntheticVectorEnv`, as `lelora_env.LeLoRAEnv` is of the real one."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}  # type: ignore[misc]

    def __init__(self, lanes: SyntheticVectorEnv) -> None:
        """View lane 0.

        Args:
            lanes: One lane, with autoreset disabled.
        """
        self.lanes = lanes
        self.render_mode = None
        self.observation_space = lanes.single_observation_space
        self.action_space = lanes.single_action_space

    def __getattr__(self, name: str) -> Any:
        """What an environment is made of comes from the lanes."""
        if name not in _SHARED:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.lanes, name)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode; returns the observation (M, F) and info."""
        super().reset(seed=seed)
        if seed is None and not self.lanes.seeded:
            seed = int(self.np_random.integers(2**31))
        observation, infos = self.lanes.reset(seed=seed)
        return observation[0], first(infos)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take one env step.

        Args:
            action: (2M,) integers.

        Raises:
            NotReadyError: Before ``reset`` or after the end of the episode.
            ActionError: Wrong shape, type or range; nothing has changed.
        """
        flat = np.asarray(action)
        if flat.shape != self.action_space.shape:
            raise ActionError(f"an action must have shape {self.action_space.shape}: rank index and location index of "
                              f"each of the {self.lanes.num_matrices} matrices, interleaved; got {flat.shape}.")
        observation, reward, terminated, truncated, infos = self.lanes.step(flat[None])
        return observation[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), first(infos)

    def action_masks(self) -> np.ndarray:
        """Legal entries of the action, flat bool (M·(R+S),), as MaskablePPO reads it."""
        return action_masks(self.lanes.table)


_SHARED = frozenset({"matrices", "horizon", "adapter_config", "env_config", "feature_names", "num_matrices", "table",
                     "device", "clocks"})
