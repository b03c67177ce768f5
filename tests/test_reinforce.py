"""REINFORCE against closed forms, a float64 NumPy twin, and a bandit that it must learn."""

import copy
import logging
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor, nn

from agents import AgentSpec, History, Transition, make_agent, run
from agents.baseline import CLIP, RunningMean
from agents.reinforce import Reinforce, ReinforceConfig
from lelora_env.errors import LeLoRAError, UnknownNameError
from tests.toy_env import Array, ToyEnv, ToyVectorEnv


class Table(nn.Module):
    """One free logit for every choice of every matrix: the smallest policy there is."""

    def __init__(self, num_matrices: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.rank = nn.Parameter(torch.randn(num_matrices, 4, generator=generator))
        self.location = nn.Parameter(torch.randn(num_matrices, 3, generator=generator))

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        lanes = len(observation)
        return self.rank.expand(lanes, -1, -1), self.location.expand(lanes, -1, -1)


def _softmax(logits: Array) -> Array:
    exponential = np.exp(logits - logits.max(-1, keepdims=True))
    result: Array = exponential / exponential.sum(-1, keepdims=True)
    return result


def _transition(action: Array, reward: list[float], num_matrices: int) -> Transition:
    lanes = len(reward)
    observation = np.zeros((lanes, num_matrices, 8), dtype=np.float32)
    none = np.zeros(lanes, dtype=bool)
    return Transition(observation, action, np.asarray(reward), none, none, {}, observation)


def _table_agent(num_matrices: int, **options: Any) -> tuple[Reinforce, Table]:
    table = Table(num_matrices)
    spec = AgentSpec.from_env(ToyVectorEnv(2, num_matrices=num_matrices))
    return Reinforce(spec, policy=table, **{"preset": "paper", **options}), table


# --- the update -----------------------------------------------------------------------------------------------------


def test_gradient_of_one_matrix_is_the_closed_form() -> None:
    """d/dlogit of -(r - b)·log softmax[a] is (r - b)·(p - onehot(a)); with no reward seen yet, b = 0."""
    agent, table = _table_agent(1)
    rank, location = table.rank.detach().double().numpy()[0], table.location.detach().double().numpy()[0]
    agent.update(_transition(np.array([[2, 1]]), [-0.7], 1))
    assert table.rank.grad is not None
    assert table.location.grad is not None
    np.testing.assert_allclose(table.rank.grad[0], -0.7 * (_softmax(rank) - np.eye(4)[2]), rtol=1e-5)
    np.testing.assert_allclose(table.location.grad[0], -0.7 * (_softmax(location) - np.eye(3)[1]), rtol=1e-5)


def test_matrices_and_lanes_are_averaged() -> None:
    agent, table = _table_agent(2)
    rank = table.rank.detach().double().numpy()
    agent.update(_transition(np.array([[2, 1, 0, 0], [3, 1, 1, 2]]), [-0.5, -2.0], 2))
    expected = np.zeros((2, 4))
    for reward, picks in ((-0.5, (2, 0)), (-2.0, (3, 1))):
        for matrix, pick in enumerate(picks):
            expected[matrix] += reward * (_softmax(rank[matrix]) - np.eye(4)[pick]) / 2 / 2  # 2 matrices, 2 lanes
    assert table.rank.grad is not None
    np.testing.assert_allclose(table.rank.grad, expected, rtol=1e-5)


@pytest.mark.parametrize("zero_rule", [False, True])
def test_ten_steps_equal_a_numpy_twin(zero_rule: bool) -> None:
    """Adam and the bias-corrected running mean written out by hand, in float64."""
    agent, table = _table_agent(3, learning_rate=0.05, rank_zero_rule=zero_rule)
    logits = [p.detach().double().numpy().copy() for p in (table.rank, table.location)]
    first, second = ([np.zeros_like(x) for x in logits] for _ in range(2))
    rewards_seen: list[float] = []
    rng = np.random.default_rng(0)
    for t in range(1, 11):
        action, reward = rng.integers([4, 3] * 3, size=(2, 6)), rng.normal(size=2) - 1
        weights = 0.9 ** np.arange(len(rewards_seen))[::-1]
        baseline = float(weights @ rewards_seen / weights.sum()) if rewards_seen else 0.0
        scalars = agent.update(_transition(action, reward.tolist(), 3))
        assert scalars["baseline"] == pytest.approx(baseline)
        for head, sizes in enumerate((4, 3)):
            gradient = np.zeros((3, sizes))
            for lane in range(2):
                for matrix in range(3):
                    chosen = action[lane].reshape(3, 2)[matrix]
                    if head == 1 and zero_rule and chosen[0] == 0:
                        continue
                    score = np.eye(sizes)[chosen[head]] - _softmax(logits[head][matrix])
                    gradient[matrix] -= (reward[lane] - baseline) * score / 3 / 2
            first[head] = 0.9 * first[head] + 0.1 * gradient
            second[head] = 0.999 * second[head] + 0.001 * gradient**2
            step = first[head] / (1 - 0.9**t) / (np.sqrt(second[head] / (1 - 0.999**t)) + 1e-8)
            logits[head] -= 0.05 * step
        rewards_seen.append(float(reward.mean()))
    np.testing.assert_allclose(table.rank.detach(), logits[0], atol=2e-5)
    np.testing.assert_allclose(table.location.detach(), logits[1], atol=2e-5)
    assert np.abs(table.rank.detach().numpy() - Table(3).rank.detach().numpy()).max() > 0.05


def test_hand_worked_running_mean() -> None:
    mean = RunningMean(0.9)
    values = []
    for value in (2.0, 4.0, 10.0):
        values.append(mean.value)
        mean.add(value)
    assert values == pytest.approx([0.0, 2.0, (0.9 * 2 + 4) / 1.9])
    assert mean.value == pytest.approx((0.81 * 2 + 0.9 * 4 + 10) / 2.71)


def test_scalars_are_in_nats_and_finite() -> None:
    agent, table = _table_agent(3)
    with torch.no_grad():
        for parameter in table.parameters():
            parameter.zero_()
    scalars = agent.update(_transition(np.zeros((1, 6), dtype=np.int64), [-1.0], 3))
    assert scalars["entropy"] == pytest.approx(np.log(12))
    assert scalars["log_prob"] == pytest.approx(-np.log(12))
    assert all(np.isfinite(value) for value in scalars.values())


# --- bad numbers ----------------------------------------------------------------------------------------------------


def test_lanes_without_a_finite_reward_are_left_out_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    action = np.array([[2, 1, 0, 0], [3, 1, 1, 2]])
    agent, table = _table_agent(2)
    alone, alone_table = _table_agent(2)
    alone.update(_transition(action[1:], [-2.0], 2))
    with caplog.at_level(logging.WARNING):
        scalars = agent.update(_transition(action, [float("nan"), -2.0], 2))
        assert scalars["skipped_lanes"] == 1
        assert torch.equal(table.rank, alone_table.rank)
        before = copy.deepcopy(agent.state_dict())
        assert agent.update(_transition(action, [float("nan"), float("inf")], 2)) == {"skipped_lanes": 2.0}
    assert len(caplog.records) == 2
    after = agent.state_dict()
    assert torch.equal(before["policy"]["rank"], after["policy"]["rank"])
    assert before["baseline"] == after["baseline"]


def test_a_broken_network_is_a_clear_error_and_changes_nothing() -> None:
    agent, table = _table_agent(2)
    with torch.no_grad():
        table.rank[0, 0] = float("nan")
    with pytest.raises(LeLoRAError, match="logits are not finite"):
        agent.act(np.zeros((1, 2, 8), dtype=np.float32))
    other, other_table = _table_agent(2)
    before = other_table.rank.detach().clone()
    with pytest.raises(LeLoRAError, match="gradient is not finite"):
        other.update(_transition(np.zeros((1, 4), dtype=np.int64), [1e200], 2))
    assert torch.equal(other_table.rank, before)


def test_unknown_presets_and_bad_settings_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="'paper'"):
        make_agent("reinforce", ToyEnv(), preset="papers")
    with pytest.raises(LeLoRAError, match="learning_rate must be a positive"):
        make_agent("reinforce", ToyEnv(), learning_rate=-1.0)


