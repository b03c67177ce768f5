"""Stable-Baselines3 on single and vector environments, and its algorithms under our protocol."""

import logging
import warnings
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

from agents import AgentSpec, Transition, make_agent, run
from agents.sb3 import StepCallback, make_sb3
from agents.sb3_agent import SB3Agent
from agents.sb3_vec_env import SB3VecEnv
from lelora_env import LeLoRAVectorEnv
from lelora_env.errors import LeLoRAError, UnknownNameError
from tests.toy_env import Array, ToyEnv, ToyVectorEnv

SAME_STEP = AutoresetMode.SAME_STEP


def _lanes(num_envs: int = 3, **options: Any) -> ToyVectorEnv:
    return ToyVectorEnv(num_envs, autoreset_mode=SAME_STEP, **options)


def _actions(steps: int, lanes: int, num_matrices: int = 6) -> Array:
    return np.random.default_rng(0).integers([4, 3] * num_matrices, size=(steps, lanes, 2 * num_matrices))


# --- the adapter ----------------------------------------------------------------------------------------------------


def test_the_toy_itself_passes_sb3s_checker() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*unconventional shape.*")
        check_env(ToyEnv())


@pytest.mark.parametrize("truncates", [False, True])
def test_the_adapter_does_what_sb3s_own_dummy_vec_env_does(truncates: bool) -> None:
    """Foreign reference: the same lanes as single environments in SB3's DummyVecEnv, step by step."""
    horizons = [2, 3, 5]
    ours = SB3VecEnv(_lanes(horizons=horizons, truncates=truncates))
    theirs = DummyVecEnv([partial(ToyEnv, horizons=h, truncates=truncates) for h in horizons])
    np.testing.assert_array_equal(ours.reset(), theirs.reset())
    assert ours.reset_infos == theirs.reset_infos
    for action in _actions(12, 3):
        got, expected = ours.step(action), theirs.step(action)
        for a, b in zip(got[:3], expected[:3], strict=True):
            np.testing.assert_array_equal(a, b)
            assert np.asarray(a).dtype == np.asarray(b).dtype
        for a, b in zip(got[3], expected[3], strict=True):
            assert sorted(a) == sorted(b)
            assert a["TimeLimit.truncated"] is b["TimeLimit.truncated"]
            assert a["L1"] == pytest.approx(b["L1"])
            if "terminal_observation" in b:
                np.testing.assert_array_equal(a["terminal_observation"], b["terminal_observation"])
        assert ours.reset_infos == theirs.reset_infos
    assert ours.get_attr("render_mode") == theirs.get_attr("render_mode") == [None] * 3


def test_vec_monitor_counts_episode_returns() -> None:
    env = VecMonitor(SB3VecEnv(_lanes(2, horizons=[2, 3])))
    env.reset()
    sums, lengths, episodes = np.zeros(2), np.zeros(2, dtype=int), 0
    for action in _actions(12, 2):
        _, reward, done, infos = env.step(action)
        sums, lengths = sums + reward, lengths + 1
        for lane in np.flatnonzero(done):
            assert infos[lane]["episode"]["r"] == pytest.approx(sums[lane], rel=1e-5)
            assert infos[lane]["episode"]["l"] == lengths[lane] == [2, 3][lane]
            sums[lane], lengths[lane], episodes = 0, 0, episodes + 1
    assert episodes == 6 + 4


def test_methods_attributes_and_options_by_lane() -> None:
    lanes = _lanes(3, small_matrices=1)
    env = SB3VecEnv(lanes)
    masks = env.env_method("action_masks")
    assert [mask.shape for mask in masks] == [(6 * 7,)] * 3
    assert not masks[0][3]
    assert len(env.env_method("action_masks", indices=[1])) == 1
    assert env.env_method("best_action", indices=0)[0].shape == (12,)
    assert env.get_attr("num_matrices", indices=[0, 2]) == [6, 6]
    assert env.has_attr("action_masks")
    assert not env.has_attr("no_such_thing")
    env.set_attr("note", "x")
    assert lanes.note == "x"  # type: ignore[attr-defined]
    with pytest.raises(LeLoRAError, match="all of them"):
        env.set_attr("note", "y", indices=[0])
    assert env.env_is_wrapped(gym.Wrapper) == [False] * 3
    env.set_options([{"a": 1}, {"a": 2}, {}])
    with pytest.raises(LeLoRAError, match="share their reset options"):
        env.reset()


