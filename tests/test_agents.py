"""The protocol, the loop, the network and the controls."""

import io
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from scipy import stats

from agents import (
    AGENT_NAMES,
    ActionDistribution,
    Agent,
    AgentSpec,
    FixedAllocation,
    PerMatrixPolicy,
    RandomAllocation,
    Transition,
    make_agent,
    run,
)
from lelora_env.errors import LeLoRAError, UnknownNameError
from tests.toy_env import Array, ToyEnv, ToyVectorEnv

ALL_MODES = [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED]


class Recorder:
    """Draws random actions and keeps every transition that it is asked to learn from."""

    def __init__(self, size: int, seed: int = 0) -> None:
        self.rng, self.size = np.random.default_rng(seed), size
        self.transitions: list[Transition] = []

    def act(self, observation: Array) -> Array:
        nvec = np.tile([4, 3], self.size)
        return self.rng.integers(nvec, size=(len(observation), len(nvec)))

    def update(self, transition: Transition) -> dict[str, float]:
        self.transitions.append(transition)
        return {"seen": float(len(self.transitions))}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError


def _assert_same(a: Transition, b: Transition) -> None:
    for field in fields(Transition):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if field.name == "info":
            assert sorted(left) == sorted(right)
            for name in left:
                np.testing.assert_array_equal(left[name], right[name], err_msg=name)
        else:
            np.testing.assert_array_equal(left, right, err_msg=field.name)


# --- the loop -------------------------------------------------------------------------------------------------------


def test_same_transitions_in_every_autoreset_mode_with_uneven_episodes() -> None:
    seen = []
    for mode in ALL_MODES:
        agent = Recorder(6)
        run(ToyVectorEnv(3, horizons=[2, 3, 5], autoreset_mode=mode), agent, env_steps=30, seed=0)
        seen.append(agent.transitions)
    for other in seen[1:]:
        assert len(other) == len(seen[0]) == 30
        for a, b in zip(seen[0], other, strict=True):
            _assert_same(a, b)


def test_transitions_never_cross_an_episode_and_carry_the_steps_own_info() -> None:
    """Progress counts up by one step in each transition, the episode mark stays: facts of the toy's definition."""
    horizons = np.array([2, 3, 5])
    for mode in ALL_MODES:
        env, agent = ToyVectorEnv(3, horizons=horizons.tolist(), autoreset_mode=mode), Recorder(6)
        run(env, agent, env_steps=17, seed=0)
        for t, transition in enumerate(agent.transitions):
            step = t % horizons
            np.testing.assert_allclose(transition.observation[:, 0, -1], step / horizons, rtol=1e-6)
            np.testing.assert_allclose(transition.next_observation[:, 0, -1], (step + 1) / horizons, rtol=1e-6)
            np.testing.assert_array_equal(transition.done, step + 1 == horizons)
            np.testing.assert_array_equal(transition.info["env_step"], step + 1)
            right = (transition.action.reshape(3, -1, 2) == env.best).mean(axis=(1, 2))
            np.testing.assert_allclose(transition.reward, right)
            np.testing.assert_allclose(transition.info["L1"], 1 - right)


def test_gymnasiums_own_vector_env_and_the_single_env_give_the_same_transitions() -> None:
    single = Recorder(6)
    run(ToyEnv(horizons=4), single, env_steps=11, seed=0)
    for mode in ALL_MODES:
        vector = Recorder(6)
        env = SyncVectorEnv([lambda: ToyEnv(horizons=4)], autoreset_mode=mode)
        run(env, vector, env_steps=11, seed=0)
        for a, b in zip(single.transitions, vector.transitions, strict=True):
            np.testing.assert_array_equal(a.action, b.action)
            np.testing.assert_array_equal(a.next_observation, b.next_observation)
            np.testing.assert_array_equal(a.info["L1"], b.info["L1"])


def test_history_counts_what_happened() -> None:
    env, agent = ToyVectorEnv(2, horizons=[2, 3]), Recorder(6)
    calls: list[tuple[int, float]] = []
    history = run(env, agent, episodes=2, seed=0, on_step=lambda t, s, step: calls.append((step, s["seen"])))
    assert history.env_steps == 6  # lane 1 needs 2 x 3 env steps
    assert calls == [(i, float(i)) for i in range(1, 7)]
    assert [(e.lane, e.length, e.terminated) for e in history.episodes] == [
        (0, 2, True), (1, 3, True), (0, 2, True), (0, 2, True), (1, 3, True)]
    by_hand = sum(float(t.reward[1]) for t in agent.transitions[3:6])
    assert history.episodes[-1].total_reward == pytest.approx(by_hand)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_the_loop_leaves_the_last_episode_unreset(mode: AutoresetMode) -> None:
    env = ToyVectorEnv(2, horizons=3, autoreset_mode=mode)
    run(env, Recorder(6), episodes=1, seed=0)
    np.testing.assert_array_equal(env.steps, 3)


