"""The bandit in every matrix: it finds the best arm, and its numbers are those of its description."""

from typing import Any

import numpy as np
import pytest

from agents import Transition, make_agent, run
from agents.baseline import CLIP, RunningMean, scaled
from lelora_env.errors import LeLoRAError
from tests.toy_env import Array, ToyEnv, ToyVectorEnv


def _transition(action: Array, reward: list[float], matrices: int) -> Transition:
    lanes = len(reward)
    observation, none = np.zeros((lanes, matrices, 8), dtype=np.float32), np.zeros(lanes, dtype=bool)
    return Transition(observation, action, np.asarray(reward), none, none, {}, observation)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("lanes", [1, 4])
def test_finds_the_best_arms(lanes: int, seed: int) -> None:
    """Chance is 0.29; what rank 0 leaves open (its location) cannot be right but by chance."""
    env = ToyVectorEnv(lanes, horizons=50, problem=seed)
    history = run(env, make_agent("bandit", env, seed=seed), env_steps=2000 // lanes, seed=0)
    assert float(np.mean(history.rewards[-100:])) > 0.7
    assert float(np.mean(history.rewards[:5])) < 0.45


def test_counts_and_credits_equal_a_loop() -> None:
    """Leave-one-out, units of the root mean square, one arm for rank 0, fading counts: written out."""
    env, rng = ToyVectorEnv(3, num_matrices=2), np.random.default_rng(0)
    agent: Any = make_agent("bandit", env, memory=0.9)
    count, total, squares = np.zeros((2, 4, 3)), np.zeros((2, 4, 3)), []
    for _ in range(12):
        action, reward = rng.integers([4, 3] * 2, size=(3, 4)), rng.normal(size=3)
        agent.update(_transition(action, reward.tolist(), 2))
        advantage = [reward[i] - np.mean([reward[j] for j in range(3) if j != i]) for i in range(3)]
        squares.append(np.mean(np.square(advantage)))
        weights = 0.99 ** np.arange(len(squares))[::-1]
        unit = np.sqrt(weights @ squares / weights.sum())
        count, total = 0.9 * count, 0.9 * total
        for lane in range(3):
            for matrix in range(2):
                rank, place = action[lane, 2 * matrix : 2 * matrix + 2]
                place = 0 if rank == 0 else place
                count[matrix, rank, place] += 1
                total[matrix, rank, place] += advantage[lane] / unit
    np.testing.assert_allclose(agent.count, count, rtol=1e-12)
    np.testing.assert_allclose(agent.total, total, rtol=1e-9, atol=1e-12)


def test_draws_follow_the_stated_normal() -> None:
    """One matrix of two legal ranks, one tried 9 times with credit 9·0.5: P(it wins) from the difference of normals."""
    from scipy.stats import norm

    env = ToyVectorEnv(20_000, num_matrices=1)
    agent: Any = make_agent("bandit", env)
    agent.spec.rank_mask[:, 2:] = False
    agent.spec.location_mask[:, 1:] = False
    agent.count[0, 1, 0], agent.total[0, 1, 0] = 9, 4.5
    share = (agent.act(np.zeros((20_000, 1, 8)))[:, 0] == 1).mean()
    assert share == pytest.approx(norm.cdf(0.45 / np.sqrt(1 / 10 + 1)), abs=0.015)


def test_probabilities_sum_to_one_stay_legal_and_move_no_generator() -> None:
    env = ToyVectorEnv(3, num_matrices=4, small_matrices=2)
    agent: Any = make_agent("bandit", env, seed=0)
    run(env, agent, env_steps=5, seed=0)
    observation, before = env.reset()[0], agent.generator.bit_generator.state
    found = agent.probabilities(observation)
    assert found.shape == (3, 4, 4, 3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.sum((2, 3)), 1, rtol=1e-5)
    np.testing.assert_array_equal(found, agent.probabilities(observation))
    assert (found[:, :2, 3] == 0).all()
    assert (found[:, :, 0, 1:] == 0).all()  # rank 0 is one arm
    assert agent.generator.bit_generator.state == before
    drawn = np.concatenate([agent.act(observation) for _ in range(100)]).reshape(-1, 4, 2)
    assert drawn[:, :2, 0].max() == 2


def test_lanes_without_a_reward_do_not_count_and_one_that_diverged_blinds_nobody() -> None:
    env, rng = ToyVectorEnv(4, num_matrices=2), np.random.default_rng(0)
    agent: Any = make_agent("bandit", env)
    other: Any = make_agent("bandit", env)
    action = rng.integers([4, 3] * 2, size=(4, 4))
    agent.update(_transition(action, [1.0, 2.0, np.nan, 0.5], 2))
    other.update(_transition(action[[0, 1, 3]], [1.0, 2.0, 0.5], 2))
    np.testing.assert_array_equal(agent.total, other.total)
    assert agent.update(_transition(action, [np.nan] * 4, 2)) == {}
    before = agent.square.value
    agent.update(_transition(action, [1.0, 2.0, -1e9, 0.5], 2))
    assert np.abs(agent.total - other.total * 0.999).max() <= 4 * CLIP
    assert agent.square.value < (CLIP**2 + 1) * before  # what comes after still counts


def test_equal_rewards_and_equal_actions_are_safe_and_teach_nothing() -> None:
    agent: Any = make_agent("bandit", ToyVectorEnv(3, num_matrices=2))
    same = np.ones((3, 4), dtype=np.int64)
    for _ in range(3):
        assert agent.update(_transition(same, [0.3] * 3, 2)) == {"advantage": pytest.approx(0, abs=1e-12)}
    np.testing.assert_allclose(agent.total, 0, atol=1e-9)
    agent.update(_transition(same, [0.1, 0.2, 0.6], 2))  # what all lanes did is neither better nor worse
    np.testing.assert_allclose(agent.total, 0, atol=1e-9)
    different = np.array([[1, 0, 1, 0], [2, 0, 2, 0], [3, 0, 3, 0]])
    agent.update(_transition(different, [0.0, 0.0, 1.0], 2))
    assert agent.total[0, 3, 0] > 0.5


def test_scaled_advantages_begin_to_count_after_a_start_without_any() -> None:
    square, both = RunningMean(0.99), np.ones(2, dtype=bool)
    assert scaled(np.zeros(2), both, square).tolist() == [0, 0]
    np.testing.assert_allclose(scaled(np.array([1.0, -1.0]), both, square), np.sqrt(1.99) * np.array([1, -1]))


@pytest.mark.parametrize("lanes", [2, 64])
def test_no_scaled_advantage_is_above_the_clip(lanes: int) -> None:
    square, every = RunningMean(0.99), np.ones(lanes, dtype=bool)
    rng = np.random.default_rng(0)
    for step in range(6):
        advantage = rng.normal(size=lanes)
        advantage[0] = -1e12 if step in (0, 3) else advantage[0]
        assert np.abs(scaled(advantage, every, square)).max() <= CLIP


def test_same_seed_same_curve_and_a_state_continues_it() -> None:
    def start(seed: int) -> tuple[ToyVectorEnv, Any]:
        env = ToyVectorEnv(2, horizons=[3, 4])
        return env, make_agent("bandit", env, seed=seed)

    curves = []
    for seed in (0, 0, 1):
        env, agent = start(seed)
        curves.append(np.stack(run(env, agent, env_steps=20, seed=0).rewards))
    np.testing.assert_array_equal(curves[0], curves[1])
    assert not np.array_equal(curves[0], curves[2])
    env, agent = start(0)
    run(env, agent, env_steps=7, seed=0)
    state, other = agent.state_dict(), start(5)[1]
    first = np.stack(run(env, agent, env_steps=9, seed=0).rewards)
    other.load_state_dict(state)
    np.testing.assert_array_equal(first, np.stack(run(env, other, env_steps=9, seed=0).rewards))
    np.testing.assert_array_equal(agent.total, other.total)


def test_what_it_refuses() -> None:
    for memory in (0.0, 1.1, float("nan")):
        with pytest.raises(LeLoRAError, match="memory must be in"):
            make_agent("bandit", ToyEnv(), memory=memory)
    state = make_agent("bandit", ToyEnv(num_matrices=5)).state_dict()
    with pytest.raises(LeLoRAError, match=r"bandit over \(6, 4, 3\) choices \(got one over \(5, 4, 3\)\)"):
        make_agent("bandit", ToyEnv()).load_state_dict(state)
    with pytest.raises(LeLoRAError, match="expected the state of a bandit"):
        make_agent("bandit", ToyEnv()).load_state_dict(make_agent("additive", ToyEnv()).state_dict())
