"""The network applied to every matrix, and the distribution of choices that it gives."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from agents import AGENT_NAMES, REQUIRED, ActionDistribution, AgentSpec, PerMatrixPolicy, make_agent, run
from lelora_env.errors import LeLoRAError, UnknownNameError
from tests.toy_env import ToyEnv, ToyVectorEnv


def _distribution(seed: int, **options: Any) -> ActionDistribution:
    generator = torch.Generator().manual_seed(seed)
    rank, location = (torch.randn(2, 5, n, generator=generator, dtype=torch.float64) for n in (4, 3))
    return ActionDistribution.from_logits(rank, location, **options)


def _choices() -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(4), torch.arange(3))  # (12, 2)


def test_log_prob_and_entropy_agree_with_torch_categorical() -> None:
    distribution = _distribution(0)
    rank: Any = torch.distributions.Categorical(logits=distribution.rank_log_probs)
    location: Any = torch.distributions.Categorical(logits=distribution.location_log_probs)
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
    assert set(drawn[..., 0].flatten().tolist()) == {0, 1}
    assert (distribution.mode()[..., 0] <= 1).all()
    assert (distribution.rank_log_probs.exp()[..., 2:] == 0).all()
    two: Any = torch.distributions.Categorical(logits=rank[..., :2])
    torch.testing.assert_close(distribution.entropy(), two.entropy() + np.log(3))
    torch.autograd.backward(distribution.entropy().sum() + distribution.log_prob(drawn[0]).sum())
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
        ActionDistribution.from_logits(torch.full((1, 2, 4), torch.nan), torch.zeros(1, 2, 3)).sample(torch.Generator())


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
    agents = [make_agent(name, ToyEnv(), seed=1) for name in AGENT_NAMES if name not in REQUIRED]
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
    observation = ToyEnv(num_matrices=20).reset()[0][None]
    with pytest.raises(LeLoRAError, match="layer indices from 0 to 2, the observation holds 0 to 9"):
        policy.check(observation)
    observation[0, 0, 0] = np.nan
    with pytest.raises(LeLoRAError, match="holds nan to nan"):
        policy.check(observation)
