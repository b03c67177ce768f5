"""The additive model: planted coefficients, the closed form, and what lanes share."""

from typing import Any

import numpy as np
import pytest

from agents import AdditiveModel, AgentSpec, Transition, make_agent, run
from lelora_env.errors import LeLoRAError, UnknownNameError
from tests.toy_env import Array, ToyEnv, ToyVectorEnv

MATRICES = 5
GAIN = np.log2(1.0 + np.array([0, 2, 4, 8]))


def _spec(lanes: int = 8, matrices: int = MATRICES, small: int = 0) -> AgentSpec:
    return AgentSpec.from_env(ToyVectorEnv(lanes, num_matrices=matrices, small_matrices=small))


def _transition(action: Array, reward: Array, info: dict[str, Array] | None = None) -> Transition:
    lanes = len(reward)
    observation, ended = np.zeros((lanes, action.shape[1] // 2, 8), dtype=np.float32), np.ones(lanes, dtype=bool)
    return Transition(observation, action, reward, ended, ~ended, info or {}, observation)


def _seen(lanes: int) -> Array:
    return np.zeros((lanes, MATRICES, 8), dtype=np.float32)


def _random(rng: np.random.Generator, lanes: int) -> Array:
    return rng.integers([4, 3] * MATRICES, size=(lanes, 2 * MATRICES))


def _value(action: Array, planted: Array) -> Array:
    """Σ_m w[m, location]·log2(1 + rank), one term at a time."""
    pairs = action.reshape(len(action), -1, 2)
    return np.array([sum(planted[m, s] * GAIN[r] for m, (r, s) in enumerate(row)) for row in pairs.tolist()])


@pytest.mark.parametrize("lanes", [1, 2, 16])
def test_recovers_planted_coefficients_in_spite_of_noise_that_lanes_share(lanes: int) -> None:
    rng, planted = np.random.default_rng(0), np.random.default_rng(1).normal(0.5, 1.0, size=(MATRICES, 3))
    agent = AdditiveModel(_spec(lanes))
    for _ in range({1: 1500, 2: 800, 16: 60}[lanes]):
        action = _random(rng, lanes)
        shared = 20 * rng.normal() if lanes > 1 else 5.0
        agent.update(_transition(action, _value(action, planted) + shared + 0.5 * rng.normal(size=lanes)))
    found = agent.coefficients()
    assert found.shape == (MATRICES, 3)
    assert np.corrcoef(found.ravel(), planted.ravel())[0, 1] > 0.95
    scale = found.ravel() @ planted.ravel() / (planted.ravel() @ planted.ravel())
    assert np.abs(found / scale - planted).max() < 0.5  # no coefficient is off by a constant either


def test_the_posterior_is_the_closed_form() -> None:
    """Ridge regression by stacking the prior under the data as D further rows of 0, and least squares."""
    rng, prior = np.random.default_rng(0), 0.7
    agent = AdditiveModel(_spec(), prior=prior)
    planted = rng.normal(size=(MATRICES, 3))
    rows, targets = [], []
    for _ in range(9):
        action = _random(rng, 8)
        reward = _value(action, planted) + rng.normal(size=8)
        scalars = agent.update(_transition(action, reward))
        design = np.zeros((8, MATRICES * 3))
        for lane in range(8):
            for matrix, (rank, place) in enumerate(action[lane].reshape(-1, 2)):
                design[lane, 3 * matrix + place] = GAIN[rank]
        rows.append(design - design.mean(0))
        targets.append(reward - reward.mean())
    x, y = np.concatenate(rows), np.concatenate(targets)
    scale, noise = np.sqrt(y @ y / (9 * 7)), scalars["noise"]  # a round of 8 has 7 degrees of freedom
    stacked = np.concatenate([x / noise, np.eye(15) / prior])
    expected = np.linalg.lstsq(stacked, np.concatenate([y / scale / noise, np.zeros(15)]), rcond=None)[0]
    np.testing.assert_allclose(agent.coefficients().ravel(), expected, rtol=1e-6, atol=1e-9)
    factor = agent._posterior()[1]
    np.testing.assert_allclose(factor @ factor.T, np.linalg.inv(stacked.T @ stacked), rtol=1e-6, atol=1e-9)
    ridge = np.linalg.solve(x.T @ x + np.eye(15) / prior**2, x.T @ y)
    hat = np.trace(x @ np.linalg.solve(x.T @ x + np.eye(15) / prior**2, x.T))
    unexplained = np.sqrt(np.square(y - x @ ridge).sum() / (63 - hat)) / scale
    assert noise == pytest.approx(np.clip(unexplained, 0.05, 1), rel=1e-6)
    assert 0.1 < noise < 0.9


def test_thompson_draws_have_the_posteriors_mean_and_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    rng, agent = np.random.default_rng(0), AdditiveModel(_spec(4))
    for _ in range(3):  # fewer rounds than coefficients: far from a diagonal covariance
        action = _random(rng, 4)
        agent.update(_transition(action, rng.normal(size=4)))
    factor, seen = agent._posterior()[1], []
    monkeypatch.setattr(agent, "_best", lambda drawn: seen.append(drawn))
    agent.act(_seen(100_000))
    np.testing.assert_allclose(seen[0].mean(0), agent.coefficients().ravel(), atol=0.02)
    np.testing.assert_allclose(np.cov(seen[0].T), factor @ factor.T, atol=0.03)


def test_a_constant_for_every_round_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    agents = [AdditiveModel(_spec(), seed=3) for _ in range(2)]
    for _ in range(10):
        action, reward = _random(rng, 8), rng.normal(size=8)
        for agent, constant in zip(agents, (0.0, float(rng.normal() * 10)), strict=True):
            agent.update(_transition(action, reward + constant))
    np.testing.assert_allclose(agents[0].coefficients(), agents[1].coefficients(), rtol=1e-6, atol=1e-9)


def test_what_was_known_before_is_taken_off_for_a_lone_lane() -> None:
    """The loss before the step drifts; L1 - L2 says by how much, so that it does not matter."""
    rng, planted = np.random.default_rng(0), np.random.default_rng(1).normal(size=(MATRICES, 3))
    agent = AdditiveModel(_spec(1))
    for step in range(800):
        action, before = _random(rng, 1), 1000.0 - step + 30 * rng.normal(size=1)
        change = -_value(action, planted)
        info = {"L1": before + change, "L2": change}
        agent.update(_transition(action, -(before + change) - 0.8 * change, info))
    assert np.corrcoef(agent.coefficients().ravel(), planted.ravel())[0, 1] > 0.98


@pytest.mark.parametrize("exploration", ["thompson", "ucb"])
@pytest.mark.parametrize("budget", [0.2, 0.5, None])
def test_acts_within_the_budget_and_legally(exploration: str, budget: float | None) -> None:
    agent = AdditiveModel(_spec(32, small=2), budget=budget, exploration=exploration)
    rng, sizes = np.random.default_rng(0), np.array([39, 39, 65, 65, 65])  # out + in + σ of 32 x 6 and 32 x 32
    for _ in range(6):
        action = agent.act(_seen(32))
        assert action.dtype == np.int64
        pairs = action.reshape(32, MATRICES, 2)
        assert (pairs[:, :2, 0] <= 2).all()
        trained = np.array([0, 2, 4, 8])[pairs[:, :, 0]] @ sizes
        most = 6 * 39 * 2 + 8 * 65 * 3  # as the environment counts: rank 8 clipped to 6, although it is not legal
        assert trained.max() <= (1.0 if budget is None else budget) * most
        assert trained.max() > 0.6 * (1.0 if budget is None else budget) * most
        assert len(np.unique(action, axis=0)) > 10  # lanes that all do the same tell nothing
        agent.update(_transition(action, rng.normal(size=32)))


@pytest.mark.parametrize("exploration", ["thompson", "ucb"])
def test_the_search_ends_near_the_best_allocation(exploration: str) -> None:
    rng, planted = np.random.default_rng(0), np.random.default_rng(2).uniform(0, 1, size=(MATRICES, 3))
    agent = AdditiveModel(_spec(16), exploration=exploration, budget=0.5)
    for _ in range(40):
        action = agent.act(_seen(16))
        agent.update(_transition(action, _value(action, planted) + 5 * rng.normal() + 0.2 * rng.normal(size=16)))
    grid = np.stack(np.meshgrid(*[np.arange(4)] * MATRICES, indexing="ij"), axis=-1).reshape(-1, MATRICES)
    within = grid[np.array([0, 2, 4, 8])[grid].sum(1) <= 4 * MATRICES]
    best = (GAIN[within] * planted.max(1)).sum(1).max()
    got = float(_value(agent.allocation()[None], planted)[0])
    assert 0.93 * best < got <= best + 1e-9
    probabilities = agent.probabilities(_seen(2))
    np.testing.assert_array_equal(probabilities.sum((2, 3)), 1)
    chosen = probabilities[1].reshape(MATRICES, -1).argmax(1)
    np.testing.assert_array_equal(np.stack(np.divmod(chosen, 3), 1).reshape(-1), agent.allocation())


@pytest.mark.parametrize("case", ["equal rewards", "same action", "no reward", "one lane"])
def test_rounds_that_tell_nothing_are_safe(case: str) -> None:
    agent, rng = AdditiveModel(_spec()), np.random.default_rng(0)
    lanes = 1 if case == "one lane" else 8
    action = np.tile(_random(rng, 1), (lanes, 1)) if case == "same action" else _random(rng, lanes)
    reward = np.full(lanes, 0.3) if case == "equal rewards" else rng.normal(size=lanes)
    reward = np.full(lanes, np.nan) if case == "no reward" else reward
    for _ in range(1 if case == "one lane" else 3):
        assert np.isfinite(list(agent.update(_transition(action, reward)).values())).all()
    np.testing.assert_allclose(agent.coefficients(), 0, atol=1e-9)
    assert agent.act(_seen(4)).shape == (4, 2 * MATRICES)


def test_lanes_without_a_reward_do_not_count() -> None:
    rng, agent, other = np.random.default_rng(0), AdditiveModel(_spec()), AdditiveModel(_spec())
    for _ in range(5):
        action, reward = _random(rng, 8), rng.normal(size=8)
        reward[[2, 5]] = np.nan, np.inf
        agent.update(_transition(action, reward))
        kept = np.isfinite(reward)
        other.update(_transition(action[kept], reward[kept]))
    np.testing.assert_array_equal(agent.coefficients(), other.coefficients())


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("exploration", ["thompson", "ucb"])
def test_same_seed_same_curve_and_a_state_continues_it(exploration: str, lanes: int) -> None:
    def start(seed: int) -> tuple[ToyVectorEnv, Any]:
        env = ToyVectorEnv(lanes, horizons=2)
        return env, make_agent("additive", env, seed=seed, exploration=exploration)

    curves = []
    for seed in (0, 0, 1):
        env, agent = start(seed)
        curves.append(np.stack(run(env, agent, env_steps=12, seed=0).rewards))
    np.testing.assert_array_equal(curves[0], curves[1])
    assert not np.array_equal(curves[0], curves[2])
    env, agent = start(0)
    run(env, agent, env_steps=5, seed=0)
    state, other = agent.state_dict(), start(7)[1]
    first = np.stack(run(env, agent, env_steps=7, seed=0).rewards)
    other.load_state_dict(state)
    np.testing.assert_array_equal(first, np.stack(run(env, other, env_steps=7, seed=0).rewards))
    np.testing.assert_array_equal(agent.coefficients(), other.coefficients())


@pytest.mark.parametrize(("options", "message"), [
    ({"prior": 0.0}, "prior must be above 0"), ({"prior": float("inf")}, "prior must be above 0"),
    ({"optimism": -1.0}, "optimism at least 0"), ({"budget": 1.5}, "budget must be in"),
    ({"budget": "half"}, "budget of agent 'additive' must be a number")])
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LeLoRAError, match=message):
        make_agent("additive", ToyEnv(), **options)


def test_unknown_explorations_and_states_of_others_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'thompson'"):
        make_agent("additive", ToyEnv(), exploration="thomson")
    state = make_agent("additive", ToyEnv(num_matrices=4)).state_dict()
    with pytest.raises(LeLoRAError, match=r"an additive agent with 18 coefficients \(got one of 'additive' with 12"):
        make_agent("additive", ToyEnv()).load_state_dict(state)
    with pytest.raises(LeLoRAError, match="expected the state of an additive agent"):
        make_agent("additive", ToyEnv()).load_state_dict(make_agent("bandit", ToyEnv()).state_dict())
