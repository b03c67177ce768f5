"""The best choices under a budget, against every combination there is."""

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from agents import AgentSpec
from agents.knapsack import best_choices
from lelora_env.errors import LeLoRAError
from tests.toy_env import Array, ToyEnv


def _spec(matrices: int = 4, sizes: list[int] | None = None, ranks: tuple[int, ...] = (0, 2, 4, 8),
          small: int = 0) -> AgentSpec:
    """Matrices whose components cost `sizes` each (default: alike); the first `small` cannot have the largest rank."""
    spec = AgentSpec.from_env(ToyEnv(num_matrices=matrices, small_matrices=small))
    costs = np.outer(np.array(sizes or [10] * matrices), np.array(ranks))
    return replace(spec, rank_set=ranks, choice_sizes=costs)


def _worth(action: Array, values: Array, spec: AgentSpec) -> tuple[float, int]:
    """Total value and parameters of one lane's action, summed one matrix at a time."""
    pairs = action.reshape(-1, 2).tolist()
    assert spec.choice_sizes is not None
    return (sum(float(values[m, r, s]) for m, (r, s) in enumerate(pairs)),
            sum(int(spec.choice_sizes[m, r]) for m, (r, _) in enumerate(pairs)))


def _optimum(values: Array, spec: AgentSpec, limit: int) -> float:
    """Of all legal allocations within the limit: the value of the best."""
    assert spec.choice_sizes is not None
    choices = [[(float(values[m, r, s]), int(spec.choice_sizes[m, r])) for r, s in zip(*np.nonzero(legal), strict=True)]
               for m, legal in enumerate(spec.rank_mask[:, :, None] & spec.location_mask[:, None, :])]
    totals = (map(sum, zip(*combination, strict=True)) for combination in itertools.product(*choices))
    return max(value for value, cost in totals if cost <= limit)


def _concave(rng: np.random.Generator, matrices: int, ranks: tuple[int, ...]) -> Array:
    """Values that rise with rank, ever less per rank."""
    gains = np.sort(rng.uniform(0, 1, (matrices, len(ranks) - 1, 3)), axis=1)[:, ::-1] * np.diff(ranks)[:, None]
    return np.concatenate([np.zeros((matrices, 1, 3)), gains.cumsum(1)], axis=1)


@pytest.mark.parametrize("share", [0.2, 0.45, 0.5, 0.7, 1.0])
def test_near_the_optimum_and_never_above_the_limit(share: float) -> None:
    rng, lost = np.random.default_rng(0), []
    spec = _spec(4, [10, 30, 20, 7], small=1)
    limit = spec.limit(share)
    for trial in range(12):
        values = rng.normal(size=(4, 4, 3)) if trial % 2 else _concave(rng, 4, (0, 2, 4, 8))
        found, cost = _worth(best_choices(values[None], spec, limit)[0], values, spec)
        best = _optimum(values, spec, limit)
        assert cost <= limit
        assert found <= best + 1e-9
        lost.append((best - found) / best)
    assert np.mean(lost) < 0.03
    assert max(lost) < 0.15


@pytest.mark.parametrize("limit", [0, 10, 20, 50, 60, 90, 110, 120, 125])
def test_exact_where_value_is_concave_and_ranks_and_costs_are_even(limit: int) -> None:
    ranks, rng = (0, 1, 2, 3), np.random.default_rng(1)
    spec = _spec(4, ranks=ranks)
    for _ in range(5):
        values = _concave(rng, 4, ranks)
        found, cost = _worth(best_choices(values[None], spec, limit)[0], values, spec)
        assert cost <= limit
        assert found == pytest.approx(_optimum(values, spec, limit), abs=1e-9)


def test_lanes_are_solved_as_if_alone_however_different_their_scales() -> None:
    rng = np.random.default_rng(2)
    spec = _spec(5, [10, 30, 20, 7, 13])
    scale = np.array([1, 1e-9, 1e9, 1e-3, 1, 1e20]).reshape(-1, 1, 1, 1)
    values = rng.normal(size=(6, 5, 4, 3)) * scale
    limit = spec.limit(0.4)
    together = best_choices(values, spec, limit)
    np.testing.assert_array_equal(together, np.concatenate([best_choices(v[None], spec, limit) for v in values]))
    np.testing.assert_array_equal(together, best_choices(values / scale, spec, limit))


@pytest.mark.parametrize("matrices", [5, 160])
def test_equal_values_still_use_the_budget_up(matrices: int) -> None:
    spec = _spec(matrices)
    values = np.broadcast_to(np.log2(1.0 + np.array(spec.rank_set))[:, None], (1, matrices, 4, 3))
    limit = int(0.7 * 80 * matrices)
    _, cost = _worth(best_choices(values, spec, limit)[0], values[0], spec)
    assert limit - 20 < cost <= limit


def test_what_is_not_to_be_chosen_never_is() -> None:
    spec = _spec(6, small=3)
    values = np.full((1, 6, 4, 3), -np.inf)
    values[..., 2] = np.arange(4)
    for limit in (None, 80, 0):
        pairs = best_choices(values, spec, limit)[0].reshape(-1, 2)
        assert (pairs[:, 1] == 2).all()
        assert (pairs[:3, 0] <= 2).all()
    assert best_choices(values, spec)[0].reshape(-1, 2)[:, 0].tolist() == [2, 2, 2, 3, 3, 3]


def test_no_limit_or_a_loose_one_takes_the_best_and_ties_go_to_the_smaller_rank() -> None:
    spec, rng = _spec(3), np.random.default_rng(3)
    values = rng.normal(size=(2, 3, 4, 3))
    free = best_choices(values, spec)
    assert free.dtype == np.int64
    for lane in range(2):
        for matrix, (rank, place) in enumerate(free[lane].reshape(-1, 2)):
            assert values[lane, matrix, rank, place] == values[lane, matrix].max()
    np.testing.assert_array_equal(free, best_choices(values, spec, 240))
    assert not best_choices(np.zeros((1, 3, 4, 3)), spec, 100).any()


def test_one_matrix_and_a_limit_that_is_met_exactly() -> None:
    spec = _spec(1)
    values = np.arange(12.0).reshape(1, 1, 4, 3)
    for limit, rank in ((0, 0), (19, 0), (20, 1), (40, 2), (79, 2), (80, 3)):
        assert best_choices(values, spec, limit)[0].tolist() == [rank, 2]


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.01, float("nan"), float("inf")])
def test_a_budget_is_a_share(budget: float) -> None:
    with pytest.raises(LeLoRAError, match=r"budget must be in \(0, 1\]"):
        _spec().limit(budget)


def test_a_budget_below_the_smallest_ranks_is_refused() -> None:
    spec = _spec(2, ranks=(2, 4, 6, 8))
    assert spec.limit(0.25) == 40
    with pytest.raises(LeLoRAError, match="below the least that can train, 40"):
        spec.limit(0.24)


def test_an_environment_that_says_nothing_of_sizes_is_refused() -> None:
    nothing: Any = replace(_spec(), choice_sizes=None)
    with pytest.raises(LeLoRAError, match="use it on LeLoRA-v0"):
        nothing.limit(0.5)
