"""Rules: allocations computed from spectra, sensitivities or credit, without a policy.

All of them spend a budget of trained parameters, a share of what the largest ranks everywhere train, where their
measure says it is worth most.

Shapes: L lanes · M matrices · F features · R ranks · S locations · K bank slots.
"""

from typing import Any

import numpy as np
import torch

from agents.agent import Array, Transition
from agents.knapsack import best_choices
from agents.spec import AgentSpec, one_hot
from lelora_env.errors import LeLoRAError, UnknownNameError


class SpectralEnergy:
    """Ranks by spectral energy: the more components a matrix needs for its energy, the more of them train.

    A matrix's demand d is the number of leading components that hold a share `energy` of Σσ², read from the observed
    spectrum. Ranks then maximise Σ d·log2(1 + r) within the budget, so r + 1 grows in proportion to demand per
    parameter. The rule in the literature (rank = demand, as in energy-threshold truncation) gives hundreds for
    pretrained weights, above any rank set; what is kept of it is the order of the matrices.
    """

    def __init__(self, spec: AgentSpec, *, budget: float = 0.5, energy: float = 0.9,
                 location: str | float | None = None) -> None:
        """Prepare the rule.

        Args:
            spec: What is observed and chosen; needs at least two ``sv_*`` columns.
            budget: Share of what the largest ranks train, in (0, 1].
            energy: Share of the spectral energy, in (0, 1).
            location: Where every matrix trains; ``None`` = the first location.

        Raises:
            LeLoRAError: An option out of range, or no spectrum is observed.
        """
        if not 0 < energy < 1:
            raise LeLoRAError(f"energy must be in (0, 1) (got {energy!r})")
        self.columns = [i for i, name in enumerate(spec.feature_names) if name.startswith("sv_")]
        if len(self.columns) < 2:
            raise LeLoRAError("the energy rule reads the singular values: make the environment with spectrum=32")
        self.spec, self.energy, self.limit = spec, energy, spec.limit(budget)
        name = spec.locations[0] if location is None else spec.location_name(location)
        self.place = spec.locations.index(name)
        self.low = float(spec.observation_space.low[0, self.columns[0]])
        self.raw = self.low >= 0

    def act(self, observation: Array) -> Array:
        """The allocation for the observed spectra: (L, M, F) -> (L, 2M) int64."""
        demand = self.demand(observation)
        values = np.full((*demand.shape, len(self.spec.rank_set), len(self.spec.locations)), -np.inf)
        values[..., self.place] = demand[..., None] * np.log2(1.0 + np.array(self.spec.rank_set))
        return best_choices(values, self.spec, self.limit)

    def demand(self, observation: Array) -> Array:
        """Components that hold the share of energy, (L, M), as a number between 1 and the matrix's size."""
        shown = observation[..., self.columns].astype(np.float64)  # (L, M, points)
        square = np.square(shown) if self.raw else np.exp(8 * shown)  # shown = ln(σ / rms) / 4
        share = square.cumsum(-1) / np.maximum(square.sum(-1, keepdims=True), 1e-300)
        size = np.array([min(m.out_features, m.in_features) for m in self.spec.matrices])  # (M,)
        last = np.where(self._padded(shown, size), size, len(self.columns)) - 1
        part = (share < self.energy).sum(-1) / np.maximum(last, 1)  # (L, M), in [0, 1]
        demand: Array = 1.0 + np.minimum(part, 1) * (size - 1)
        return demand

    def _padded(self, shown: Array, size: Array) -> Array:
        """Matrices whose spectrum is shown whole and filled up with the lowest value, (L, M) bool."""
        beyond = np.arange(shown.shape[-1]) >= size[:, None]  # (M, points)
        whole = beyond.any(-1) & (size.max() == shown.shape[-1])
        padded: Array = whole & ((shown <= self.low) | ~beyond).all(-1)
        return padded

    def probabilities(self, observation: Array) -> Array:
        """1 for the rule's choices: (L, M, F) -> (L, M, R, S) float32."""
        return one_hot(self.act(observation), self.spec)

    def update(self, transition: Transition) -> dict[str, float]:
        """Learns nothing."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Nothing but its name: the rule is a function of what is observed."""
        return {"agent": "energy"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore.

        Raises:
            LeLoRAError: The state is of another agent.
        """
        if state.get("agent") != "energy":
            raise LeLoRAError(f"expected the state of an energy agent (got one of {state.get('agent')!r})")


MEASURES = ("sensitivity", "adalora")


class Sensitivity:
    """Trains where the loss is most sensitive to the components, by a measure that the environment reports.

    ``sensitivity``: I = |w·∂L/∂w| summed over a component's numbers, its running mean over the steps of a run; after
    TLoRA, which allots ranks by the mean of |w·∂L/∂w| over a whole weight. ``adalora``: AdaLoRA's importance (Zhang et
    al., 2023), Ī·Ū with Ī ← β·Ī + (1-β)·I and Ū ← β·Ū + (1-β)·|I - Ī|, both from 0, here per component instead of per
    number. Windows of components are taken by their sums, within the budget; a run begins with equal ranks at the first
    location.
    """

    def __init__(self, spec: AgentSpec, *, measure: str = "sensitivity", budget: float = 0.5,
                 decay: float = 0.85) -> None:
        """Prepare the rule; the environment must be made with ``component_info=("sensitivity",)``.

        Args:
            spec: What can be chosen.
            measure: One of `MEASURES`.
            budget: Share of what the largest ranks train, in (0, 1].
            decay: β, the decay of the running means, in [0, 1), above 0 for ``adalora``; 0.85 is AdaLoRA's.

        Raises:
            UnknownNameError: No such measure.
            LeLoRAError: An option out of range.
        """
        if measure not in MEASURES:
            raise UnknownNameError("measure", measure, MEASURES)
        if not 0 <= decay < 1 or (measure == "adalora" and decay == 0):
            raise LeLoRAError(f"decay must be in [0, 1), and above 0 for adalora (got {decay!r})")
        self.spec, self.measure, self.decay, self.limit = spec, measure, decay, spec.limit(budget)
        shape = (spec.num_lanes, *windows(spec)[:, 0, 0].shape)  # (L, M, K)
        self.mean, self.deviation = np.zeros(shape), np.zeros(shape)
        self.steps = np.zeros(spec.num_lanes, dtype=np.int64)

    def act(self, observation: Array) -> Array:
        """The windows of greatest measure: (L, M, F) -> (L, 2M) int64; one lane alone is read as the first.

        Raises:
            LeLoRAError: Another number of lanes than the agent was made for.
        """
        lanes = len(observation)
        if lanes not in (1, len(self.steps)):
            raise LeLoRAError(f"this agent was made for {len(self.steps)} lanes (got {lanes}): it keeps means of each")
        scores = self.mean * self.deviation if self.measure == "adalora" else self.mean
        values = window_sums(scores[:lanes], self.spec)
        values = np.where(self.steps[:lanes, None, None, None] > 0, values, equal_ranks(self.spec))
        return best_choices(values, self.spec, self.limit)

    def probabilities(self, observation: Array) -> Array:
        """1 for the rule's choices: (L, M, F) -> (L, M, R, S) float32."""
        return one_hot(self.act(observation), self.spec)

    def update(self, transition: Transition) -> dict[str, float]:
        """Let the env step's measure count; lanes whose run ended begin anew.

        Raises:
            LeLoRAError: The environment does not report it.
        """
        found = component_info(transition, "sensitivity")
        kept = self.decay * (self.steps > 0)[:, None, None]
        self.mean = kept * self.mean + (1 - self.decay) * found
        self.deviation = kept * self.deviation + (1 - self.decay) * np.abs(found - self.mean)
        self.steps = np.where(transition.done, 0, self.steps + 1)
        return {"mean_sensitivity": float(found.mean())}

    def state_dict(self) -> dict[str, Any]:
        """Running means of every lane."""
        return {"agent": "sensitivity", "measure": self.measure, "steps": torch.from_numpy(self.steps.copy()),
                "mean": torch.from_numpy(self.mean.copy()), "deviation": torch.from_numpy(self.deviation.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue.

        Raises:
            LeLoRAError: The state is of another agent or measure, or of other matrices or ranks.
        """
        if (state.get("agent"), state.get("measure")) != ("sensitivity", self.measure):
            raise LeLoRAError(f"expected the state of a sensitivity agent with measure {self.measure!r} (got one of "
                              f"{state.get('agent')!r} with {state.get('measure')!r})")
        here, saved = self.mean.shape, tuple(state["mean"].shape)
        if saved != here:
            raise LeLoRAError(f"expected the state of a sensitivity agent over (lanes, matrices, components) = {here} "
                              f"(got one over {saved})")
        self.steps, self.mean, self.deviation = (state[n].numpy().copy() for n in ("steps", "mean", "deviation"))


class Credit:
    """Learns from per-component credit: what each component, chosen or not, would have taken off the reward loss.

    Keeps a running mean of every component's credit (mean over lanes) and its standard error, over env steps and runs,
    and takes in each matrix the window whose sum of lower bounds (mean less `caution` standard errors) is greatest. A
    component whose credit is noise about 0 has a bound below 0 and stays out. A useless one that trains nonetheless
    drifts, and earns a little for being pulled back (on the built-in instance a hundredth of a needed one), so it takes
    a `price` to keep ranks small. No exploration is needed: credit tells of the components that were not chosen, too.
    It is first-order credit of one step (see ``EnvConfig.component_info``), so what pays off late is not seen.
    """

    def __init__(self, spec: AgentSpec, *, budget: float | None = None, caution: float = 1.0, price: float = 0.0,
                 decay: float = 0.98) -> None:
        """Prepare; the environment must be made with ``component_info=("credit",)``.

        Args:
            spec: What can be chosen.
            budget: Share of what the largest ranks train, in (0, 1]; ``None`` = no limit.
            caution: Standard errors taken off, at least 0.
            price: Credit (nats of reward loss) that one component costs, at least 0.
            decay: Decay of the running means per env step, in [0, 1).

        Raises:
            LeLoRAError: An option out of range.
        """
        if not (0 <= caution < np.inf and 0 <= price < np.inf and 0 <= decay < 1):
            raise LeLoRAError(f"caution and price must be at least 0 and decay in [0, 1) (got {caution!r}, {price!r}, "
                              f"{decay!r})")
        self.spec, self.caution, self.price, self.decay = spec, caution, price, decay
        self.limit = None if budget is None else spec.limit(budget)
        shape = windows(spec)[:, 0, 0].shape  # (M, K)
        self.mean, self.square = np.zeros(shape), np.zeros(shape)
        self.weight = self.weight_square = 0.0

    def values(self) -> Array:
        """The lower bound of every choice's credit, (M, R, S)."""
        if not self.weight:
            return equal_ranks(self.spec)
        mean, count = self.mean / self.weight, self.weight**2 / self.weight_square
        spread = np.sqrt(np.maximum(self.square / self.weight - mean**2, 0) / max(count - 1, 1))
        sums: Array = window_sums((mean - self.caution * spread - self.price)[None], self.spec)[0]
        return sums

    def act(self, observation: Array) -> Array:
        """The windows of greatest credit, once for every lane: (L, M, F) -> (L, 2M) int64."""
        action = best_choices(self.values()[None], self.spec, self.limit)
        return np.repeat(action, len(observation), axis=0)

    def probabilities(self, observation: Array) -> Array:
        """1 for the likeliest choices: (L, M, F) -> (L, M, R, S) float32."""
        return one_hot(self.act(observation), self.spec)

    def update(self, transition: Transition) -> dict[str, float]:
        """Let the env step's credit count.

        Raises:
            LeLoRAError: The environment does not report it.
        """
        found = component_info(transition, "credit")
        usable = np.isfinite(found).all((1, 2)) & found.any((1, 2))  # all 0: a lane that diverged says nothing
        if not usable.any():
            return {}
        found = found[usable].mean(0)  # lanes act alike, so their credit is no independent sample
        self.mean = self.decay * self.mean + found
        self.square = self.decay * self.square + np.square(found)
        self.weight = self.decay * self.weight + 1
        self.weight_square = self.decay**2 * self.weight_square + 1
        return {"mean_credit": float(found.mean())}

    def state_dict(self) -> dict[str, Any]:
        """Running sums."""
        return {"agent": "credit", "mean": torch.from_numpy(self.mean.copy()),
                "square": torch.from_numpy(self.square.copy()), "weight": self.weight,
                "weight_square": self.weight_square}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue.

        Raises:
            LeLoRAError: The state is of another agent, or of other matrices or ranks.
        """
        if state.get("agent") != "credit" or tuple(state["mean"].shape) != self.mean.shape:
            raise LeLoRAError(f"expected the state of a credit agent over {self.mean.shape} components (got one of "
                              f"{state.get('agent')!r}, {tuple(state.get('mean', np.zeros(0)).shape)})")
        self.mean, self.square = (state[name].numpy().copy() for name in ("mean", "square"))
        self.weight, self.weight_square = state["weight"], state["weight_square"]


def equal_ranks(spec: AgentSpec) -> Array:
    """Values by which every matrix gets about the same rank, at the first location: (M, R, S)."""
    ranks = np.log2(1.0 + np.array(spec.rank_set))[:, None]
    values: Array = np.broadcast_to(ranks - 1e-3 * np.arange(len(spec.locations)), spec.legal.shape)
    return values


def windows(spec: AgentSpec) -> Array:
    """The bank slots that each choice trains, (M, R, S, K) bool.

    Raises:
        LeLoRAError: The environment has no bank.
    """
    if spec.component_mask is None:
        raise LeLoRAError("this agent needs to know which components a choice trains, which this environment does not "
                          "say: use it on LeLoRA-v0")
    return spec.component_mask


def window_sums(scores: Array, spec: AgentSpec) -> Array:
    """Scores of components (L, M, K), summed over each choice's window: (L, M, R, S)."""
    sums: Array = np.einsum("lmk,mrsk->lmrs", scores, windows(spec).astype(scores.dtype))
    return sums


def component_info(transition: Transition, name: str) -> Array:
    """What the environment reports of every component, (L, M, K) float64.

    Raises:
        LeLoRAError: It does not.
    """
    key = f"component_{name}"
    if key not in transition.info:
        raise LeLoRAError(f"this agent learns from info[{key!r}]: make a LeLoRA-v0 environment with "
                          f"component_info={name!r}")
    return np.asarray(transition.info[key], dtype=np.float64)
