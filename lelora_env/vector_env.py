"""`LeLoRAVectorEnv`: L fine-tuning runs as one Gymnasium vector environment.

The only place that knows episodes. The single environment is the one-lane view of it.

Shapes: L lanes · M matrices · F features · K bank slots · R ranks · S locations.
"""

import copy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor, nn

from lelora_env.accounting import Accountant, LaneClocks
from lelora_env.allocation import (
    Allocation,
    action_masks,
    allocated_ranks,
    build_choice_table,
    component_mask,
    decode_action,
)
from lelora_env.arguments import check_vocabulary, checked_mode, lane_list, lane_seeds, reset_mask
from lelora_env.bank import lane_bytes
from lelora_env.budget import build_budget, component_sizes, project
from lelora_env.config import split_options
from lelora_env.errors import DataError, LeLoRAError, MemoryLimitError, ModelError, NotReadyError
from lelora_env.features import Observer, feature_table, spectrum_points
from lelora_env.finetune import FineTuner, put_lanes
from lelora_env.infos import Infos, add, split
from lelora_env.keys import hashed_key
from lelora_env.memory import lanes_advice, within_memory
from lelora_env.models import Base, ModelSource, moved
from lelora_env.outcome import Measurement, Outcome
from lelora_env.reference import ByReference, by_reference_spec, plain_options
from lelora_env.tasks import make_task
from lelora_env.tasks.base import Splits, Task

LANES_AT_ONCE = 8
"""A share of 1/8 of the lanes or more is measured by one pass over all of them, fewer are measured one by one."""