def test_seed_and_options_reach_the_next_reset_once() -> None:
    class Spy(ToyVectorEnv):
        calls: list[Any]

        def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Array, dict[str, Any]]:
            self.__dict__.setdefault("calls", []).append((seed, options))
            return super().reset(seed=seed, options=options)

    spy = Spy(3, autoreset_mode=SAME_STEP)
    env = SB3VecEnv(spy)
    assert list(env.seed(40)) == [40, 41, 42]
    env.set_options({"a": 1})
    env.reset()
    env.reset()
    assert spy.calls == [(40, {"a": 1}), (None, None)]


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_other_autoreset_modes_are_refused(mode: AutoresetMode) -> None:
    with pytest.raises(LeLoRAError, match=r"autoreset_mode=AutoresetMode\.SAME_STEP"):
        make_sb3("ppo", ToyVectorEnv(2, autoreset_mode=mode))


def test_gymnasiums_sync_vector_env_works_too() -> None:
    ours = SB3VecEnv(_lanes(2, horizons=3))
    sync = SB3VecEnv(SyncVectorEnv([lambda: ToyEnv(horizons=3)] * 2, autoreset_mode=SAME_STEP))
    np.testing.assert_array_equal(ours.reset(), sync.reset())
    for action in _actions(7, 2):
        got, expected = ours.step(action), sync.step(action)
        np.testing.assert_array_equal(got[0], expected[0])
        for a, b in zip(got[3], expected[3], strict=True):
            assert sorted(a) == sorted(b)


