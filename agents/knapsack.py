"""The best choices under a budget of trained parameters.

Shapes: L lanes · M matrices · R ranks · S locations.
"""

import numpy as np

from agents.agent import Array
from agents.spec import AgentSpec

HALVINGS = 60
"""Halvings of the interval in which the price of a parameter is sought."""

UPGRADES = 32
"""At most so many single choices are improved with the last of the budget."""


def best_choices(values: Array, spec: AgentSpec, limit: int | None = None) -> Array:
    """The legal choices of greatest total value whose parameters stay within a limit: (L, 2M) int64.

    A multiple-choice knapsack, solved by its Lagrangian: with a price on every parameter, each matrix takes the choice
    of greatest value less price; the lowest price that meets the limit is found by halving. As many matrices as fit
    then take what they would take just below that price, and what is left goes to single choices, best value per
    parameter first. Optimal up to the last few choices (exact where value is concave in rank, ranks are equally spaced
    and all matrices cost the same). Ties go to the smaller rank and to the earlier matrix.

    Args:
        values: (L, M, R, S), of each choice of each matrix; finite, or -inf for choices that are not to be made.
        spec: What can be chosen and what it costs.
        limit: Most parameters a lane may train (`AgentSpec.limit`); ``None`` = no limit.
    """
    flat = np.where(spec.legal, values, -np.inf).reshape(*values.shape[:2], -1)  # (L, M, R·S)
    if limit is None:
        return _actions(flat.argmax(-1), spec)
    sizes = np.repeat(spec.sizes(), values.shape[3], axis=1).astype(np.float64)  # (M, R·S)
    chosen = flat.argmax(-1)
    over = _total(chosen, sizes) > limit
    if over.any():
        chosen[over] = _priced(flat[over], sizes, limit)
        chosen[over] = _upgraded(chosen[over], flat[over], sizes, limit)
    return _actions(chosen, spec)


def _total(chosen: Array, sizes: Array) -> Array:
    """Parameters of each lane's choices, (L,)."""
    total: Array = np.take_along_axis(sizes[None], chosen[..., None], axis=2).sum((1, 2))
    return total


def _priced(flat: Array, sizes: Array, limit: int) -> Array:
    """The choices at the lowest price that meets the limit, and those just below it where they fit too, (L, M)."""
    low, high = np.zeros(len(flat)), 2 * np.ptp(np.where(np.isfinite(flat), flat, 0.0), axis=(1, 2))
    for _ in range(HALVINGS):  # at `high` the smallest rank is best everywhere: sizes differ by 1 or more
        price = (low + high) / 2
        fits = _total((flat - price[:, None, None] * sizes).argmax(-1), sizes) <= limit
        low, high = np.where(fits, low, price), np.where(fits, price, high)
    best, more = ((flat - price[:, None, None] * sizes).argmax(-1) for price in (high, low))
    extra = [np.take_along_axis(sizes[None], choice[..., None], axis=2)[..., 0] for choice in (best, more)]
    spent = _total(best, sizes)[:, None] + (extra[1] - extra[0]).cumsum(1)
    chosen: Array = np.where(spent <= limit, more, best)
    return chosen


def _upgraded(chosen: Array, flat: Array, sizes: Array, limit: int) -> Array:
    """Spend what is left: in each round every lane changes the one choice that gains most for its parameters."""
    lanes = np.arange(len(chosen))
    for _ in range(UPGRADES):
        now = np.take_along_axis(flat, chosen[..., None], axis=2)
        more = sizes - np.take_along_axis(np.broadcast_to(sizes, flat.shape), chosen[..., None], axis=2)
        gain = np.where(more <= (limit - _total(chosen, sizes))[:, None, None], flat - now, -np.inf)
        worth = np.where(gain > 0, gain / np.maximum(more, 1), -np.inf).reshape(len(chosen), -1)
        best = worth.argmax(1)
        improves = np.isfinite(worth[lanes, best])
        if not improves.any():
            break
        matrix, choice = np.divmod(best, flat.shape[2])
        chosen[lanes[improves], matrix[improves]] = choice[improves]
    return chosen


def _actions(chosen: Array, spec: AgentSpec) -> Array:
    """Indices of choices (L, M) as actions (L, 2M)."""
    pairs = np.stack(np.divmod(chosen, len(spec.locations)), axis=-1)
    action: Array = pairs.reshape(len(chosen), -1).astype(np.int64)
    return action
