"""``LeLoRA-drift-v0``: the reward rises during the run whatever is chosen, as it does in a real one.

Shapes: L lanes · M matrices · N lanes that start · T env steps of an episode.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from lelora_env.features import spectrum_points
from lelora_env.keys import Purpose, generator
from lelora_env.matrices import MatrixInfo
from lelora_env.synthetic import SyntheticEnv, SyntheticVectorEnv, chosen_options, feature_rows, keyed_normal

DRIFT_HORIZON = 500
"""Env steps of the measured run, and of an episode by default."""

DRIFT_WARMUP = 0.06
"""Share of the horizon with linear warm-up of the learning rate, which then falls linearly to 0."""

DRIFT_CURVE = {"floor": 0.239, "fall": 0.445, "middle": 141.8, "width": 18.9, "middle_std": 9.4}
"""L1(t) = floor + fall·(1 - done), done = 1/(1 + exp(-(t - middle)/width)); nats and env steps.

Measured by benchmarks/drift_curve.py: MiniLM-L6 on SST-2, query and value, ``unit``, learning rate 1e-3, 16 training
rows, 32 reward rows, horizon 500, allocations drawn anew at every env step; four lanes for 180 env steps (seeds 0 to 3)
and one for all 500 (seed 4), on two CPU cores. Each lane was fitted by itself (root mean square error 0.004 to 0.010
nats), with the floor of the whole run, the mean of its last 100 steps; here are the means of the five lanes, and the
spread of their middles (130 to 152).
"""

DRIFT_NOISE = 0.0029
"""Nats. The spread of one step's noise is this times the learning rate's share of its peak times √done.

From the same runs: L2 less its running mean over 11 steps, env steps 60 on; the factor is 0.0017 to 0.0039 in portions
of 60 steps. The noise is white in L2 (lag-1 autocorrelation -0.03; white noise less its running mean has -0.09), so in
L1 it adds up. In the first 60 steps the real noise is 1e-4 to 2e-4, up to twice what this law says.
"""

_DRIFT: dict[str, Any] = {"target_modules": "query,value", "parametrisation": "unit", "learning_rate": 1e-3,
                          "horizon": DRIFT_HORIZON}
_DRIFT_OPTIONS = ("horizon", "alpha", "rank_cost", "parameter_budget", "rank_set", "locations", "spectrum",
                  "common_random_numbers")


def drift_matrices() -> list[MatrixInfo]:
    """Query and value of 12 layers of width 768, M = 24."""
    return [MatrixInfo(name=f"layer.{layer}.{kind}", layer=layer, type=kind, out_features=768, in_features=768,
                       transposed=False, bias=True) for layer in range(12) for kind in ("query", "value")]


def drift_spectra(matrices: Sequence[MatrixInfo]) -> list[np.ndarray]:
    """Made-up spectra: σ_k = s·(1 + k/8)^-p with s and p drawn once for each matrix, p in [0.3, 0.9], s in [2, 6]."""
    draws = generator(0, Purpose.TASK).uniform((0.3, 2.0), (0.9, 6.0), size=(len(matrices), 2))
    sizes = [min(m.out_features, m.in_features) for m in matrices]
    return [scale * (1 + np.arange(size) / 8) ** -power for size, (power, scale) in zip(sizes, draws, strict=True)]


class DriftVectorEnv(SyntheticVectorEnv):
    """L lanes of `DriftEnv`; with ``common_random_numbers`` all lanes see the same losses."""

    def __init__(self, num_envs: int = 1, *, max_episode_steps: int | None = None,
                 autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP, render_mode: str | None = None,
                 **options: Any) -> None:
        """Set it up.

        Args:
            num_envs: L, at least 1.
            max_episode_steps: Outside limit that truncates.
            autoreset_mode: What happens to finished lanes.
            render_mode: Must be ``None``.
            **options: ``horizon``, ``alpha``, ``rank_cost``, ``parameter_budget``, ``rank_set``, ``locations``,
                ``spectrum`` or ``common_random_numbers``.

        Raises:
            LeLoRAError: Anything in the arguments that cannot work, named in the message.
        """
        adapter, config = chosen_options(options, _DRIFT_OPTIONS, _DRIFT)
        matrices = drift_matrices()
        rows = feature_rows(matrices, drift_spectra(matrices), spectrum_points(matrices, config))
        super().__init__(num_envs, matrices, rows, adapter, config, max_episode_steps=max_episode_steps,
                         autoreset_mode=autoreset_mode, render_mode=render_mode)
        self._paths = np.zeros((num_envs, self.horizon + 1))
        self._lane = np.arange(num_envs)

    def start_losses(self, starting: np.ndarray) -> np.ndarray:
        """Draw the losses of the whole episode, and give the first."""
        seeds, episodes = self.clocks.seeds[starting, None], self.clocks.episodes[starting, None]
        self._paths[starting] = drift_losses(keyed_normal(seeds, episodes, np.arange(self.horizon + 1)))
        losses: np.ndarray = self._paths[:, 0]
        return losses

    def step_losses(self, rank_index: np.ndarray, location_index: np.ndarray, running: np.ndarray) -> np.ndarray:
        """The next loss; the allocation makes no difference."""
        losses: np.ndarray = self._paths[self._lane, self.clocks.env_steps]
        return losses


def drift_losses(normal: np.ndarray) -> np.ndarray:
    """L1 at the start of an episode and after each of its T env steps, by `DRIFT_CURVE` and `DRIFT_NOISE`.

    Args:
        normal: (N, T + 1) standard normal numbers: where each lane's middle lies, and a shock for every step.

    Returns:
        (N, T + 1) nats. A horizon other than `DRIFT_HORIZON` runs through the same curve in fewer or more steps.
    """
    curve, horizon = DRIFT_CURVE, normal.shape[1] - 1
    part = DRIFT_HORIZON / horizon
    t = part * np.arange(horizon + 1)
    middle = curve["middle"] + curve["middle_std"] * normal[:, :1]
    done = 1 / (1 + np.exp(-(t - middle) / curve["width"]))  # share of the fall
    rate = np.minimum(t / (DRIFT_WARMUP * DRIFT_HORIZON), (1 - t / DRIFT_HORIZON) / (1 - DRIFT_WARMUP))
    spread = np.sqrt(part) * DRIFT_NOISE * rate * np.sqrt(done)
    noise = np.cumsum(spread[:, 1:] * normal[:, 1:], axis=1)
    losses: np.ndarray = curve["floor"] + curve["fall"] * (1 - done)
    losses[:, 1:] += noise
    return losses


class DriftEnv(SyntheticEnv):
    """The reward rises during the run whatever is chosen, with the noise of a real run: `LeLoRA-drift-v0`.

    There is nothing to learn here, so an agent that comes to prefer something has taken the rise for its own doing.
    Observation, action, reward and info are those of `lelora_env.LeLoRAEnv` for 24 matrices (query and value of 12
    layers), ranks 0, 2, 4, 8 and three locations. L1 comes from `drift_losses` and depends on nothing but seed, episode
    and env step.

    Arguments: see `DriftVectorEnv`.
    """

    def __init__(self, *, render_mode: str | None = None, **options: Any) -> None:
        """Set it up; see the class."""
        super().__init__(DriftVectorEnv(1, autoreset_mode=AutoresetMode.DISABLED, render_mode=render_mode, **options))
