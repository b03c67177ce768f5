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

from lelora_env.allocation import (
    Allocation,
    action_masks,
    allocated_ranks,
    build_choice_table,
    component_mask,
    decode_action,
)
from lelora_env.config import split_options
from lelora_env.errors import DataError, LeLoRAError, ModelError, NotReadyError
from lelora_env.features import Observer, change_norms, feature_table, spectrum_points
from lelora_env.finetune import FineTuner, Progress
from lelora_env.models import Base, ByReference, ModelSource, by_reference_spec
from lelora_env.reward import divergence_penalty, reward_parts
from lelora_env.tasks import make_task
from lelora_env.tasks.base import Splits, Task

Infos = dict[str, Any]


class LeLoRAVectorEnv(gym.vector.VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """L fine-tuning runs that share one frozen model; see `LeLoRAEnv` for the data sheet.

    What differs from the single environment: every array has L in front, ``reset`` takes one seed
    (lane i gets ``seed + i``) or a list, ``info`` holds arrays with ``_key`` masks, and finished
    lanes are handled by ``autoreset_mode``. Lane i sees exactly what a single environment with its
    seed would see.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}
    spec = by_reference_spec()

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
        if not isinstance(num_envs, int) or num_envs < 1:
            raise LeLoRAError(f"num_envs must be an integer of at least 1 (got {num_envs!r})")
        if render_mode is not None:
            raise LeLoRAError(f"render_mode must be None (got {render_mode!r}); this environment does not render.")
        if instance is not None:
            from lelora_env.instances import resolve_instance

            model, task, options = resolve_instance(instance, model, task, options)
        self.instance = instance
        self.num_envs = num_envs
        self.max_episode_steps = max_episode_steps
        self.render_mode = None
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.task = make_task(task.value if isinstance(task, ByReference) else task)
        self.adapter_config, self.env_config = split_options({**getattr(self.task, "defaults", {}), **options})
        self.source = self._make_source(model, tokenizer)
        self.matrices = self.source.describe(self.task.head, self.task.num_labels, self.adapter_config)
        self.table = build_choice_table([min(m.out_features, m.in_features) for m in self.matrices],
                                        self.adapter_config)
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
            model = build()
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
    def horizon(self) -> int:
        """Env steps in an episode."""
        return self.env_config.horizon

    def action_masks(self) -> np.ndarray:
        """Legal entries of every lane's action, bool (L, M·(R+S)): ranks that fit their matrix."""
        return np.tile(action_masks(self.table), (self.num_envs, 1))

    @property
    def seeded(self) -> bool:
        """Whether lane 0 has a seed: ``reset`` without one then moves on to the next episode."""
        return self._tuner is not None and bool(self._lane_seeds[0] >= 0)

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
        assert self._splits is not None
        lanes = self.num_envs
        self._tuner = FineTuner(self._base, self.task, self._splits, self.env_config, lanes)
        self._observer = Observer(self._base.spectrum, self.matrices, self.env_config)
        self._lane_seeds = np.full(lanes, -1, dtype=np.int64)
        self._episodes = np.zeros(lanes, dtype=np.int64)
        self._env_steps = np.zeros(lanes, dtype=np.int64)
        self._losses = np.zeros(lanes)
        self._worst = np.zeros(lanes)
        self._finished = np.ones(lanes, dtype=bool)
        self._extras = {
            name: torch.zeros(lanes, self.num_matrices, device=self._base.device) for name in ("grad_norm", "update_norm")
        }

    def reset(self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, Infos]:
        """Start a new episode in all lanes, or in those of ``options["reset_mask"]``.

        Args:
            seed: Seed of lane 0, counted up by lane (the same for all lanes under
                ``common_random_numbers``); or one per lane. ``None`` keeps the seeds and moves on
                to each lane's next episode.
            options: ``{"reset_mask": bool array (L,)}`` resets only those lanes.

        Raises:
            LeLoRAError: A list of seeds with ``common_random_numbers``, or a mask that does not fit.
        """
        seeds = self._lane_seed_list(seed)
        mask = self._reset_mask(options)
        if isinstance(seed, int):
            super().reset(seed=seed)
        self._build()
        for lane in np.flatnonzero(mask):
            self._start_lane(int(lane), seeds[lane])
        self._refresh_losses(mask)
        infos = self._reset_infos(mask)
        return self._observe(), infos

    def _lane_seed_list(self, seed: int | list[int | None] | None) -> list[int | None]:
        if seed is None:
            return [None] * self.num_envs
        shared = self.env_config.common_random_numbers
        if isinstance(seed, int | np.integer):
            if seed < 0:
                raise LeLoRAError(f"seed must be at least 0 (got {seed})")
            return [int(seed) + (0 if shared else lane) for lane in range(self.num_envs)]
        if shared:
            raise LeLoRAError("with common_random_numbers=True all lanes share one seed: give reset() one integer.")
        if len(seed) != self.num_envs:
            raise LeLoRAError(f"seed must be one integer or {self.num_envs} of them, one a lane (got {len(seed)})")
        return list(seed)

    def _reset_mask(self, options: dict[str, Any] | None) -> np.ndarray:
        mask = (options or {}).get("reset_mask")
        if mask is None:
            return np.ones(self.num_envs, dtype=bool)
        if not isinstance(mask, np.ndarray) or mask.shape != (self.num_envs,) or mask.dtype != np.bool_ or not mask.any():
            raise LeLoRAError(f"options['reset_mask'] must be a bool array of shape ({self.num_envs},) with at least "
                              f"one True (got {mask!r})")
        return mask

    def _start_lane(self, lane: int, seed: int | None) -> None:
        if seed is not None:
            self._lane_seeds[lane], self._episodes[lane] = seed, 0
        elif self._lane_seeds[lane] < 0:
            shared = self.env_config.common_random_numbers and lane > 0
            self._lane_seeds[lane] = self._lane_seeds[0] if shared else int(self.np_random.integers(2**31))
            self._episodes[lane] = 0
        else:
            self._episodes[lane] += 1
        self.tuner.start(lane, int(self._lane_seeds[lane]), int(self._episodes[lane]))
        self._env_steps[lane] = 0
        self._finished[lane] = False
        for extra in self._extras.values():
            extra[lane] = 0

    def _refresh_losses(self, mask: np.ndarray) -> None:
        losses = self.tuner.reward_loss().double().cpu().numpy()
        if not np.isfinite(losses[mask]).all():
            raise ModelError("the loss of the untrained model on the reward rows is not finite: the model holds NaN or "
                             "infinite weights, or overflows in this dtype. Check the checkpoint, or use dtype='float32'.")
        self._losses[mask] = losses[mask]
        self._worst[mask] = -losses[mask]

    def _reset_infos(self, mask: np.ndarray) -> Infos:
        infos: Infos = {}
        self._add(infos, "L1", np.where(mask, self._losses, 0.0), mask)
        self._add(infos, "env_step", np.where(mask, self._env_steps, 0), mask)
        self._add(infos, "optimiser_steps", np.where(mask, self.tuner.steps, 0), mask)
        if self.instance is not None:
            self._add(infos, "instance", np.array([self.instance if m else None for m in mask], dtype=object), mask)
        return infos

    @staticmethod
    def _add(infos: Infos, key: str, values: np.ndarray, mask: np.ndarray) -> None:
        infos[key], infos[f"_{key}"] = values, mask.copy()

    def _observe(self) -> np.ndarray:
        progress = torch.from_numpy(self._env_steps / self.horizon).float().to(self.tuner.device)
        rows: dict[str, Tensor] = dict(self.tuner.bank.rows)
        with torch.no_grad():
            return self._observer.observe(rows, progress, self._extras).cpu().numpy()

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
        """
        tuner = self.tuner
        allocation = decode_action(actions, self.num_envs, self.table)
        resetting = self._finished.copy()
        if resetting.any() and self.autoreset_mode != AutoresetMode.NEXT_STEP:
            raise NotReadyError(f"lanes {np.flatnonzero(resetting).tolist()} have finished their episode: call "
                                "reset(options={'reset_mask': ...}) before stepping them.")
        running = ~resetting
        for lane in np.flatnonzero(resetting):
            self._start_lane(int(lane), None)
        before = tuner.bank.copy_rows()
        progress = tuner.train(component_mask(allocation, self.table), running, self.env_config.steps_per_action)
        losses = tuner.reward_loss().double().cpu().numpy()
        infos, rewards, diverged = self._account(allocation, progress, losses, before, running)
        self._losses = np.where(running & ~diverged | resetting, losses, self._losses)
        self._worst = np.where(resetting, -losses, self._worst)
        self._env_steps += running
        terminated = running & (diverged | (self._env_steps >= self.horizon))
        limit = self.max_episode_steps
        truncated = running & ~terminated & (limit is not None and self._env_steps >= limit)
        self._finished = terminated | truncated
        self._add(infos, "L1", self._losses.copy(), np.ones_like(running))
        self._add(infos, "env_step", self._env_steps.copy(), np.ones_like(running))
        self._add(infos, "optimiser_steps", tuner.steps.copy(), np.ones_like(running))
        observations = self._observe()
        if self._finished.any() and self.autoreset_mode == AutoresetMode.SAME_STEP:
            observations, infos = self._reset_in_place(observations, infos)
        return observations, rewards, terminated, truncated, infos

    def _account(
        self, allocation: Allocation, progress: Progress, losses: np.ndarray, before: dict[str, Tensor], running: np.ndarray
    ) -> tuple[Infos, np.ndarray, np.ndarray]:
        """Rewards and infos of a step; returns infos, rewards (L,) and which lanes diverged (L,)."""
        config, tuner = self.env_config, self.tuner
        train_loss = progress.train_loss.double().cpu().numpy()
        finite = np.isfinite(losses) & np.isfinite(train_loss) & tuner.finite_lanes()
        diverged = running & ~finite
        ranks = allocated_ranks(allocation, self.table)
        trained = self._trained_parameters(ranks)
        fraction = trained / self._adaptable
        parts = reward_parts(np.where(diverged, 0.0, losses), np.where(diverged, 0.0, self._losses), fraction,
                             config.alpha, config.rank_cost)
        rewards = np.sum(list(parts.values()), axis=0)
        self._worst = np.where(running & ~diverged, np.minimum(self._worst, rewards), self._worst)
        penalty = divergence_penalty(self._worst, self.horizon - self._env_steps)
        for name in parts:
            parts[name] = np.where(diverged, penalty if name == "reward_divergence" else 0.0, parts[name])
        rewards = np.where(diverged, penalty, rewards)
        values = {
            "L2": np.where(diverged, 0.0, losses - self._losses),
            "train_loss": np.nan_to_num(train_loss, nan=np.inf),
            "trained_parameters": trained,
            "trained_fraction": fraction,
            "mean_rank": ranks.double().mean(1).numpy(),
            **self._norms(allocation, before, progress),
            "learning_rate": progress.learning_rate.double().cpu().numpy(),
            "diverged": diverged,
            **parts,
        }
        infos: Infos = {}
        for key, value in values.items():
            self._add(infos, key, np.where(running, value, np.zeros_like(value)), running)
        return infos, np.where(running, rewards, 0.0), diverged

    def _trained_parameters(self, ranks: Tensor) -> np.ndarray:
        """Numbers that each lane's action trains, heads not counted: Σ r·(out + in [+ 1 for σ])."""
        extra = 1 if self.adapter_config.parametrisation == "usv" else 0
        sizes = torch.tensor([m.out_features + m.in_features + extra for m in self.matrices])
        return (ranks * sizes).sum(1).double().numpy()

    @property
    def _adaptable(self) -> float:
        return float(sum(m.out_features * m.in_features for m in self.matrices))

    def _norms(self, allocation: Allocation, before: dict[str, Tensor], progress: Progress) -> dict[str, np.ndarray]:
        """‖ΔW‖ of this step by chosen location, of the run so far, and the gradient's norm."""
        tuner = self.tuner
        with torch.no_grad():
            rows: dict[str, Tensor] = dict(tuner.bank.rows)
            step = change_norms(rows, before, tuner.base.spectrum)  # (L, M)
            total = change_norms(rows, tuner.base.spectrum.reference, tuner.base.spectrum)
            if self.env_config.extra_features:
                self._extras = {"update_norm": step, "grad_norm": tuner.matrix_grad_norms()}
        square = step.double().cpu().square()
        norms = {}
        for index, name in enumerate(self.adapter_config.location_names):
            chosen = allocation.location_index == index
            norms[f"update_norm_{name}"] = (square * chosen).sum(1).sqrt().numpy()
        norms["delta_norm"] = total.double().square().sum(1).sqrt().cpu().numpy()
        norms["grad_norm"] = progress.grad_norm.double().cpu().numpy()
        return {key: np.nan_to_num(value, nan=np.inf) for key, value in norms.items()}

    def _reset_in_place(self, observations: np.ndarray, infos: Infos) -> tuple[np.ndarray, Infos]:
        """SAME_STEP: hand out the last observation and info of finished lanes, then start them anew."""
        done = self._finished.copy()
        final_obs = np.full(self.num_envs, None, dtype=object)
        for lane in np.flatnonzero(done):
            final_obs[lane] = observations[lane].copy()
        final = {k: v.copy() for k, v in infos.items() if not k.startswith("_")}
        final |= {k: v & done for k, v in infos.items() if k.startswith("_")}
        for lane in np.flatnonzero(done):
            self._start_lane(int(lane), None)
        self._refresh_losses(done)
        for key, value in self._reset_infos(done).items():
            if key in infos:
                infos[key] = infos[key] | value if key.startswith("_") else np.where(done, value, infos[key])
            else:
                infos[key] = value
        for key in list(infos):
            if not key.startswith("_") and key not in ("L1", "env_step", "optimiser_steps", "instance"):
                infos[f"_{key}"] = infos[f"_{key}"] & ~done
        self._add(infos, "final_obs", final_obs, done)
        infos["final_info"], infos["_final_info"] = final, done.copy()
        return self._observe(), infos

    # ------------------------------------------------------------------ scores, states, forks

    def evaluate(self, split: str = "eval") -> list[dict[str, float]]:
        """The task's score of every lane on a split (``"tune"``, ``"eval"``, ...); trains nothing."""
        return self.tuner.evaluate(split)

    def get_state(self, lane: int = 0) -> dict[str, Tensor]:
        """A copy of everything that one lane owns, as plain tensors by name."""
        state = self.tuner.get_state(lane)
        state["env.clock"] = torch.tensor(
            [self._lane_seeds[lane], self._episodes[lane], self._env_steps[lane], self._finished[lane]]
        )
        state["env.losses"] = torch.tensor([self._losses[lane], self._worst[lane]], dtype=torch.float64)
        for name, value in self._extras.items():
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
        targets = range(self.num_envs) if lanes is None else [lanes] if isinstance(lanes, int) else lanes
        for lane in targets:
            self.tuner.set_state(lane, state)
            clock = [int(x) for x in state["env.clock"]]
            self._lane_seeds[lane], self._episodes[lane], self._env_steps[lane] = clock[:3]
            self._finished[lane] = bool(clock[3])
            self._losses[lane], self._worst[lane] = (float(x) for x in state["env.losses"])
            for name, value in self._extras.items():
                value[lane] = state[f"env.{name}"]

    def fork(self) -> "LeLoRAVectorEnv":
        """A second environment in the same state; frozen weights and rows are shared, lanes are copied."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin.metadata = dict(self.metadata)
        twin._np_random = copy.deepcopy(self._np_random)
        twin.observation_space, twin.action_space = copy.deepcopy(self.observation_space), copy.deepcopy(self.action_space)
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