@pytest.mark.parametrize("limits", [{}, {"episodes": 0}, {"env_steps": 0}])
def test_run_wants_a_limit(limits: dict[str, int]) -> None:
    with pytest.raises(LeLoRAError, match="at least 1"):
        run(ToyEnv(), Recorder(6), **limits)


def test_transition_is_frozen() -> None:
    agent = Recorder(6)
    run(ToyEnv(), agent, env_steps=1)
    with pytest.raises(FrozenInstanceError):
        agent.transitions[0].reward = np.zeros(1)  # type: ignore[misc]


# --- make_agent -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AGENT_NAMES)
@pytest.mark.parametrize("make", [ToyEnv, lambda: ToyVectorEnv(3)])
def test_every_name_gives_a_working_agent(name: str, make: Callable[[], Any]) -> None:
    env = make()
    agent = make_agent(name, env, seed=1)
    assert isinstance(agent, Agent)
    history = run(env, agent, env_steps=5, seed=0)
    assert history.env_steps == 5
    buffer = io.BytesIO()
    torch.save(agent.state_dict(), buffer)  # and it can be read back without unpickling anything
    buffer.seek(0)
    agent.load_state_dict(torch.load(buffer, weights_only=True))


def test_unknown_names_and_options_are_named_with_the_closest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'reinforce'"):
        make_agent("reinforc", ToyEnv())
    for name in AGENT_NAMES:
        with pytest.raises(UnknownNameError, match="lerning_rate"):
            make_agent(name, ToyEnv(), lerning_rate=1.0)


def test_an_environment_of_another_kind_is_refused() -> None:
    with pytest.raises(LeLoRAError, match="not a LeLoRA environment"):
        make_agent("random", gym.make("CartPole-v1"))


def test_spec_reads_through_wrappers() -> None:
    env = gym.wrappers.RecordEpisodeStatistics(ToyEnv(num_matrices=5, small_matrices=2))
    spec = AgentSpec.from_env(env)
    assert (spec.num_matrices, spec.rank_set, spec.num_lanes) == (5, (0, 2, 4, 8), 1)
    assert spec.locations == ("primary", "medium", "minor")
    assert spec.rank_mask[:, 3].tolist() == [False, False, True, True, True]
    assert spec.location_mask.all()
    assert spec.index_ranges == {"layer": (0, 2), "type": (0, 1)}


# --- the network and its distribution -------------------------------------------------------------------------------


def _distribution(seed: int, **options: Any) -> ActionDistribution:
    generator = torch.Generator().manual_seed(seed)
    rank, location = (torch.randn(2, 5, n, generator=generator, dtype=torch.float64) for n in (4, 3))
    return ActionDistribution.from_logits(rank, location, **options)


def _choices() -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(4), torch.arange(3))  # (12, 2)


def test_log_prob_and_entropy_agree_with_torch_categorical() -> None:
    distribution = _distribution(0)
    rank = torch.distributions.Categorical(logits=distribution.rank_log_probs)
    location = torch.distributions.Categorical(logits=distribution.location_log_probs)
    choice = distribution.sample(torch.Generator().manual_seed(0))
    assert choice.shape == (2, 5, 2)
    expected = rank.log_prob(choice[..., 0]) + location.log_prob(choice[..., 1])
    torch.testing.assert_close(distribution.log_prob(choice), expected)
    torch.testing.assert_close(distribution.entropy(), rank.entropy() + location.entropy())


def test_rank_zero_rule_makes_one_outcome_of_rank_zero() -> None:
    """With the rule the outcomes are {0} and (r > 0, s): 1 + 3·3, whose probabilities sum to 1."""
    distribution = _distribution(1, zero_rank=0)
    log_prob = torch.stack([distribution.log_prob(c.expand(2, 5, 2)) for c in _choices()], dim=-1)  # (L, M, 12)
    zero, rest = log_prob[..., :3], log_prob[..., 3:]
    torch.testing.assert_close(zero[..., 0], zero[..., 2])
    outcomes = torch.cat([zero[..., :1], rest], dim=-1)
    torch.testing.assert_close(outcomes.exp().sum(-1), torch.ones(2, 5, dtype=torch.float64))
    torch.testing.assert_close(distribution.entropy(), -(outcomes.exp() * outcomes).sum(-1))


def test_masked_choices_have_no_probability_and_finite_gradients() -> None:
    mask = torch.tensor([[True, True, False, False]]).expand(5, 4)
    rank = torch.randn(2, 5, 4, requires_grad=True)
    distribution = ActionDistribution.from_logits(rank, torch.zeros(2, 5, 3), rank_mask=mask)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([distribution.sample(generator) for _ in range(200)])
    assert set(drawn[..., 0].unique().tolist()) == {0, 1}
    assert (distribution.mode()[..., 0] <= 1).all()
    assert (distribution.rank_log_probs.exp()[..., 2:] == 0).all()
    two = torch.distributions.Categorical(logits=rank[..., :2]).entropy() + np.log(3)
    torch.testing.assert_close(distribution.entropy(), two)
    (distribution.entropy().sum() + distribution.log_prob(drawn[0]).sum()).backward()  # type: ignore[no-untyped-call]
    assert rank.grad is not None
    assert torch.isfinite(rank.grad).all()
    assert (rank.grad[..., 2:] == 0).all()


