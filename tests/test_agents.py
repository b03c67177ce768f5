"""The protocol, the loop, and every agent on the real environment."""

import io
from dataclasses import FrozenInstanceError, fields
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from agents import AGENT_NAMES, REQUIRED, Agent, AgentSpec, History, Transition, make_agent, required_options, run
from lelora_env import LeLoRAVectorEnv
from lelora_env.errors import LeLoRAError, UnknownNameError
from tests.helpers import make_lanes
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


def test_history_never_goes_through_its_episodes_again() -> None:
    """4000 one-step episodes in 16 lanes must not cost 4000 x 64000 looks."""

    class Unread(list[Any]):
        def __iter__(self) -> Any:
            raise AssertionError("the list of episodes was read again")

    ended, zeros = np.ones(3, dtype=bool), np.zeros((3, 1))
    history = History(3)
    history.episodes = Unread()
    for _ in range(2):
        assert not history.reached(3, None)
        history.add(Transition(zeros, zeros, np.ones(3), ended, ~ended, {}, zeros))
    history.add(Transition(zeros, zeros, np.ones(3), np.array([True, False, True]), ~ended, {}, zeros))
    assert not history.reached(3, None), "lane 1 has ended two episodes"
    history.add(Transition(zeros, zeros, np.ones(3), np.array([False, True, False]), ~ended, {}, zeros))
    assert history.reached(3, None)
    assert not history.reached(4, None)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
def test_the_loop_leaves_the_last_episode_unreset(mode: AutoresetMode) -> None:
    env = ToyVectorEnv(2, horizons=3, autoreset_mode=mode)
    run(env, Recorder(6), episodes=1, seed=0)
    np.testing.assert_array_equal(env.steps, 3)


@pytest.mark.parametrize("limits", [{}, {"episodes": 0}, {"env_steps": 0}])
def test_run_wants_a_limit(limits: dict[str, Any]) -> None:
    with pytest.raises(LeLoRAError, match="at least 1"):
        run(ToyEnv(), Recorder(6), **limits)


def test_transition_is_frozen() -> None:
    agent = Recorder(6)
    run(ToyEnv(), agent, env_steps=1)
    with pytest.raises(FrozenInstanceError):
        agent.transitions[0].reward = np.zeros(1)  # type: ignore[misc]


# --- make_agent -----------------------------------------------------------------------------------------------------


def _real(lanes: int | None, name: str) -> Any:
    """The built-in instance with what an agent needs to be told; ``None`` = the single environment."""
    needed = {"horizon": 8, **required_options(name)}
    return gym.make("LeLoRA-v0", **needed) if lanes is None else make_lanes(lanes, **needed)


def _toy(lanes: int | None) -> Any:
    return ToyEnv() if lanes is None else ToyVectorEnv(lanes)


@pytest.mark.parametrize("name", AGENT_NAMES)
@pytest.mark.parametrize("lanes", [None, 3])
def test_every_name_gives_a_working_agent(name: str, lanes: int | None) -> None:
    env = _real(lanes, name) if name in REQUIRED else _toy(lanes)
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


def test_states_of_other_agents_are_refused() -> None:
    agents = [make_agent(name, ToyEnv()) for name in AGENT_NAMES]
    for agent in agents:
        for other in agents:
            if agent is not other:
                with pytest.raises(LeLoRAError, match="expected the state of a"):
                    agent.load_state_dict(other.state_dict())


# --- the real environment -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AGENT_NAMES)
def test_every_agent_fine_tunes_on_the_built_in_instance(name: str) -> None:
    env = gym.make("LeLoRA-v0", horizon=3, **required_options(name))
    agent = make_agent(name, env, seed=0)
    seen: list[Transition] = []
    history = run(env, agent, episodes=2, seed=0, on_step=lambda t, s, n: seen.append(t))
    assert [(e.length, e.terminated) for e in history.episodes] == [(3, True)] * 2
    for transition in seen:
        parts = ("reward_l1", "reward_l2", "reward_rank_cost")
        assert transition.reward[0] == pytest.approx(sum(float(transition.info[part][0]) for part in parts))
        assert env.action_space.contains(transition.action[0])
    unwrapped: Any = env.unwrapped
    assert seen[-1].info["env_step"][0] == 3
    assert np.isfinite(unwrapped.evaluate()["loss"])  # the last run is still there to be scored


def test_reinforce_on_real_lanes_is_the_same_in_every_autoreset_mode() -> None:
    seen: list[list[Transition]] = []
    for mode in ALL_MODES:
        env = LeLoRAVectorEnv(2, horizon=2, autoreset_mode=mode)
        log: list[Transition] = []
        agent = make_agent("reinforce", env, seed=0, hidden=(16,))
        run(env, agent, env_steps=5, seed=0, on_step=lambda t, s, n, log=log: log.append(t))  # type: ignore[misc]
        seen.append(log)
    for other in seen[1:]:
        for a, b in zip(seen[0], other, strict=True):
            _assert_same(a, b)