class LeLoRAVectorEnv(gym.vector.VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """L fine-tuning runs that share one frozen model; see `LeLoRAEnv` for the data sheet.

    What differs from the single environment: every array has L in front, ``reset`` takes one seed
    (lane i gets ``seed + i``) or a list, ``info`` holds arrays with ``_key`` masks, and finished
    lanes are handled by ``autoreset_mode``. Lane i sees exactly what a single environment with its
    seed would see.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012
    spec = by_reference_spec()
    single_action_space: gym.spaces.MultiDiscrete

    def __init__(
        self,
        num_envs: int = 1,
        model: str | Path | nn.Module | None = None,
        task: str | Task | None = None,
        *,
        instance: str | None = None,
        tokenizer: Any = None,
        max_episode_steps: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        """Describe the environment; weights and data are loaded by the first ``reset``.

        Args:
            num_envs: L, at least 1.
            model: Local folder, hub id, short name (``"minilm"``) or ``nn.Module``; ``None`` is the
                task's own model.
            task: Task name (see ``lelora_env.tasks``), a `Task`, or ``None`` for the planted task.
            instance: Id of a named instance; brings its own model, task and options.
            tokenizer: Tokenizer or its folder, for a module that does not name its own.
            max_episode_steps: Outside limit that truncates; the budget itself is ``horizon``.
            autoreset_mode: What happens to finished lanes: next step, same step, or disabled.
            render_mode: Must be ``None``.
            **options: Fields of `AdapterConfig` and `EnvConfig`.

        Raises:
            LeLoRAError: Anything in the arguments that cannot work, named in the message.
        """
        for name, number in (("num_envs", num_envs), ("max_episode_steps", max_episode_steps)):
            if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
                raise LeLoRAError(f"{name} must be an integer of at least 1 (got {number!r})")
        if render_mode is not None:
            raise LeLoRAError(f"render_mode must be None (got {render_mode!r}); this environment does not render.")
        options = plain_options(options)
        self._first_seed: int | None = None
        if instance is not None:
            from lelora_env.instances import resolve_instance

            model, task, options, self._first_seed = resolve_instance(instance, model, task, options)
        self.instance = instance
        self.num_envs = num_envs
        self.max_episode_steps = max_episode_steps
        self.render_mode = None
        self.autoreset_mode = checked_mode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.task = make_task(task.value if isinstance(task, ByReference) else task)
        self.adapter_config, self.env_config = split_options({**getattr(self.task, "defaults", {}), **options})
        self.source = self._make_source(model, tokenizer)
        self.matrices = self.source.describe(self.task.head, self.task.num_labels, self.adapter_config)
        self.table = build_choice_table([min(m.out_features, m.in_features) for m in self.matrices],
                                        self.adapter_config)
        share = self.env_config.parameter_budget
        self._budget = None if share is None else build_budget(
            share, self.table, component_sizes(self.matrices, self.adapter_config))
        self._make_spaces()
        self._base: Base | None = None
        self._splits: Splits | None = None
        self._tuner: FineTuner | None = None

    def _make_source(self, model: Any, tokenizer: Any) -> ModelSource:
        if model is None:
            build = getattr(self.task, "build_model", None)
            if build is None:
                raise LeLoRAError(f"the task {self.task.name!r} needs a model: give model= a local folder, a hub id "
                                  "or an nn.Module.")
            model = moved(build(), self.env_config.device or "cpu")
        elif hasattr(self.task, "build_model"):
            raise LeLoRAError(f"the task {self.task.name!r} brings its own model; leave model out (or 'built-in' on "
                              "the command line).")
        source = ModelSource(model, tokenizer)
        labels = getattr(source.config, "num_labels", None) if source.module is not None else None
        if self.task.head == "sequence-classification" and labels is not None and labels != self.task.num_labels:
            raise DataError(f"the task {self.task.name!r} has {self.task.num_labels} labels, but the module's head has "
                            f"{labels} outputs; load the model with num_labels={self.task.num_labels}.")
        return source

    def _make_spaces(self) -> None:
        features = feature_table(self.matrices, self.env_config, spectrum_points(self.matrices, self.env_config))
        self.feature_names = tuple(f.name for f in features)
        low = np.tile(np.array([f.low for f in features], dtype=np.float32), (len(self.matrices), 1))
        high = np.tile(np.array([f.high for f in features], dtype=np.float32), (len(self.matrices), 1))
        self.single_observation_space = gym.spaces.Box(low, high, dtype=np.float32)
        self.single_action_space = gym.spaces.MultiDiscrete(self.table.nvec)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    # ------------------------------------------------------------------ what does not change

    @property
    def num_matrices(self) -> int:
        """M."""
        return len(self.matrices)

    @property
    def device(self) -> str:
        """Where it computes; known before anything is loaded."""
        return self.source.device(self.env_config)

    @property
    def horizon(self) -> int:
        """Env steps in an episode."""
        return self.env_config.horizon

    def action_masks(self) -> np.ndarray:
        """Legal entries of every lane's action, bool (L, M·(R+S)): ranks that fit their matrix."""
        return np.tile(action_masks(self.table), (self.num_envs, 1))

    @property
    def seeded(self) -> bool:
        """Whether lane 0 has a seed: ``reset`` without one then moves on to the next episode."""
        return self._tuner is not None and bool(self._clocks.seeds[0] >= 0)

    @property
    def tuner(self) -> FineTuner:
        """The fine-tuning process behind the environment.

        Raises:
            NotReadyError: Before the first ``reset``.
        """
        if self._tuner is None:
            raise NotReadyError("the environment has not been started: call reset() first.")
        return self._tuner

    # ------------------------------------------------------------------ reset

    def _build(self) -> None:
        if self._tuner is not None:
            return
        if self._base is None:
            config = self.env_config
            self._base = self.source.base(self.task.head, self.task.num_labels, self.adapter_config, config)
            self._splits = self.task.splits(self.source.tokenizer(), reward_size=config.reward_size,
                                            tune_size=config.tune_size, seed=config.split_seed)
            check_vocabulary(self._splits, self.source.config)
        assert self._splits is not None
        lanes = self.num_envs
        pad = self.source.pad_token_id()
        base, splits = self._base, self._splits
        observer = Observer(base.spectrum, self.matrices, self.env_config)

        def allocate() -> tuple[FineTuner, Measurement]:
            tuner = FineTuner(base, self.task, splits, self.env_config, lanes, pad)
            return tuner, Measurement(tuner, observer)

        self._tuner, self._measure = within_memory(allocate, lambda: lanes_advice(
            lanes, lane_bytes(base.spectrum), base.device))
        self._accountant = Accountant(self.matrices, self.table, self.adapter_config, self.env_config)
        self._clocks = LaneClocks(lanes)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, Infos]:
        """Start a new episode in all lanes, or in those of ``options["reset_mask"]``.

        Args:
            seed: Seed of lane 0, counted up by lane (the same for all lanes under
                ``common_random_numbers``); or one per lane. ``None`` keeps the seeds and moves on
                to each lane's next episode.
            options: ``{"reset_mask": bool array (L,)}`` resets only those lanes.

        Raises:
            LeLoRAError: A list of seeds with ``common_random_numbers``, or a mask that does not fit.
        """
        seeds = lane_seeds(seed, self.num_envs, self.env_config.common_random_numbers)
        mask = reset_mask(options, self.num_envs)
        if isinstance(seed, int | np.integer):
            super().reset(seed=int(seed))
        self._build()
        if seed is None:
            seeds = self._first_seeds(mask)
        for lane in np.flatnonzero(mask):
            self._start_lane(int(lane), seeds[lane])
        observations = self._after_reset(mask)
        infos = self._clock_infos(mask)
        self._add_instance(infos, mask)
        return observations, infos

    def _first_seeds(self, mask: np.ndarray) -> list[int | None]:
        """Seeds for lanes that never had one: the instance's, or drawn; one for all under common random numbers."""
        given = self._clocks.seeds
        if self.env_config.common_random_numbers and (given >= 0).any():
            common = int(given[given >= 0][0])
            return [common if given[lane] < 0 and mask[lane] else None for lane in range(self.num_envs)]
        drawn = self._first_seed if self._first_seed is not None else int(self.np_random.integers(2**31))
        step = 0 if self.env_config.common_random_numbers else 1
        return [drawn + step * lane if given[lane] < 0 and mask[lane] else None for lane in range(self.num_envs)]

    def _start_lane(self, lane: int, seed: int | None) -> None:
        if seed is not None:
            self._clocks.seeds[lane], self._clocks.episodes[lane] = seed, 0
        else:
            self._clocks.episodes[lane] += 1
        self.tuner.start(lane, int(self._clocks.seeds[lane]), int(self._clocks.episodes[lane]))
        self._clocks.env_steps[lane] = 0
        self._clocks.finished[lane] = False
        for extra in self._measure.extras.values():
            extra[lane] = 0

    def _after_reset(self, mask: np.ndarray) -> np.ndarray:
        """Measure lanes that have just been started; returns the observation of all lanes."""
        progress = self._clocks.env_steps / self.horizon
        losses = self._clocks.losses.copy()
        if mask.sum() * LANES_AT_ONCE >= self.num_envs:
            outcome = self._measure(progress, np.zeros_like(mask))
            losses, observation = outcome.losses, outcome.observation
        else:  # few lanes: only what is needed, the other lanes' losses are known
            for lane in np.flatnonzero(mask):
                losses[lane] = self._measure.reward_loss(int(lane))
            observation = self._measure.observe(progress)
        if not np.isfinite(losses[mask]).all():
            raise ModelError("the loss of the untrained model on the reward rows is not finite: the model holds NaN or "
                             "infinite weights, or overflows in this dtype. Check the checkpoint, or use "
                             "dtype='float32'.")
        self._clocks.losses[mask] = losses[mask]
        self._clocks.worst[mask] = -losses[mask]
        return observation

    def _clock_infos(self, mask: np.ndarray) -> Infos:
        infos: Infos = {}
        add(infos, "L1", self._clocks.losses, mask)
        add(infos, "env_step", self._clocks.env_steps, mask)
        add(infos, "optimiser_steps", self.tuner.steps, mask)
        return infos

    def _add_instance(self, infos: Infos, mask: np.ndarray) -> None:
        if self.instance is not None:
            add(infos, "instance", np.full(self.num_envs, self.instance, dtype=object), mask)

    # ------------------------------------------------------------------ step

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Infos]:
        """Train every running lane under its action and reward it.

        Args:
            actions: (L, 2M) integers. A lane that this step merely resets ignores its action.

        Returns:
            Observations (L, M, F), rewards (L,) float64, terminated (L,), truncated (L,), infos.

        Raises:
            NotReadyError: Before ``reset``, or for a finished lane with autoreset disabled.
            ActionError: Wrong shape, type or range; nothing has changed.
            MemoryLimitError: The device's memory does not suffice. Unless the message says that the step broke off
                half-way, nothing has been trained.
        """
        tuner, clocks = self.tuner, self._clocks
        resetting = clocks.finished.copy()
        chosen = decode_action(self._without(actions, resetting), self.num_envs, self.table)
        if resetting.any() and self.autoreset_mode != AutoresetMode.NEXT_STEP:
            raise NotReadyError(f"lanes {np.flatnonzero(resetting).tolist()} have finished their episode: call "
                                "reset(options={'reset_mask': ...}) before stepping them.")
        running = ~resetting
        for lane in np.flatnonzero(resetting):
            self._start_lane(int(lane), None)
        allocation = self._within_budget(chosen)
        outcome = self._train_and_measure(tuner, component_mask(allocation, self.table), running)
        account = self._accountant.account(allocation, outcome, clocks, running)
        observations = outcome.observation
        clocks.losses = np.where(running & ~account.diverged | resetting, outcome.losses, clocks.losses)
        clocks.worst = np.where(resetting, -outcome.losses, clocks.worst)
        clocks.env_steps += running
        infos: Infos = {}
        for key, value in account.values.items():
            add(infos, key, value, running)
        if self._budget is not None:
            add(infos, "executed_rank", allocated_ranks(allocation, self.table).numpy(), running)
            add(infos, "projected", (allocation.rank_index < chosen.rank_index).sum(1).numpy(), running)
        infos |= self._clock_infos(np.ones_like(running))
        self._add_instance(infos, resetting)
        terminated = running & (account.diverged | (clocks.env_steps >= self.horizon))
        limit = self.max_episode_steps
        truncated = running & ~terminated & (limit is not None and clocks.env_steps >= limit)
        clocks.finished = terminated | truncated
        if clocks.finished.any() and self.autoreset_mode == AutoresetMode.SAME_STEP:
            observations, infos = self._reset_in_place(observations, infos)
        return observations, account.rewards, terminated, truncated, infos

    def _within_budget(self, chosen: Allocation) -> Allocation:
        """What is trained: the choice itself, or under ``parameter_budget`` what it allows of it."""
        if self._budget is None:
            return chosen
        clocks = self._clocks
        keys = hashed_key(*map(torch.from_numpy, (clocks.seeds, clocks.episodes, clocks.env_steps)))
        return Allocation(project(chosen.rank_index, self._budget, keys), chosen.location_index)

    def _train_and_measure(self, tuner: FineTuner, mask: Tensor, running: np.ndarray) -> Outcome:
        steps = tuner.steps.copy()
        try:
            self._measure.begin()
            tuner.begin(mask, running)
            tuner.train(self.env_config.steps_per_action)
            self._measure.launch((self._clocks.env_steps + running) / self.horizon, running)
            tuner.inputs.prefetch()
            return self._measure.fetch()
        except MemoryLimitError as error:
            if (tuner.steps == steps).all():
                raise
            self._clocks.finished |= running
            raise MemoryLimitError(f"{error} The env step broke off half-way: reset the lanes.") from None

    def _without(self, actions: np.ndarray, resetting: np.ndarray) -> np.ndarray:
        """The actions with those of lanes that are merely reset blanked out."""
        if resetting.any() and np.shape(actions) == self.action_space.shape:
            return np.where(resetting[:, None], 0, actions)
        return actions

    def _reset_in_place(self, observations: np.ndarray, infos: Infos) -> tuple[np.ndarray, Infos]:
        """SAME_STEP: hand out the last observation and info of finished lanes, then start them anew."""
        done = self._clocks.finished.copy()
        final_obs = np.full(self.num_envs, None, dtype=object)
        for lane in np.flatnonzero(done):
            final_obs[lane] = observations[lane].copy()
        kept, final = split(infos, done)
        for lane in np.flatnonzero(done):
            self._start_lane(int(lane), None)
        observations = self._after_reset(done)
        kept |= self._clock_infos(np.ones_like(done))
        self._add_instance(kept, done)
        add(kept, "final_obs", final_obs, done)
        kept["final_info"], kept["_final_info"] = final, done.copy()
        return observations, kept

    # ------------------------------------------------------------------ scores, states, forks

    def evaluate(self, split: str = "eval") -> list[dict[str, float]]:
        """The task's score of every lane on a split (``"tune"``, ``"eval"``, ...); trains nothing."""
        return self.tuner.evaluate(split)

    def get_state(self, lane: int = 0) -> dict[str, Tensor]:
        """A copy of everything that one lane owns, as plain tensors by name."""
        state = self.tuner.get_state(lane)
        state |= self._clocks.get(lane)
        for name, value in self._measure.extras.items():
            state[f"env.{name}"] = value[lane].clone()
        return state

    def set_state(self, state: dict[str, Tensor], lanes: int | list[int] | None = None) -> None:
        """Put a state into one lane, several, or all (``None``), bitwise.

        A lane that shares its state with another goes on exactly as the other would: data order and
        dropout travel with the state.

        Raises:
            ModelError: The state was taken from an environment with another model or bank.
        """
        self._build()
        targets = lane_list(lanes, self.num_envs)
        for key in ("env.clock", "env.losses", *(f"env.{name}" for name in self._measure.extras)):
            if key not in state:
                raise ModelError(f"this state does not fit: {key!r} is missing. Take states with get_state().")
        self.tuner.check_state(state)
        self.tuner.set_state(targets, state)
        for lane in targets:
            self._clocks.set(lane, state)
        for name, value in self._measure.extras.items():
            put_lanes(value, targets, state[f"env.{name}"])

    def put_rows(self, rows: dict[str, Tensor], lane: int = 0) -> None:
        """Replace a lane's trained numbers (a warm start): fresh moments, and its L1 measured anew.

        Args:
            rows: Per buffer of ``tuner.bank.rows``, (N, D).
            lane: Which lane.
        """
        self.tuner.put_rows(lane, rows)
        self._after_reset(np.arange(self.num_envs) == lane)

    def fork(self) -> "LeLoRAVectorEnv":
        """A second environment in the same state; frozen weights and rows are shared, lanes are copied."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.metadata = dict(self.metadata)
        twin._np_random = copy.deepcopy(self._np_random)
        twin.observation_space = copy.deepcopy(self.observation_space)
        twin.action_space = copy.deepcopy(self.action_space)
        if self._tuner is not None:
            twin._base, twin._splits, twin._tuner = self._tuner.base, self._tuner.splits, None
            twin._build()
            for lane in range(self.num_envs):
                twin.set_state(self.get_state(lane), lane)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "LeLoRAVectorEnv":
        """A deep copy is a fork."""
        return self.fork()

    def __copy__(self) -> "LeLoRAVectorEnv":
        """Refused: two environments over one set of lanes would train each other."""
        raise LeLoRAError("copy.copy(env) would share the lanes; use env.fork() or copy.deepcopy(env).")
