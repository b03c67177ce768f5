"""`LeLoRAEnv`: fine-tuning one model as a Gymnasium environment; the one-lane view of the vector one."""

import copy
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from torch import Tensor, nn

from lelora_env.allocation import action_masks
from lelora_env.errors import ActionError, LeLoRAError
from lelora_env.infos import first
from lelora_env.reference import by_reference_spec
from lelora_env.tasks.base import Task
from lelora_env.vector_env import LeLoRAVectorEnv


class LeLoRAEnv(gym.Env[np.ndarray, np.ndarray]):
    """Fine-tune a language model by choosing, at every step, which components of which matrix train.

    Every adapted weight W (out x in) is split once by SVD into a bank of components and a frozen
    residual. An action gives each of the M matrices a rank r and a location s in its spectrum;
    ``steps_per_action`` optimiser steps then update only those components, and the reward says how
    the loss on a small fixed batch came out. After LeLoRA (ACL 2026), Sections 3.1-3.3.

    Plainly: within one run this is close to a contextual bandit. What an action changes in the
    observation is small, and most of the change in L1 during a run comes from training as such.

    ### Observation: float32 ``Box`` of shape (M, F), one row per matrix, in model order

    | column | meaning | range (scaled) | range (``raw_observation``) |
    |---|---|---|---|
    | ``layer`` | layer index, for an embedding | 0 .. layers-1 | the same |
    | ``type`` | index into ``lelora_env.MATRIX_TYPES`` | 0 .. 9 | the same |
    | ``norm`` | Frobenius norm of the *current* weight: ln(‖W‖/√m)/4 | [-2, 2] | ‖W‖ in [0, 1e6] |
    | ``sv_0`` .. | *current* singular values, resampled evenly, head first: ln(σ·√m/‖W‖)/4 | [-2, 2] | σ in [0, 1e6] |
    | ``progress`` | share of the horizon spent | [0, 1] | the same |
    | ``relative_depth`` | optional: layer / last layer | [0, 1] | the same |
    | ``grad_norm`` | optional: norm g of the bank's last gradient, ln(g)/4 | [-2, 2] | [0, 1e6] |
    | ``update_norm`` | optional: ‖ΔW‖ of the last env step, ln(‖ΔW‖/‖W‖)/4 | [-2, 2] | [0, 1e6] |

    m = min(out, in). Logarithms are clipped to ±8. The scaling is the same for every row, so one
    network can read them all; nothing is normalised per row. ``spectrum="full"`` shows every
    singular value (shorter spectra are padded with the lower bound).

    ### Action: ``MultiDiscrete([R, S] * M)``, rank index and location index of each matrix, interleaved

    ``action.reshape(M, 2)`` gives (rank index into ``rank_set``, location index into ``locations``).
    The choice (r, s) trains the r components from min(s, m - r) on. Rank 0 leaves a matrix
    untouched. A rank above m is clipped to m, and marked illegal by ``action_masks()``.

    With ``parameter_budget`` b, an action whose Σ r·(out + in [+1 in ``usv``]) exceeds b times what
    the largest rank everywhere would train is *projected* before it trains: ranks are lowered to the
    next smaller legal one, the highest first, until the sum fits. Equal ranks come in a random order
    that is a function of seed, episode and env step. An action that fits is left as it is; rewards,
    prices and all counts are of what has been trained.

    ### Reward: -(L1 + α·L2), per env step

    L1 = loss on the reward batch after the step, L2 = L1 minus the L1 of the step before (Eq. 2, 3),
    α = 0.8. With ``rank_cost`` λ > 0 the trained fraction times λ is taken off as well.

    ### Start

    ``reset`` puts the pretrained components back bitwise, clears the optimiser, and draws a fresh
    head where the checkpoint has none. One seed fixes everything; ``reset()`` without a seed moves on
    to the next episode of the same seed.

    ### End

    *terminated*: the horizon is reached (the learning rate ends there too), or the lane diverged:
    a loss or weight is not finite. A diverged run gets a reward that makes its return 1 less than
    finishing at the worst finite reward it saw. *truncated*: only by limits from outside
    (``TimeLimit``, ``max_episode_steps``).

    ### Info of ``step`` (fixed keys; floats unless said)

    | key | meaning |
    |---|---|
    | ``L1``, ``L2`` | as above; of a diverged step the last finite L1, and 0 |
    | ``train_loss`` | mean training loss of this env step, before each update (inf if not finite) |
    | ``trained_parameters`` | Σ r·(out + in [+1 in ``usv``]) of what was trained, heads not counted |
    | ``trained_fraction`` | the same over Σ out·in |
    | ``mean_rank`` | mean rank over matrices |
    | ``update_norm_<location>`` | ‖ΔW‖ of this env step over the matrices that chose the location |
    | ``delta_norm`` | ‖ΔW‖ since the start, all matrices |
    | ``grad_norm`` | norm of the last gradient over what trained, before clipping |
    | ``learning_rate`` | of the last optimiser step |
    | ``diverged`` | bool |
    | ``reward_l1``, ``reward_l2``, ``reward_rank_cost``, ``reward_divergence`` | parts; they sum to the reward |
    | ``env_step``, ``optimiser_steps`` | int, since the start of the episode |
    | ``executed_rank`` | with ``parameter_budget``: int64 (M,), ranks that were trained, clipped to their matrix |
    | ``projected`` | with ``parameter_budget``: int, matrices whose rank was lowered |
    | ``component_credit`` | with ``component_info="credit"``: float32 (M, K), see below |
    | ``component_sensitivity`` | with ``component_info="sensitivity"``: float32 (M, K), see below |

    K is the number of bank slots: slot k of matrix i holds component ``table.components[i, k]`` (-1:
    unused, 0 in both arrays), and a choice trains the slots ``table.mask[i, rank index, location index]``.
    Both arrays are 0 in a step that diverges.

    *Credit* of a component, chosen or not: -⟨∂L1/∂θ, Δ⟩, summed over its rows θ (left and right vector,
    and σ in ``usv``), with the gradient of the reward loss after the step. Δ is what the last optimiser
    step added to θ, weight decay included, or would have added had the component been chosen: AdamW
    with the component's own moments and counter, and the last training gradient, scaled and clipped like
    the others. Positive means that the change lowers L1, to first order. With ``steps_per_action=1``, a
    small learning rate and no head, the credits of what was chosen sum to about -L2.

    *Sensitivity*: Σ |θ·g| over the numbers of its rows, with g the gradient of the mean training loss
    in the last optimiser step, before clipping, and θ the rows after it.

    ``reset`` gives ``L1``, ``env_step``, ``optimiser_steps`` (and ``instance`` where one was named).

    ### Arguments

    ``model``: a local folder, hub id or short name (the documented path: the spec stays
    JSON-serialisable and nothing is loaded before the first ``reset``), or an ``nn.Module``, which
    is never copied, changed or trained and may be shared. ``task``: a name, or a `Task`. Everything
    else are fields of `lelora_env.AdapterConfig` and `lelora_env.EnvConfig`. With no
    arguments at all: a small built-in model on the ``planted`` task, whose best allocation is known
    (``env.unwrapped.task.best_allocation()``).

    ### Versions

    * v0: first release.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}  # type: ignore[misc]
    spec = by_reference_spec()

    def __init__(
        self,
        model: str | Path | nn.Module | None = None,
        task: str | Task | None = None,
        *,
        instance: str | None = None,
        tokenizer: Any = None,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        """Describe the environment; see the class for the arguments.

        Raises:
            LeLoRAError: Anything in the arguments that cannot work, named in the message.
        """
        self._lanes = LeLoRAVectorEnv(
            1,
            model,
            task,
            instance=instance,
            tokenizer=tokenizer,
            autoreset_mode=AutoresetMode.DISABLED,
            render_mode=render_mode,
            **options,
        )
        self.render_mode = None
        self.observation_space = self._lanes.single_observation_space
        self.action_space = self._lanes.single_action_space

    def __getattr__(self, name: str) -> Any:
        """What an environment is made of (``matrices``, ``task``, ``horizon``, ...) comes from the lanes."""
        if name.startswith("_") or name not in _SHARED:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._lanes, name)

    @property
    def lanes(self) -> LeLoRAVectorEnv:
        """The one-lane vector environment behind this one."""
        return self._lanes

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start a fine-tuning run; see the class. Returns the observation (M, F) and info."""
        super().reset(seed=seed)
        if seed is None and not self._lanes.seeded and self._lanes.instance is None:
            seed = int(self.np_random.integers(2**31))
        observation, infos = self._lanes.reset(seed=seed)
        return observation[0].copy(), first(infos)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Train under one allocation; see the class.

        Args:
            action: (2M,) integers.

        Raises:
            NotReadyError: Before ``reset`` or after the end of the episode.
            ActionError: Wrong shape, type or range; nothing has changed.
        """
        flat = np.asarray(action)
        if flat.shape != self.action_space.shape:
            raise ActionError(f"an action must have shape {self.action_space.shape}: rank index and location index of "
                              f"each of the {self._lanes.num_matrices} matrices, interleaved; got {flat.shape}.")
        observation, reward, terminated, truncated, infos = self._lanes.step(flat[None])
        return observation[0].copy(), float(reward[0]), bool(terminated[0]), bool(truncated[0]), first(infos)

    def action_masks(self) -> np.ndarray:
        """Legal entries of the action, flat bool (M·(R+S),), as MaskablePPO reads it."""
        return action_masks(self._lanes.table)

    def evaluate(self, split: str = "eval") -> dict[str, float]:
        """The task's score on a split (``"tune"``, ``"eval"``, ...); trains nothing."""
        return self._lanes.evaluate(split)[0]

    def get_state(self) -> dict[str, Tensor]:
        """A copy of everything this run owns, as plain tensors by name; frozen weights are not in it."""
        return self._lanes.get_state(0)

    def set_state(self, state: dict[str, Tensor]) -> None:
        """Go back to a state taken by `get_state`, bitwise."""
        self._lanes.set_state(state, 0)

    def fork(self) -> "LeLoRAEnv":
        """A second environment in the same state, over the same frozen weights."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._lanes = self._lanes.fork()
        twin.observation_space = twin._lanes.single_observation_space
        twin.action_space = twin._lanes.single_action_space
        twin._np_random = copy.deepcopy(self._np_random)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "LeLoRAEnv":
        """A deep copy is a fork."""
        return self.fork()

    def __copy__(self) -> "LeLoRAEnv":
        """Refused: two environments over one run would train each other."""
        raise LeLoRAError("copy.copy(env) would share the run; use env.fork() or copy.deepcopy(env).")


_SHARED = frozenset(
    {"matrices", "task", "horizon", "adapter_config", "env_config", "feature_names", "num_matrices", "table",
     "instance", "source", "tuner", "device"}
)
