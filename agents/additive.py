"""An additive value model of allocations, searched by Thompson sampling or UCB under a budget of parameters.

The setting for which it is made: one allocation for a whole run (``horizon=1``, ``steps_per_action`` = the run), many
lanes with ``common_random_numbers``, so that what differs between lanes of a round is what their allocations did.

Shapes: L lanes · M matrices · F features · R ranks · S locations · D = M·S coefficients.
"""

import math
from typing import Any

import numpy as np
import torch

from agents.agent import Array, Transition
from agents.baseline import known_part
from agents.knapsack import best_choices
from agents.spec import AgentSpec, one_hot
from lelora_env.errors import LeLoRAError, UnknownNameError

EXPLORATIONS = ("thompson", "ucb")

DECAY = 0.99
"""Decay per round of the means that a lone lane is compared with."""


class AdditiveModel:
    """Bayesian linear regression of the reward on log2(1 + rank) of every matrix and location.

    value(allocation) = Σ_m  w[m, location_m] · log2(1 + rank_m) + noise,  w ~ N(0, prior²)

    Rewards count less what was known before the action, and both sides less their mean over the lanes of the round, so
    that the noise that lanes share drops out; a lone lane has its own slow mean of earlier rounds instead. Lanes act on
    draws of w (``thompson``), or on its mean plus `optimism`·|z| standard deviations with a normal z for every
    coefficient and lane (``ucb``, randomised because lanes that all do the same tell nothing); each takes the
    allocation of greatest value within the budget.
    """

    def __init__(self, spec: AgentSpec, *, budget: float | None = 0.5, exploration: str = "thompson",
                 prior: float = 1.0, optimism: float = 1.0, seed: int = 0) -> None:
        """Prepare.

        Args:
            spec: What can be chosen.
            budget: Share of what the largest ranks train, in (0, 1]; ``None`` = no limit.
            exploration: One of `EXPLORATIONS`.
            prior: Standard deviation of a coefficient before any data, in standard deviations of the reward, above 0.
            optimism: Of ``ucb``, at least 0.
            seed: Of its draws.

        Raises:
            UnknownNameError: No such exploration.
            LeLoRAError: An option out of range.
        """
        if exploration not in EXPLORATIONS:
            raise UnknownNameError("exploration", exploration, EXPLORATIONS)
        if not (prior > 0 and optimism >= 0 and math.isfinite(prior) and math.isfinite(optimism)):
            raise LeLoRAError(f"prior must be above 0 and optimism at least 0 (got {prior!r}, {optimism!r})")
        self.spec, self.exploration, self.prior, self.optimism = spec, exploration, prior, optimism
        self.limit = None if budget is None else spec.limit(budget)
        self.generator = np.random.default_rng(seed)
        self.gain = np.log2(1.0 + np.array(spec.rank_set))
        size = spec.num_matrices * len(spec.locations)
        self.xx, self.xy, self.yy, self.count = np.zeros((size, size)), np.zeros(size), 0.0, 0
        self.earlier, self.weight = np.zeros(size + 1), 0.0  # decayed sums of (x, y) and of 1

    def act(self, observation: Array) -> Array:
        """One allocation for every lane: (L, M, F) -> (L, 2M) int64."""
        mean, factor = self._posterior()
        noise = self.generator.standard_normal((len(observation), len(mean)))
        if self.exploration == "ucb":
            return self._best(mean + self.optimism * np.abs(noise) * np.sqrt(np.square(factor).sum(1)))
        return self._best(mean + noise @ factor.T)

    def allocation(self) -> Array:
        """The best allocation by the posterior mean, (2M,) int64."""
        best: Array = self._best(self._posterior()[0][None])[0]
        return best

    def coefficients(self) -> Array:
        """Posterior mean of w, (M, S), in standard deviations of the reward within a round."""
        return self._posterior()[0].reshape(self.spec.num_matrices, -1)

    def probabilities(self, observation: Array) -> Array:
        """1 for the choices of `allocation`: (L, M, F) -> (L, M, R, S) float32."""
        return one_hot(np.repeat(self.allocation()[None], len(observation), axis=0), self.spec)

    def _best(self, coefficients: Array) -> Array:
        values = coefficients.reshape(len(coefficients), self.spec.num_matrices, 1, -1) * self.gain[:, None]
        return best_choices(values, self.spec, self.limit)

    def _posterior(self) -> tuple[Array, Array]:
        """Mean (D,), and F (D, D) with F·Fᵀ the covariance; the reward's scale and noise are estimated."""
        size, scale = len(self.xy), math.sqrt(self.yy / max(self.count, 1)) or 1.0
        noise = self._noise()
        precision = self.xx / noise**2 + np.eye(size) / self.prior**2
        root = np.linalg.cholesky(precision)
        mean = np.linalg.solve(root.T, np.linalg.solve(root, self.xy / scale / noise**2))
        return mean, np.linalg.inv(root).T

    def _noise(self) -> float:
        """Standard deviation of what the model leaves unexplained, in those of the reward, in [0.05, 1]."""
        if self.count < 2:
            return 1.0
        scale = self.yy / self.count
        ridge = self.xx + np.eye(len(self.xy)) / self.prior**2
        fit = np.linalg.solve(ridge, self.xy)
        freedom = np.trace(np.linalg.solve(ridge, self.xx))
        left = max(self.yy - 2 * fit @ self.xy + fit @ self.xx @ fit, 0.0) / max(self.count - freedom, 1.0)
        return float(np.clip(math.sqrt(left / scale) if scale else 1.0, 0.05, 1.0))

    def update(self, transition: Transition) -> dict[str, float]:
        """Let one round of lanes count; lanes that diverged or have no finite reward do not.

        Returns:
            ``noise``: the share of the rewards' standard deviation that the model does not explain.
        """
        diverged = np.asarray(transition.info.get("diverged", np.zeros(len(transition.reward))), dtype=bool)
        usable = np.isfinite(transition.reward) & ~diverged  # a penalty is no loss
        if not usable.any():
            return {}
        reward = (transition.reward - known_part(transition))[usable]
        both = np.concatenate([self._design(transition.action[usable]), reward[:, None]], axis=1)  # (L, D + 1)
        mean, alone = both.mean(0), len(both) < 2
        usual = self.earlier / max(self.weight, 1.0) if alone else mean
        self.earlier, counts = DECAY * self.earlier + mean, self.weight > 0 or not alone
        self.weight = DECAY * self.weight + 1
        if counts:
            x, y = (both - usual)[:, :-1], (both - usual)[:, -1]
            self.xx, self.xy = self.xx + x.T @ x, self.xy + x.T @ y
            self.yy, self.count = self.yy + float(y @ y), self.count + len(y) - (0 if alone else 1)
        return {"noise": self._noise()}

    def _design(self, action: Array) -> Array:
        """log2(1 + rank) in the column of each matrix's location: (L, 2M) -> (L, D)."""
        pairs = action.reshape(len(action), -1, 2)
        design = np.zeros((*pairs.shape[:2], len(self.spec.locations)))
        np.put_along_axis(design, pairs[..., 1:], self.gain[pairs[..., :1]], axis=2)
        return design.reshape(len(action), -1)

    def state_dict(self) -> dict[str, Any]:
        """Sums of the regression and the generator."""
        return {"agent": "additive", "spec": self.spec.fingerprint(),
                "xx": torch.from_numpy(self.xx.copy()), "xy": torch.from_numpy(self.xy.copy()),
                "yy": self.yy, "count": self.count, "earlier": torch.from_numpy(self.earlier.copy()),
                "weight": self.weight, "generator": self.generator.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue.

        Raises:
            LeLoRAError: The state is of another agent, or of other matrices or locations.
        """
        if state.get("agent") != "additive" or len(state["xy"]) != len(self.xy):
            raise LeLoRAError(f"expected the state of an additive agent with {len(self.xy)} coefficients (got one of "
                              f"{state.get('agent')!r} with {len(state.get('xy', []))})")
        self.spec.check_fingerprint(state["spec"])
        self.xx, self.xy = state["xx"].numpy().copy(), state["xy"].numpy().copy()
        self.yy, self.count = state["yy"], state["count"]
        self.earlier, self.weight = state["earlier"].numpy().copy(), state["weight"]
        self.generator.bit_generator.state = state["generator"]