def test_samples_follow_the_probabilities() -> None:
    distribution = _distribution(2)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([distribution.sample(generator) for _ in range(4000)])[:, 0, 0]  # (4000, 2)
    for column, log_probs in enumerate((distribution.rank_log_probs, distribution.location_log_probs)):
        expected = log_probs[0, 0].exp().numpy() * 4000
        observed = np.bincount(draws[:, column].numpy(), minlength=len(expected))
        assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_non_finite_logits_are_an_error() -> None:
    with pytest.raises(LeLoRAError, match="not finite"):
        ActionDistribution.from_logits(torch.full((1, 2, 4), torch.nan), torch.zeros(1, 2, 3))


def test_the_network_shares_its_weights_across_matrices_and_lanes() -> None:
    """Permuting the matrices permutes the logits; any number of matrices works; a lane alone gives the same."""
    env = ToyVectorEnv(3, num_matrices=8)
    policy = PerMatrixPolicy(AgentSpec.from_env(env), hidden=(32, 16), embedding=5)
    observation = torch.as_tensor(env.reset()[0])
    rank, location = policy(observation)
    assert (rank.shape, location.shape) == ((3, 8, 4), (3, 8, 3))
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(policy(observation[:, order])[0], rank[:, order])
    torch.testing.assert_close(policy(observation[1:2, :3])[1], location[1:2, :3])
    assert rank[0].std(dim=0).min() > 0


def test_the_papers_network() -> None:
    """Sizes by hand from Appendix B: 200 + 200 + 1 + S inputs, hidden 1024, 256, 64, two heads."""
    env = ToyEnv(num_matrices=6)
    policy = PerMatrixPolicy(AgentSpec.from_env(env), seed=3)
    inputs = 200 + 200 + 1 + 4
    mlp = (inputs + 1) * 1024 + 1025 * 256 + 257 * 64
    assert sum(p.numel() for p in policy.parameters()) == mlp + 65 * 4 + 65 * 3 + (3 + 2) * 200
    for parameter in policy.parameters():
        if parameter.dim() == 1:
            assert (parameter == 0).all()
        else:
            bound = np.sqrt(6 / parameter.shape[1])  # Kaiming-uniform: sqrt(2)·sqrt(3 / fan_in)
            assert 0.9 * bound < parameter.abs().max().item() <= bound * (1 + 1e-6)
    observation = torch.as_tensor(env.reset(seed=0)[0][None])
    changed = observation.clone()
    changed[..., -1] = 1.0  # progress is not read
    torch.testing.assert_close(policy(changed)[0], policy(observation)[0], rtol=0, atol=0)
    changed[..., 2] += 1.0  # the norm is
    assert not torch.equal(policy(changed)[0], policy(observation)[0])


def test_the_network_is_seeded_and_leaves_the_global_generators_alone() -> None:
    spec = AgentSpec.from_env(ToyEnv())
    torch.manual_seed(5)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    agents = [make_agent(name, ToyEnv(), seed=1) for name in AGENT_NAMES]
    for agent in agents:
        run(ToyEnv(), agent, env_steps=6, seed=0)
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(numpy_before, np.random.get_state()[1])  # type: ignore[index]  # noqa: NPY002
    weights = [PerMatrixPolicy(spec, hidden=(8,), embedding=2, seed=s).rank_head.weight for s in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_unknown_columns_and_layers_are_refused() -> None:
    spec = AgentSpec.from_env(ToyEnv())
    with pytest.raises(UnknownNameError, match="sv_0"):
        PerMatrixPolicy(spec, columns=("sv_00",))
    policy = PerMatrixPolicy(spec, hidden=(8,))
    observation = torch.as_tensor(ToyEnv(num_matrices=20).reset()[0][None])
    with pytest.raises(LeLoRAError, match="layer indices from 0 to 2"):
        policy(observation)


# --- controls -------------------------------------------------------------------------------------------------------


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
    ({"allocation": [(8, "minor")]}, "each of the 3 matrices"),
    ({"allocation": [(8, "minor")] * 3}, "not legal for matrix 0"),
    ({"allocation": [(2, "minor")] * 3, "rank": 2}, "not both"),
])
def test_fixed_refuses_what_cannot_be_chosen(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LeLoRAError, match=message):
        make_agent("fixed", ToyEnv(num_matrices=3, small_matrices=1), **options)


def test_states_of_other_agents_are_refused() -> None:
    agents = [make_agent(name, ToyEnv()) for name in AGENT_NAMES]
    for agent in agents:
        for other in agents:
            if agent is not other:
                with pytest.raises(LeLoRAError, match="expected the state of a"):
                    agent.load_state_dict(other.state_dict())
