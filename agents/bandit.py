"""A bandit in every matrix: which choice has earned most here, without features and without a network.

Shapes: L lanes · M matrices · F features · R ranks · S locations.
"""

from typing import Any

import numpy as np
import torch

from agents.agent import Array, Transition
from agents.baseline import RunningMean, expected, known_part, scaled
from agents.knapsack import best_choices
from agents.spec import AgentSpec
from lelora_env.errors import LeLoRAError

DRAWS = 256
"""Draws by which `MatrixBandit.probabilities` estimates its own probabilities."""


class MatrixBandit:
    """Thompson sampling with a Gaussian for each choice of each matrix, all matrices learning from one shared reward.

    What a choice is credited with is the reward less what was known and expected (see `agents.baseline`), in units of
    its slow root mean square and clipped; a choice that was made n times with credits of sum c draws from
    N(c/(n + 1), 1/(n + 1)). Counts fade, so that what is best may change during a run. Rank 0 is one choice, wherever
    it is. It knows matrices by their place, so what it learnt is of use on the same matrices only.
    """

    def __init__(self, spec: AgentSpec, *, memory: float = 0.999, seed: int = 0) -> None:
        """Prepare.

        Args:
            spec: What can be chosen.
            memory: Factor by which counts fade with every env step, in (0, 1].
            seed: Of its draws.

        Raises:
            LeLoRAError: An option out of range.
        """
        if not 0 < memory <= 1:
            raise LeLoRAError(f"memory must be in (0, 1] (got {memory!r})")
        self.spec, self.memory = spec, memory
        self.generator = np.random.default_rng(seed)
        self.count, self.total = np.zeros(spec.legal.shape), np.zeros(spec.legal.shape)  # (M, R, S)
        self.slow, self.square = RunningMean(0.99), RunningMean(0.99)

    def act(self, observation: Array) -> Array:
        """Draw once for every lane: (L, M, F) -> (L, 2M) int64."""
        return self._draw(len(observation), self.generator)

    def _draw(self, lanes: int, generator: np.random.Generator) -> Array:
        noise = generator.standard_normal((lanes, *self.count.shape))
        drawn = (self.total + noise * np.sqrt(self.count + 1)) / (self.count + 1)
        if self.spec.rank_set[0] == 0:  # one draw for rank 0; where it is does not matter
            drawn[:, :, 0, 1:] = -np.inf
        return best_choices(drawn, self.spec)

    def probabilities(self, observation: Array) -> Array:
        """How often each choice is made in `DRAWS` draws with a generator of their own: (L, M, R, S) float32."""
        drawn = self._draw(DRAWS, np.random.default_rng(0)).reshape(DRAWS, -1, 2)
        flat = drawn[..., 0] * len(self.spec.locations) + drawn[..., 1]  # (D, M)
        every = np.arange(self.count[0].size)
        share = (flat[..., None] == every).mean(0).reshape(self.count.shape).astype(np.float32)
        return np.repeat(share[None], len(observation), axis=0)

    def update(self, transition: Transition) -> dict[str, float]:
        """Credit every choice that was made with the lane's surprise; lanes without a finite reward do not count."""
        usable = np.isfinite(transition.reward)
        if not usable.any():
            return {}
        surprise = np.where(usable, transition.reward - known_part(transition), 0.0)
        advantage = np.where(usable, surprise - expected(surprise, usable, self.slow.value), 0.0)
        self.slow.add(float(surprise[usable].mean()))
        credit = scaled(advantage, usable, self.square)
        pairs = transition.action.reshape(len(usable), -1, 2)
        place = np.where((pairs[..., 0] == 0) & (self.spec.rank_set[0] == 0), 0, pairs[..., 1])
        where = (np.broadcast_to(np.arange(pairs.shape[1]), place.shape), pairs[..., 0], place)
        self.count *= self.memory
        self.total *= self.memory
        np.add.at(self.count, where, usable[:, None].astype(np.float64))
        np.add.at(self.total, where, credit[:, None])
        return {"advantage": float(advantage[usable].mean())}

    def state_dict(self) -> dict[str, Any]:
        """Counts, sums and the generator."""
        return {"agent": "bandit", "spec": self.spec.fingerprint(), "count": torch.from_numpy(self.count.copy()),
                "total": torch.from_numpy(self.total.copy()), "slow": self.slow.state(),
                "square": self.square.state(), "generator": self.generator.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue.

        Raises:
            LeLoRAError: The state is of another agent, or of other matrices or choices.
        """
        if state.get("agent") != "bandit":
            raise LeLoRAError(f"expected the state of a bandit (got one of {state.get('agent')!r})")
        self.spec.check_fingerprint(state["spec"])
        if tuple(state["count"].shape) != self.count.shape:
            raise LeLoRAError(f"expected the state of a bandit over {self.count.shape} choices (got one over "
                              f"{tuple(state['count'].shape)})")
        self.count, self.total = state["count"].numpy().copy(), state["total"].numpy().copy()
        self.slow.set(state["slow"])
        self.square.set(state["square"])
        self.generator.bit_generator.state = state["generator"]
