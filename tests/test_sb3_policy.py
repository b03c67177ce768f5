"""The per-matrix network in Stable-Baselines3: distribution, critic, saving, known baseline, and that it learns."""

import copy
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.vec_env import VecMonitor
from torch import Tensor

import agents.sb3_policy
from agents import ActionDistribution, AgentSpec, PerMatrixPolicy, Transition, make_agent, run
from agents.sb3 import KnownBaseline, StepCallback, VecKnownBaseline, beyond_known, make_sb3, sb3_defaults
from agents.sb3_agent import SB3Agent
from agents.sb3_policy import Critic, PerMatrixActorCriticPolicy, PerMatrixDistribution
from agents.sb3_vec_env import SB3VecEnv
from lelora_env import LeLoRAVectorEnv
from lelora_env.errors import LeLoRAError
from tests.toy_env import ToyEnv, ToyVectorEnv

SAME_STEP = AutoresetMode.SAME_STEP


def _policy(spec: AgentSpec, **options: Any) -> Any:
    return PerMatrixActorCriticPolicy(spec.observation_space, spec.action_space, lambda _: 1e-3, spec=spec, **options)


def _observation(env: ToyVectorEnv) -> Tensor:
    """The first one, with noise in all but the two index columns."""
    observation = env.reset(seed=0)[0].copy()
    observation[..., 2:] += np.random.default_rng(1).normal(size=observation[..., 2:].shape)
    return torch.from_numpy(observation.astype(np.float32))


