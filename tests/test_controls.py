"""Agents that do not learn do exactly what they say."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from agents import AgentSpec, FixedAllocation, RandomAllocation, make_agent
from lelora_env.errors import LeLoRAError
from tests.toy_env import ToyEnv, ToyVectorEnv


def test_random_is_uniform_over_legal_choices() -> None:
    env = ToyVectorEnv(500, num_matrices=4, small_matrices=2)
    agent = RandomAllocation(AgentSpec.from_env(env), seed=7)
    observation = np.zeros((500, 4, 8), dtype=np.float32)
    drawn = np.concatenate([agent.act(observation) for _ in range(6)]).reshape(-1, 4, 2)
    assert drawn.dtype == np.int64
    for matrix in range(4):
        legal = 3 if matrix < 2 else 4
        ranks = np.bincount(drawn[:, matrix, 0], minlength=4)
        assert ranks[legal:].sum() == 0
        assert stats.chisquare(ranks[:legal]).pvalue > 1e-3
        assert stats.chisquare(np.bincount(drawn[:, matrix, 1], minlength=3)).pvalue > 1e-3
    table = stats.contingency.crosstab(drawn[:, 2, 0], drawn[:, 3, 0])[1]
    assert stats.chi2_contingency(table).pvalue > 1e-3  # matrices are drawn independently


def test_random_draws_anew_and_its_state_continues_the_draws() -> None:
    spec = AgentSpec.from_env(ToyEnv())
    agent, other = RandomAllocation(spec, seed=0), RandomAllocation(spec, seed=1)
    observation = np.zeros((2, 6, 8), dtype=np.float32)
    first = agent.act(observation)
    assert not np.array_equal(first, other.act(observation))
    other.load_state_dict(agent.state_dict())
    again = agent.act(observation)
    assert not np.array_equal(first, again)
    np.testing.assert_array_equal(again, other.act(observation))


@pytest.mark.parametrize(("options", "expected"), [
    ({}, [2, 0, 3, 0, 3, 0]),  # the largest rank, clipped where it is illegal, at the first location
    ({"rank": 4, "location": "minor"}, [2, 2] * 3),
    ({"rank": 0}, [0, 0] * 3),
    ({"allocation": [(0, "minor"), (8, "medium"), (2, "primary")]}, [0, 2, 3, 1, 1, 0]),
])
def test_fixed_does_what_it_says(options: dict[str, Any], expected: list[int]) -> None:
    agent = make_agent("fixed", ToyEnv(num_matrices=3, small_matrices=1), **options)
    for lanes in (1, 4):
        action = agent.act(np.zeros((lanes, 3, 8), dtype=np.float32))
        np.testing.assert_array_equal(action, [expected] * lanes)
        assert action.dtype == np.int64
    twin = FixedAllocation(AgentSpec.from_env(ToyEnv(num_matrices=3)), rank=0)
    twin.load_state_dict(agent.state_dict())
    np.testing.assert_array_equal(twin.action, expected)


@pytest.mark.parametrize(("options", "message"), [
    ({"rank": 3}, "rank set"),
    ({"location": "major"}, "Known: medium, minor, primary"),
    ({"location": 0.25}, "unknown location"),
    ({"location": [1]}, r"location of agent 'fixed' must be text or a number or none \(got \[1\]\)"),
    ({"rank": "abc"}, r"rank of agent 'fixed' must be an integer or none \(got 'abc'\)"),
    ({"allocation": 5}, "allocation of agent 'fixed' must be a list"),
    ({"allocation": [1, 2, 3]}, "a pair"),
    ({"allocation": [(8, "minor", 1)] * 3}, "one .rank, location. pair a matrix"),
    ({"allocation": [(2, [1])] * 3}, "location must be a name or a fraction"),
    ({"allocation": [(8, "minor")]}, "each of the 3 matrices"),
    ({"allocation": [(8, "minor")] * 3}, "not legal for matrix 0"),
    ({"allocation": [(2, "minor")] * 3, "rank": 2}, "not both"),
])
def test_fixed_refuses_what_cannot_be_chosen(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LeLoRAError, match=message):
        make_agent("fixed", ToyEnv(num_matrices=3, small_matrices=1), **options)


def test_a_frozen_draw_is_kept_and_travels_with_the_state() -> None:
    env = ToyVectorEnv(3)
    observation = env.reset()[0]
    agent = make_agent("random", env, seed=0, frozen=True)
    first = agent.act(observation)
    assert np.array_equal(agent.act(observation), first)
    assert not np.array_equal(first[0], first[1])  # each lane has its own
    other = make_agent("random", env, seed=1, frozen=True)
    other.load_state_dict(agent.state_dict())
    assert np.array_equal(other.act(observation), first)
    with pytest.raises(LeLoRAError, match="the saved draw is for 6 matrices, the environment has 5"):
        make_agent("random", ToyVectorEnv(3, num_matrices=5), frozen=True).load_state_dict(agent.state_dict())
    moving = make_agent("random", env, seed=0)
    assert not np.array_equal(moving.act(observation), moving.act(observation))