@pytest.mark.parametrize(("field", "value", "rule"), [
    ("learning_rate", "abc", "a number"),
    ("learning_rate", True, "a number"),
    ("learning_rate", float("nan"), "a positive number"),
    ("baseline_decay", None, "a number"),
    ("baseline_decay", 1, r"in \[0, 1\)"),
    ("embedding", 2.5, "an integer"),
    ("embedding", -1, "an integer of at least 0"),
    ("hidden", "64", "a list, each an integer"),
    ("hidden", (64, 0), "a list of integers of at least 1"),
    ("columns", "norm", "a list, each text or none"),
    ("rank_zero_rule", 1, "true or false"),
])
def test_settings_of_the_wrong_kind_name_field_value_and_rule(field: str, value: Any, rule: str) -> None:
    with pytest.raises(LeLoRAError, match=rf"^{field}.* must be {rule} \(got {re.escape(repr(value))}\)$"):
        ReinforceConfig(**{field: value})


# --- the whole agent ------------------------------------------------------------------------------------------------


def _mean_reward(history: History, last: int) -> float:
    return float(np.mean(history.rewards[-last:]))


def test_illegal_choices_are_never_made() -> None:
    env = ToyVectorEnv(4, num_matrices=3, small_matrices=2)
    agent = make_agent("reinforce", env, hidden=(16,), embedding=4, learning_rate=0.05)
    seen: list[Array] = []
    run(env, agent, env_steps=100, seed=0, on_step=lambda t, s, n: seen.append(t.action.reshape(4, 3, 2)))
    assert np.stack(seen)[:, :, :2, 0].max() == 2
    assert np.stack(seen)[:, :, 2, 0].max() == 3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_learns_the_stationary_bandit(seed: int) -> None:
    """Chance is (1/4 + 1/3) / 2 = 0.29; the paper's preset is far above it after 200 env steps of 4 lanes."""
    env = ToyVectorEnv(4, horizons=50, problem=seed)
    history = run(env, make_agent("reinforce", env, seed=seed, preset="paper"), env_steps=200, seed=0)
    assert _mean_reward(history, 50) > 0.6
    control = run(env, make_agent("random", env, seed=seed), env_steps=300, seed=0)
    assert _mean_reward(control, 300) == pytest.approx(0.2917, abs=0.02)