def _logits(lanes: int, matrices: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return (torch.randn(lanes, matrices, 4, generator=generator),
            torch.randn(lanes, matrices, 3, generator=generator))


# --- the distribution -----------------------------------------------------------------------------------------------


def test_log_probability_and_entropy_are_means_over_matrices_with_the_rank_zero_rule() -> None:
    """Against float64 NumPy, matrix by matrix."""
    env = ToyVectorEnv(3, num_matrices=5)
    ranks, locations = _logits(3, 5)
    distribution = PerMatrixDistribution(AgentSpec.from_env(env)).proba_distribution(
        ActionDistribution.from_logits(ranks, locations, zero_rank=0))
    actions = np.random.default_rng(0).integers([4, 3] * 5, size=(3, 10))
    assert (actions[:, 0::2] == 0).any()
    p, q = (np.exp(x.double().numpy()) for x in (ranks, locations))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    log_prob, entropy = np.zeros(3), np.zeros(3)
    for lane in range(3):
        for m in range(5):
            r, s = actions[lane, 2 * m:2 * m + 2]
            log_prob[lane] += (np.log(p[lane, m, r]) + (np.log(q[lane, m, s]) if r > 0 else 0)) / 5
            where = -(q[lane, m] * np.log(q[lane, m])).sum()
            entropy[lane] += (-(p[lane, m] * np.log(p[lane, m])).sum() + (1 - p[lane, m, 0]) * where) / 5
    np.testing.assert_allclose(distribution.log_prob(torch.from_numpy(actions).float()), log_prob, rtol=1e-5)
    np.testing.assert_allclose(distribution.entropy(), entropy, rtol=1e-5)


def test_samples_come_as_often_as_the_agent_says() -> None:
    env = ToyVectorEnv(1, num_matrices=3, small_matrices=1)
    agent = make_agent("ppo", env, seed=0, policy_kwargs={"network_options": {"head_scale": 1.0}})
    assert isinstance(agent, SB3Agent)
    observation = np.asarray(env.reset(seed=0)[0])
    told = agent.probabilities(observation)
    assert told.shape == (1, 3, 4, 3)
    assert told.dtype == np.float32
    np.testing.assert_allclose(told.sum((2, 3)), 1, atol=1e-6)
    drawn = agent.act(np.repeat(observation, 4_000, axis=0)).reshape(-1, 3, 2)
    seen = np.stack([np.bincount(drawn[:, m, 0] * 3 + drawn[:, m, 1], minlength=12) for m in range(3)]) / 4_000
    assert told.max() > 0.15  # not uniform, which is 0.083
    np.testing.assert_allclose(seen.reshape(3, 4, 3), told[0], atol=0.03)
    assert seen.reshape(3, 4, 3)[0, 3].sum() == told[0, 0, 3].sum() == 0  # the first matrix is too small for that rank
    assert seen.reshape(3, 4, 3)[1, 3].sum() > 0
    agent.train = False
    likeliest = agent.act(observation).reshape(3, 2)
    np.testing.assert_array_equal(likeliest, np.stack([told[0].sum(2).argmax(1), told[0].sum(1).argmax(1)], axis=1))


def test_probabilities_of_a_stock_policy() -> None:
    env = ToyVectorEnv(2, num_matrices=3)
    agent = make_agent("ppo", env, seed=0, policy="MlpPolicy")
    assert isinstance(agent, SB3Agent)
    assert agent.network is None
    observation = np.asarray(env.reset(seed=0)[0])
    head: Any = agent.model.policy.action_net
    with torch.no_grad():
        head.bias.copy_(torch.arange(21) / 10)
        head.weight.zero_()
    logits = np.arange(21).reshape(3, 7) / 10
    p, q = np.exp(logits[:, :4]), np.exp(logits[:, 4:])
    expected = (p / p.sum(1, keepdims=True))[:, :, None] * (q / q.sum(1, keepdims=True))[:, None]
    np.testing.assert_allclose(agent.probabilities(observation), np.stack([expected] * 2), rtol=1e-5)


# --- the networks ---------------------------------------------------------------------------------------------------


def test_actor_and_critic_share_nothing_and_the_optimiser_holds_all_of_both() -> None:
    env = ToyVectorEnv(2)
    policy = _policy(AgentSpec.from_env(env), network_options={"head_scale": 1.0})
    assert isinstance(policy.action_net.network, PerMatrixPolicy)
    observation = _observation(env)
    with torch.no_grad():
        policy.value_net.head.weight.fill_(0.1)
    held = {id(p) for group in policy.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in policy.parameters()}
    values, log_prob, entropy = policy.evaluate_actions(observation, torch.ones(2, 12))
    assert values.shape == (2, 1)
    assert log_prob.shape == (2,)
    assert entropy is not None
    assert entropy.shape == (2,)
    actor = [p for n, p in policy.named_parameters() if n.startswith("action_net")]
    critic = [p for n, p in policy.named_parameters() if n.startswith("value_net")]
    assert len(actor) + len(critic) == len(held)
    assert all(g is None for g in torch.autograd.grad(values.sum(), actor, retain_graph=True, allow_unused=True))
    assert all(g is None for g in torch.autograd.grad(log_prob.sum(), critic, retain_graph=True, allow_unused=True))
    assert all(bool(g.any()) for g in torch.autograd.grad(values.sum(), critic))


def test_the_number_of_weights_does_not_grow_with_the_number_of_matrices() -> None:
    policies = [_policy(AgentSpec.from_env(ToyEnv(num_matrices=m))) for m in (6, 300)]
    counts = [sum(p.numel() for p in policy.parameters()) for policy in policies]
    assert counts[0] == counts[1] < 20_000


def test_permuted_matrices_permute_the_choices_and_leave_the_value() -> None:
    env = ToyVectorEnv(2)
    policy = _policy(AgentSpec.from_env(env), network_options={"head_scale": 1.0})
    with torch.no_grad():
        policy.value_net.head.weight.normal_()
        observation, order = _observation(env), torch.tensor([3, 1, 5, 0, 2, 4])
        choices, shuffled = (policy.action_net(o) for o in (observation, observation[:, order]))
        torch.testing.assert_close(shuffled.rank_log_probs, choices.rank_log_probs[:, order])
        torch.testing.assert_close(policy.predict_values(observation[:, order]), policy.predict_values(observation))
        other = observation.clone()
        other[0, 2, -1] += 1  # the critic reads every column, also `progress`, which the actor does not
        assert policy.predict_values(other)[0] != policy.predict_values(observation)[0]
        assert torch.equal(policy.action_net(other).rank_log_probs, choices.rank_log_probs)


def test_the_critic_reads_indices_as_fractions_and_starts_at_zero() -> None:
    env = ToyVectorEnv(2)
    critic = Critic(AgentSpec.from_env(env), (64, 64))
    seen: list[Tensor] = []
    critic.body.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    assert not critic(_observation(env)).any()
    assert seen[0][0, :, 0].tolist() == [0, 0, 0.5, 0.5, 1, 1]
    with pytest.raises(LeLoRAError, match="critic_hidden must name at least one width"):
        Critic(AgentSpec.from_env(env), ())


def test_the_seed_fixes_the_weights() -> None:
    models = [make_sb3("ppo", ToyEnv(), seed=seed) for seed in (1, 1, 2)]
    first, same, other = (torch.cat([p.flatten() for p in m.policy.parameters()]) for m in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_wrong_or_missing_specs_are_clear_errors() -> None:
    with pytest.raises(LeLoRAError, match=r"AgentSpec\.from_env"):
        PPO(PerMatrixActorCriticPolicy, ToyEnv(), n_steps=4, batch_size=4)
    spec = AgentSpec.from_env(ToyEnv(num_matrices=7))
    with pytest.raises(LeLoRAError, match=r"take AgentSpec\.from_env of the model's environment"):
        PPO(PerMatrixActorCriticPolicy, ToyEnv(), n_steps=4, batch_size=4, policy_kwargs={"spec": spec})
    with pytest.raises(LeLoRAError, match="no_such_option"):
        make_agent("ppo", ToyEnv(), policy_kwargs={"network_options": {"no_such_option": 1}})


@pytest.mark.parametrize(("name", "kind"), [("ppo", PPO), ("a2c", A2C)])
def test_saved_models_go_on_as_they_were(name: str, kind: Any, tmp_path: Path) -> None:
    env = ToyEnv(horizons=5)
    settings: dict[str, Any] = {"n_steps": 8, "policy_kwargs": {"network_options": {"hidden": (16,)}}}
    settings |= {"batch_size": 4} if name == "ppo" else {}
    model: Any = make_sb3(name, env, seed=0, **settings)
    model.learn(16)
    model.save(tmp_path / "model.zip")
    loaded = kind.load(tmp_path / "model.zip", env=make_sb3(name, ToyEnv(horizons=5)).env, device="cpu")
    observation = env.reset(seed=0)[0]
    for twin in (loaded.policy, _reloaded(model.policy, tmp_path / "policy.pt")):
        a, b = (p.get_distribution(torch.from_numpy(observation[None])).choices for p in (model.policy, twin))
        assert torch.equal(a.rank_log_probs, b.rank_log_probs)
    copy_of = copy.deepcopy(loaded.policy.state_dict())
    loaded.learn(16)
    assert any(not torch.equal(copy_of[n], p) for n, p in loaded.policy.state_dict().items())


def _reloaded(policy: Any, path: Path) -> Any:
    policy.save(path)
    return PerMatrixActorCriticPolicy.load(str(path), device="cpu")


# --- the known baseline ---------------------------------------------------------------------------------------------


def test_beyond_known_takes_off_the_loss_before() -> None:
    """R = -(L1 + 0.8·L2) with L1 = 1.5 after 2.0: R = -1.1, and -R's known part is 2: what is left is 1.8·0.5."""
    assert beyond_known(-1.1, {"L1": 1.5, "L2": -0.5}) == pytest.approx(0.9)
    several = beyond_known(np.array([-1.1, -3.0]), {"L1": np.array([1.5, 3.0]), "L2": np.array([-0.5, 0.0])})
    np.testing.assert_allclose(several, [0.9, 0.0], atol=1e-6)
    assert beyond_known(0.25, {"L1": 3.0}) == 0.25


class _Falling(gym.Wrapper[Any, Any, Any, Any]):
    """The toy, with losses that fall by a tenth a step."""

    def step(self, action: Any) -> Any:
        observation, _, terminated, truncated, info = self.env.step(action)
        after = 2 - info["env_step"] / 10
        return observation, -(after - 0.08), terminated, truncated, {**info, "L1": after, "L2": -0.1}


def test_the_wrapper_of_the_single_environment() -> None:
    env = KnownBaseline(_Falling(ToyEnv(horizons=4)))
    env.reset(seed=0)
    for step in range(1, 5):
        _, reward, terminated, _, info = env.step(env.action_space.sample())
        assert reward == pytest.approx(1.8 * 0.1, abs=1e-6)
        assert info["true_reward"] == pytest.approx(-(2 - step / 10 - 0.08))
    assert terminated


@pytest.mark.parametrize("lanes", [0, 2])
@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_models_learn_from_the_rest_and_report_the_whole(lanes: int, gamma: float) -> None:
    env: Any = gym.make("LeLoRA-v0", horizon=3)
    env = LeLoRAVectorEnv(lanes, horizon=3, autoreset_mode=SAME_STEP) if lanes else env
    model: Any = make_sb3("a2c", env, seed=0, n_steps=6, gamma=gamma)
    steps: list[Transition] = []
    model.learn(6 * max(lanes, 1), callback=StepCallback(lambda t, s, n: steps.append(t)))
    reward = np.stack([t.reward for t in steps])  # (T, L)
    loss, change = (np.stack([t.info[name] for t in steps]) for name in ("L1", "L2"))
    np.testing.assert_allclose(reward, -(loss + 0.8 * change), rtol=1e-5)  # observers see the environment's rewards
    assert "true_reward" not in steps[0].info
    expected = -1.8 * change if gamma == 0 else reward
    np.testing.assert_allclose(model.rollout_buffer.rewards, expected, atol=1e-6)
    returns = [float(episode["r"]) for episode in model.ep_info_buffer]
    assert returns == pytest.approx(reward.reshape(2, 3, -1).sum(1).flatten().tolist(), rel=1e-4)


@pytest.mark.parametrize("lanes", [0, 2])
@pytest.mark.parametrize("known_baseline", [True, False])
def test_the_agent_takes_it_off_as_the_model_does(lanes: int, known_baseline: bool) -> None:
    settings: dict[str, Any] = {"seed": 1, "n_steps": 3, "known_baseline": known_baseline}
    single: Any = gym.make("LeLoRA-v0", horizon=4)
    env: Any = LeLoRAVectorEnv(lanes, horizon=4, autoreset_mode=SAME_STEP) if lanes else single
    model = make_sb3("a2c", env, **settings)
    model.learn(9 * max(lanes, 1))
    agent = make_agent("a2c", env, **settings)
    run(env, agent, env_steps=9, seed=1)
    assert isinstance(agent, SB3Agent)
    for a, b in zip(model.policy.parameters(), agent.model.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_environments_without_losses_pass_through() -> None:
    plain, wrapped = (SB3VecEnv(ToyVectorEnv(2, horizons=3, autoreset_mode=SAME_STEP)) for _ in range(2))
    known = VecKnownBaseline(VecMonitor(wrapped))
    plain.reset()
    known.reset()
    for action in np.random.default_rng(0).integers([4, 3] * 6, size=(5, 2, 12)):
        a, b = plain.step(action), known.step(action)
        np.testing.assert_array_equal(a[1], b[1])
        assert [info["true_reward"] for info in b[3]] == b[1].tolist()


# --- learning -------------------------------------------------------------------------------------------------------

LEARNING_STEPS = {"ppo": 112, "a2c": 200}


def _share_of_right_ranks(agent: SB3Agent, env: Any) -> float:
    told = agent.probabilities(np.asarray(env.reset(seed=0)[0])).sum(3)[0]  # (M, R)
    return float(told[np.arange(len(told)), env.best[:, 0]].mean())


@pytest.mark.parametrize("name", ["ppo", "a2c"])
def test_the_defaults_learn_the_toy(name: str) -> None:
    """Chance is 0.25 for the ranks; matrices whose best rank is 0 cannot learn their location, which does not count."""
    env = ToyVectorEnv(8, horizons=50)
    agent = make_agent(name, env, seed=0)
    assert isinstance(agent, SB3Agent)
    assert _share_of_right_ranks(agent, env) == pytest.approx(0.25, abs=0.02)
    run(env, agent, env_steps=LEARNING_STEPS[name], seed=0)
    assert _share_of_right_ranks(agent, env) > 0.8


@pytest.mark.parametrize("lanes", [0, 8])
def test_sb3s_own_learn_learns_the_toy(lanes: int) -> None:
    """The single environment as it is, and lanes; the likeliest action is right far more often than 0.29."""
    env: Any = ToyVectorEnv(lanes, horizons=50, autoreset_mode=SAME_STEP) if lanes else ToyEnv(horizons=50)
    model = make_sb3("ppo", env, seed=0)
    model.learn(1_024)
    action, _ = model.predict(ToyEnv().reset(seed=0)[0], deterministic=True)
    ranks = action.reshape(-1, 2)[:, 0]
    assert (ranks == ToyEnv().best[:, 0]).mean() > 0.8


# --- sb3-contrib ----------------------------------------------------------------------------------------------------


def test_without_sb3_contrib_only_the_maskable_policy_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sb3_contrib.common.maskable.policies", None)
    monkeypatch.delitem(vars(agents.sb3_policy), "PerMatrixMaskablePolicy", raising=False)
    with pytest.raises(LeLoRAError, match="pip install sb3-contrib"):
        agents.sb3_policy.PerMatrixMaskablePolicy  # noqa: B018 - the look-up is the test
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        agents.sb3_policy.no_such_name  # noqa: B018


def _contrib_model(algorithm: str, policy: Any, env: Any, **options: Any) -> Any:
    contrib = pytest.importorskip("sb3_contrib")
    return getattr(contrib, algorithm)(policy, env, seed=0, device="cpu", gamma=0.0, **options)


def test_masks_that_change_are_kept_and_maskable_ppo_learns(tmp_path: Path) -> None:
    pytest.importorskip("sb3_contrib")
    policy = agents.sb3_policy.PerMatrixMaskablePolicy
    lanes = ToyVectorEnv(8, horizons=50, small_matrices=1, autoreset_mode=SAME_STEP)
    spec, env = AgentSpec.from_env(lanes), VecMonitor(SB3VecEnv(lanes))
    settings = {k: v for k, v in sb3_defaults("ppo", 8).items() if k not in ("gamma", "device")}
    model = _contrib_model("MaskablePPO", policy, env, policy_kwargs={"spec": spec}, **settings)
    observation = env.reset()
    masks = np.ones((8, 6, 7), dtype=bool)
    masks[:, :, [1, 2, 5]] = False
    masks[:4, 3, 0] = False
    actions = np.stack([model.predict(observation, action_masks=masks.reshape(8, -1))[0] for _ in range(50)])
    ranks, locations = actions.reshape(50, 8, 6, 2)[..., 0], actions.reshape(50, 8, 6, 2)[..., 1]
    assert set(np.unique(ranks)) == {0, 3}
    assert set(np.unique(locations)) == {0, 2}
    assert (ranks[:, :4, 3] == 3).all()
    assert set(np.unique(ranks[:, 4:, 3])) == {0, 3}
    assert (ranks[:, :, 0] == 0).all()  # the spec's own mask holds as well
    model.learn(1_024)
    model.save(tmp_path / "model.zip")
    best = lanes.best[:, 0]  # the first matrix cannot take every rank
    loaded = type(model).load(tmp_path / "model.zip", device="cpu")
    action, _ = loaded.predict(lanes.reset(seed=0)[0][0], deterministic=True, action_masks=lanes.action_masks()[0])
    assert (action.reshape(-1, 2)[:, 0] == best)[1:].mean() > 0.7


def test_trpo_moves_the_actor_and_the_critic() -> None:
    env = ToyEnv(horizons=20)
    model = _contrib_model("TRPO", PerMatrixActorCriticPolicy, env, n_steps=60, batch_size=60,
                           policy_kwargs={"spec": AgentSpec.from_env(env)})
    before = copy.deepcopy(model.policy.state_dict())
    model.learn(120)
    moved = {n.split(".")[0] for n, p in model.policy.state_dict().items() if not torch.equal(before[n], p)}
    assert moved == {"action_net", "value_net"}
    assert 0 < model.logger.name_to_value["train/kl_divergence_loss"] <= 0.015


def test_within_one_short_run_it_learns_several_times() -> None:
    """One lane of 100 env steps: a rollout of 128 would never be full."""
    assert sb3_defaults("ppo", 1)["n_steps"] == sb3_defaults("ppo", 1, 1)["n_steps"] == 128
    assert sb3_defaults("ppo", 1, 100)["n_steps"] == sb3_defaults("a2c", 1, 100)["n_steps"] == 12
    assert sb3_defaults("ppo", 8, 40)["n_steps"] == 16
    env: Any = ToyVectorEnv(1, horizons=100)
    agent: Any = make_agent("ppo", env, seed=0)
    before = [p.detach().clone() for p in agent.network.parameters()]
    run(env, agent, episodes=1, seed=0)
    assert agent.model._n_updates > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, agent.network.parameters(), strict=True))