# --- SB3's own learn ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ppo", "a2c"])
@pytest.mark.parametrize("lanes", [0, 4])
def test_sb3_learns_end_to_end_and_calls_our_observer(name: str, lanes: int) -> None:
    env: Any = _lanes(lanes, horizons=5) if lanes else ToyEnv(horizons=5)
    rollout: dict[str, Any] = {"n_steps": 10} | ({"batch_size": 10} if name == "ppo" else {})
    model = make_sb3(name, env, seed=0, **rollout)
    before = [p.detach().clone() for p in model.policy.parameters()]
    seen: list[tuple[Transition, dict[str, float], int]] = []
    model.learn(40 * max(lanes, 1), callback=StepCallback(lambda t, s, n: seen.append((t, s, n))))
    assert any(not torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
    assert model.ep_info_buffer
    assert model.ep_info_buffer[0]["l"] == 5
    assert [n for _, _, n in seen] == list(range(1, 41))
    transition = seen[4][0]
    assert transition.terminated.all()
    np.testing.assert_allclose(transition.next_observation[:, 0, -1], 1.0)  # the episode's last, not the reset's
    np.testing.assert_allclose(transition.info["L1"], 1 - transition.reward, rtol=1e-6)
    assert [n for _, scalars, n in seen if "train/value_loss" in scalars] == [11, 21, 31]


@pytest.mark.parametrize("truncates", [False, True])
def test_no_bootstrap_past_the_end_of_a_run_but_past_an_outside_stop(truncates: bool) -> None:
    """γ = 0.5, λ = 1, values forced to 8: a two-step episode returns r1 + r2/2, plus 8/4 only if cut from outside."""
    env = _lanes(2, horizons=2, truncates=truncates)
    model: Any = make_sb3("ppo", env, seed=0, n_steps=4, batch_size=8, gamma=0.5, gae_lambda=1.0, learning_rate=1e-9)
    with torch.no_grad():
        model.policy.value_net.head.weight.zero_()
        model.policy.value_net.head.bias.fill_(8.0)
    rewards: list[Array] = []
    model.learn(8, callback=StepCallback(lambda t, s, n: rewards.append(t.reward)))
    reward = np.stack(rewards)  # (T, L)
    bonus = 8 / 4 if truncates else 0
    first, last = reward[0::2] + reward[1::2] / 2 + bonus, reward[1::2] + 2 * bonus
    expected = np.stack([first, last], axis=1).reshape(4, 2)
    returns = model.rollout_buffer.returns.reshape(2, 4).T  # get() has put the lanes first
    np.testing.assert_allclose(returns, expected, rtol=1e-5)


def test_a_flat_policy_gets_a_warning_and_another_does_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make_agent("ppo", ToyEnv(), policy="MlpPolicy")
        assert "flat vector" in caplog.text
        caplog.clear()
        make_agent("ppo", ToyEnv(), policy=ActorCriticPolicy)
        make_agent("ppo", ToyEnv())
        assert not caplog.text


@pytest.mark.parametrize("lanes", [0, 2])
def test_ppo_on_the_built_in_instance_reports_true_returns(lanes: int) -> None:
    single: Any = gym.make("LeLoRA-v0", horizon=3)
    env: Any = LeLoRAVectorEnv(lanes, horizon=3, autoreset_mode=SAME_STEP) if lanes else single
    returns: list[float] = []
    total = np.zeros(max(lanes, 1))

    def on_step(transition: Transition, scalars: dict[str, float], step: int) -> None:
        total[:] += transition.reward
        if transition.done.any():
            assert transition.terminated.all()
            returns.extend(total.tolist())
            total[:] = 0

    model: Any = make_sb3("ppo", env, seed=0, n_steps=6, batch_size=6)
    model.learn(12 * max(lanes, 1), callback=StepCallback(on_step))
    assert [float(episode["r"]) for episode in model.ep_info_buffer] == pytest.approx(returns, rel=1e-4)
    assert len(returns) == 4 * max(lanes, 1)


# --- the same algorithms under our protocol -------------------------------------------------------------------------


POLICIES = [("ppo", "per_matrix"), ("a2c", "per_matrix"), ("ppo", "MlpPolicy"), ("a2c", "MlpPolicy")]


@pytest.mark.parametrize(("name", "policy"), POLICIES)
@pytest.mark.parametrize("lanes", [0, 3])
@pytest.mark.parametrize("truncates", [False, True])
def test_the_agent_learns_bit_for_bit_what_sb3s_learn_does(name: str, policy: str, lanes: int, truncates: bool) -> None:
    """Foreign reference: SB3's own training loop, with the same seed and settings."""
    settings: dict[str, Any] = {"seed": 3, "n_steps": 8, "gamma": 0.9, "policy": policy}
    settings |= {"batch_size": 4 * max(lanes, 1)} if name == "ppo" else {}
    options: dict[str, Any] = {"horizons": 5, "truncates": truncates}
    model = make_sb3(name, _lanes(lanes, **options) if lanes else ToyEnv(**options), **settings)
    model.learn(24 * max(lanes, 1))
    for mode in [SAME_STEP, AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED] if lanes else [None]:
        env: Any = ToyEnv(**options) if mode is None else ToyVectorEnv(lanes, autoreset_mode=mode, **options)
        agent = make_agent(name, env, **settings)
        assert isinstance(agent, SB3Agent)
        scalars: list[dict[str, float]] = []
        run(env, agent, env_steps=24, seed=3, on_step=lambda t, s, n, log=scalars: log.append(s))  # type: ignore[misc]
        for a, b in zip(model.policy.parameters(), agent.model.policy.parameters(), strict=True):
            assert torch.equal(a, b)
        assert [i for i, s in enumerate(scalars, 1) if s] == [8, 16, 24]
        assert "train/entropy_loss" in scalars[7]
        assert agent.model.num_timesteps == model.num_timesteps


def _curve(env: Any, agent: Any, steps: int) -> Array:
    return np.stack(run(env, agent, env_steps=steps, seed=0).rewards)


@pytest.mark.parametrize(("name", "policy"), POLICIES)
def test_seed_and_state_dict_fix_the_curve_whatever_else_draws(name: str, policy: str) -> None:
    env = ToyVectorEnv(2, horizons=5)
    options: dict[str, Any] = {"n_steps": 6, "policy": policy} | ({"batch_size": 6} if name == "ppo" else {})
    agent, twin = (make_agent(name, env, seed=0, **options) for _ in range(2))
    first = _curve(env, agent, 8)  # stops in the middle of a rollout
    torch.manual_seed(1)
    np.testing.assert_array_equal(first, _curve(env, twin, 8))
    state = agent.state_dict()
    rest = _curve(env, agent, 9)
    other = make_agent(name, env, seed=5, **options)
    assert not np.array_equal(first, _curve(env, make_agent(name, env, seed=5, **options), 8))
    other.load_state_dict(state)
    np.testing.assert_array_equal(rest, _curve(env, other, 9))
    assert isinstance(agent, SB3Agent)
    assert isinstance(other, SB3Agent)
    for a, b in zip(agent.model.policy.parameters(), other.model.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_stock_ppo_learns_the_stationary_bandit() -> None:
    """Chance is 0.29. The matrices never change here, so even the flat policy learns."""
    env = ToyVectorEnv(8, horizons=50, num_matrices=3)
    agent = make_agent("ppo", env, seed=0, policy="MlpPolicy", learning_rate=3e-3)
    history = run(env, agent, env_steps=200, seed=0)
    assert float(np.mean(history.rewards[:16])) < 0.45
    assert float(np.mean(history.rewards[-30:])) > 0.7


def test_a_trained_model_only_acts(tmp_path: Any) -> None:
    env = ToyEnv(horizons=5)
    make_sb3("ppo", env, seed=0).save(tmp_path / "model.zip")
    model = PPO.load(tmp_path / "model.zip", device="cpu")
    agent = SB3Agent(AgentSpec.from_env(ToyVectorEnv(4, horizons=5)), model=model, train=False)
    before = [p.detach().clone() for p in model.policy.parameters()]
    observation = ToyVectorEnv(4, horizons=5).reset()[0]
    expected, _ = model.predict(observation, deterministic=True)
    np.testing.assert_array_equal(agent.act(observation), expected)
    run(ToyVectorEnv(4, horizons=5), agent, env_steps=7)
    assert all(torch.equal(a, b) for a, b in zip(before, model.policy.parameters(), strict=True))
    with pytest.raises(LeLoRAError, match="1 lanes"):
        SB3Agent(AgentSpec.from_env(ToyVectorEnv(4)), model=model)
    with pytest.raises(LeLoRAError, match="the model was made for"):
        SB3Agent(AgentSpec.from_env(ToyEnv(num_matrices=7)), model=model, train=False)


def test_bad_input_is_a_clear_error() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'ppo'"):
        make_sb3("pp", ToyEnv())
    env = ToyEnv()
    agent = make_agent("ppo", env)
    observation = env.reset(seed=0)[0][None]
    action = agent.act(observation)
    none = np.zeros(1, dtype=bool)
    with pytest.raises(LeLoRAError, match="reward is not finite"):
        agent.update(Transition(observation, action, np.array([np.nan]), none, none, {}, observation))
    fresh = make_agent("ppo", env)
    with pytest.raises(LeLoRAError, match="without act"):
        fresh.update(Transition(observation, action, np.array([0.0]), none, none, {}, observation))
    for policy in ("per_matrix", "MlpPolicy"):
        columns = observation.copy()
        columns[..., 2:] = np.nan
        with pytest.raises(LeLoRAError, match="diverged, or the observation"):
            make_agent("ppo", env, policy=policy).act(columns)
    with pytest.raises(LeLoRAError, match="on 1 lanes"):
        agent.load_state_dict(make_agent("ppo", ToyVectorEnv(2)).state_dict())