def _rewards(seed: int, mode: AutoresetMode = AutoresetMode.SAME_STEP) -> Array:
    env = ToyVectorEnv(2, horizons=[3, 4], autoreset_mode=mode)
    history = run(env, make_agent("reinforce", env, seed=seed), env_steps=25, seed=0)
    return np.stack(history.rewards)


def test_a_seed_fixes_every_bit_and_another_seed_differs() -> None:
    np.testing.assert_array_equal(_rewards(0), _rewards(0))
    np.testing.assert_array_equal(_rewards(0), _rewards(0, AutoresetMode.NEXT_STEP))
    np.testing.assert_array_equal(_rewards(0), _rewards(0, AutoresetMode.DISABLED))
    assert not np.array_equal(_rewards(0), _rewards(1))


def _bits(agent: Any) -> list[Array]:
    return [p.detach().numpy().copy() for p in agent.policy.parameters()]


def test_state_dict_continues_the_curve_bitwise_in_mid_run() -> None:
    env = ToyVectorEnv(2, horizons=5)
    agent = make_agent("reinforce", env, seed=0)
    run(env, agent, env_steps=7, seed=0)
    state = agent.state_dict()
    kept = copy.deepcopy(state)
    first = run(env, agent, env_steps=9, seed=0)
    name = "rank_head.weight"
    assert torch.equal(state["policy"][name], kept["policy"][name])  # a snapshot, not a view
    other = make_agent("reinforce", env, seed=99)
    other.load_state_dict(state)
    second = run(env, other, env_steps=9, seed=0)
    np.testing.assert_array_equal(np.stack(first.rewards), np.stack(second.rewards))
    for a, b in zip(_bits(agent), _bits(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_states_for_other_features_or_settings_are_refused() -> None:
    agent = make_agent("reinforce", ToyEnv(), hidden=(8,))
    with pytest.raises(LeLoRAError, match="other settings"):
        agent.load_state_dict(make_agent("reinforce", ToyEnv(), hidden=(9,)).state_dict())
    state = agent.state_dict()
    state["spec"]["feature_names"].append("grad_norm")
    with pytest.raises(LeLoRAError, match="feature_names"):
        agent.load_state_dict(state)
    by_number: dict[str, Any] = {"hidden": (8,), "layer_as": "embedding"}
    deeper = make_agent("reinforce", ToyEnv(num_matrices=20), **by_number)
    with pytest.raises(LeLoRAError, match="does not fit this environment"):
        deeper.load_state_dict(make_agent("reinforce", ToyEnv(), **by_number).state_dict())


def test_a_state_saved_with_another_devices_kernels_loads() -> None:
    env = ToyVectorEnv(2)
    agent = make_agent("reinforce", env, seed=0)
    run(env, agent, env_steps=3, seed=0)
    state = agent.state_dict()
    for group in state["optimiser"]["param_groups"]:
        group["capturable"], group["fused"] = True, True
    other = make_agent("reinforce", env, seed=1)
    other.load_state_dict(state)
    run(env, other, env_steps=2, seed=0)


def test_a_lane_that_is_left_out_may_hold_anything() -> None:
    env = ToyVectorEnv(2)
    observation = env.reset()[0]
    agents = [make_agent("reinforce", env, seed=0) for _ in range(2)]
    nothing = np.zeros(2, dtype=bool)
    for agent, spoilt in zip(agents, (False, True), strict=True):
        action = agent.act(observation)
        seen = observation.copy()
        if spoilt:
            seen[1] = np.nan
        scalars = agent.update(Transition(seen, action, np.array([1.0, np.nan]), nothing, nothing, {}, observation))
        assert scalars["skipped_lanes"] == 1
    one, two = (agent.state_dict()["policy"] for agent in agents)
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_parameters_outside_the_loss_stay_as_they_are() -> None:
    """Also if an earlier training has left a gradient behind, as pre-training by imitation does."""
    env = ToyVectorEnv(1, num_matrices=4)
    policy = Table(4)
    policy.unused = nn.Parameter(torch.ones(3))
    policy.unused.grad = torch.ones(3)
    agent = Reinforce(AgentSpec.from_env(env), policy=policy, seed=0)
    run(env, agent, env_steps=3, seed=0)
    assert torch.equal(policy.unused, torch.ones(3))


def test_acting_in_inference_mode_does_not_hinder_learning() -> None:
    env = ToyVectorEnv(1)
    observation = env.reset()[0]
    agent = make_agent("reinforce", env, seed=0)
    nothing = np.zeros(1, dtype=bool)
    with torch.inference_mode():
        action = agent.act(observation)
    scalars = agent.update(Transition(observation, action, np.ones(1), nothing, nothing, {}, observation))
    assert scalars["gradient_norm"] > 0


# --- the practical preset -------------------------------------------------------------------------------------------


def _entropy_and_slope(rank: Array, location: Array) -> tuple[float, Array, Array]:
    """Entropy of one matrix's choice under the rank-0 rule, and its slope in the logits, by hand."""
    p, q = _softmax(rank), _softmax(location)
    of_rank, of_location = -(p * np.log(p)).sum(), -(q * np.log(q)).sum()
    by_rank = -p * (np.log(p) + of_rank) - of_location * p[0] * (np.eye(4)[0] - p)
    return of_rank + (1 - p[0]) * of_location, by_rank, -(1 - p[0]) * q * (np.log(q) + of_location)


class PracticalTwin:
    """What the top of agents/reinforce.py describes, one number at a time, for a `Table` of three matrices."""

    def __init__(self, table: Table) -> None:
        self.logits = [p.detach().double().numpy().copy() for p in (table.rank, table.location)]
        self.first, self.second = ([np.zeros_like(x) for x in self.logits] for _ in range(2))
        self.surprises: list[float] = []
        self.squares: list[float] = []

    @staticmethod
    def slow(values: list[float]) -> float:
        weights = 0.99 ** np.arange(len(values))[::-1]
        return float(weights @ values / weights.sum()) if values else 0.0

    def advantages(self, reward: Array, before: Array) -> list[float]:
        surprise = [float(r + b) for r, b in zip(reward, before, strict=True)]  # -L1_before is known
        lanes, slow = len(surprise), self.slow(self.surprises)
        expected = [(sum(surprise) - s) / (lanes - 1) if lanes > 1 else slow for s in surprise]
        advantage, unit = [s - e for s, e in zip(surprise, expected, strict=True)], np.sqrt(self.slow(self.squares))
        if unit > 0:
            advantage = [min(max(a, -5 * unit), 5 * unit) for a in advantage]
        self.squares.append(float(np.mean(np.square(advantage))))
        self.surprises.append(float(np.mean(surprise)))
        unit = np.sqrt(self.slow(self.squares))
        return [min(max(a / unit, -5.0), 5.0) for a in advantage]

    def update(self, action: Array, advantage: list[float]) -> None:
        gradients = [np.zeros((3, 4)), np.zeros((3, 3))]
        for matrix in range(3):
            for lane, a in enumerate(advantage):
                rank, place = action[lane].reshape(3, 2)[matrix]
                share = a / 3 / len(advantage)
                gradients[0][matrix] -= share * (np.eye(4)[rank] - _softmax(self.logits[0][matrix]))
                if rank > 0:
                    gradients[1][matrix] -= share * (np.eye(3)[place] - _softmax(self.logits[1][matrix]))
            _, *slopes = _entropy_and_slope(self.logits[0][matrix], self.logits[1][matrix])
            for gradient, slope in zip(gradients, slopes, strict=True):
                gradient[matrix] -= 0.05 * slope / 3
        steps = len(self.squares)
        for head, gradient in enumerate(gradients):
            self.first[head] = 0.9 * self.first[head] + 0.1 * gradient
            self.second[head] = 0.999 * self.second[head] + 0.001 * gradient**2
            root = np.sqrt(self.second[head] / (1 - 0.999**steps)) + 1e-8
            self.logits[head] -= 5e-4 * self.first[head] / (1 - 0.9**steps) / root


def _practical(num_matrices: int, **options: Any) -> tuple[Reinforce, Table]:
    return _table_agent(num_matrices, preset="practical", **options)


@pytest.mark.parametrize("lanes", [1, 3])
def test_practical_equals_a_numpy_twin(lanes: int) -> None:
    """One lane diverges in step 7, and all rewards fall by far more than what actions do."""
    agent, table = _practical(3)
    twin, rng = PracticalTwin(table), np.random.default_rng(0)
    for step in range(14):
        action = rng.integers([4, 3] * 3, size=(lanes, 6))
        before = 50 - 3 * step + rng.normal(size=lanes)
        change = rng.normal(size=lanes) * 0.01
        reward = -(before + change) - 0.8 * change
        reward[0] = -1e6 if step == 7 else reward[0]
        info = {"L1": before + change, "L2": change}
        entropy = np.mean([_entropy_and_slope(twin.logits[0][m], twin.logits[1][m])[0] for m in range(3)])
        advantage = twin.advantages(reward, before)
        scalars = agent.update(replace(_transition(action, reward.tolist(), 3), info=info))
        assert scalars["advantage"] == pytest.approx(np.mean(advantage), abs=1e-6), step
        assert scalars["entropy"] == pytest.approx(entropy, rel=1e-5)
        twin.update(action, advantage)
    np.testing.assert_allclose(table.rank.detach(), twin.logits[0], atol=1e-5)
    np.testing.assert_allclose(table.location.detach(), twin.logits[1], atol=1e-5)
    assert np.abs(table.rank.detach().numpy() - Table(3).rank.detach().numpy()).max() > 2e-3


def test_a_diverged_lane_moves_the_policy_no_more_than_the_clip_allows() -> None:
    """Each slope of log p is within ±1, so no logit's gradient is above CLIP / M, however bad the penalty."""
    rng = np.random.default_rng(0)
    for lanes, when in ((2, 5), (64, 0), (64, 5), (1, 5)):
        agent, table = _practical(2, entropy_bonus=0.0)
        for step in range(8):
            reward = rng.normal(size=lanes)
            reward[0] = -1e12 if step == when else reward[0]
            agent.update(_transition(rng.integers([4, 3] * 2, size=(lanes, 4)), reward.tolist(), 2))
            for parameter in (table.rank, table.location):
                assert parameter.grad is not None
                assert parameter.grad.abs().max() <= CLIP / 2 * (1 + 1e-6)
        if when > 0:
            assert agent.square.value < 10 * CLIP**2  # and what comes after is not made small by it


@pytest.mark.parametrize("lanes", [2, 3, 7])
def test_rewards_without_variance_are_a_safe_step_and_do_not_stop_learning(lanes: int) -> None:
    agent, table = _practical(2, entropy_bonus=0.0)
    rng = np.random.default_rng(0)
    for _ in range(3):
        scalars = agent.update(_transition(rng.integers([4, 3] * 2, size=(lanes, 4)), [-0.3] * lanes, 2))
        assert scalars["advantage"] == 0
        assert scalars["gradient_norm"] == 0
    assert torch.equal(table.rank, Table(2).rank)
    action = rng.integers([4, 3] * 2, size=(lanes, 4))
    assert agent.update(_transition(action, [-0.3] * (lanes - 1) + [0.2], 2))["gradient_norm"] > 1e-3


class FallingLoss(ToyVectorEnv):
    """As the toy, but the reward is that of a run: the loss falls whatever is chosen, and a little more if it is right.

    At the end of an episode it begins anew.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.right: list[Array] = []

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """L1 and L2 as the real environment has them."""
        before = 5 * np.exp(-self.steps / 20)
        observation, right, terminated, truncated, _ = super().step(actions)
        change = 5 * np.exp(-self.steps / 20) - before - 0.02 * right
        reward = -(before + change) - 0.8 * change
        self.right.append(right)
        everywhere = np.ones(self.num_envs, dtype=bool)
        info = {"L1": before + change, "L2": change, "_L1": everywhere, "_L2": everywhere}
        return observation, reward, terminated, truncated, info


def _learnt(preset: str, **options: Any) -> float:
    env = FallingLoss(8, horizons=50, autoreset_mode=AutoresetMode.DISABLED)
    agent = make_agent("reinforce", env, seed=0, preset=preset, hidden=(64, 64), embedding=8, **options)
    run(env, agent, env_steps=600, seed=0)
    return float(np.mean(env.right[-100:]))


def test_practical_learns_where_the_loss_falls_and_paper_does_not() -> None:
    """Chance is 0.29; one choice for all matrices gets no more than about that."""
    assert _learnt("practical") > 0.7
    assert _learnt("paper") < 0.45


@pytest.mark.parametrize("seed", [0, 1])
def test_practical_learns_the_stationary_bandit(seed: int) -> None:
    env = ToyVectorEnv(8, horizons=50, problem=seed)
    history = run(env, make_agent("reinforce", env, seed=seed), env_steps=500, seed=0)
    assert _mean_reward(history, 50) > 0.6
