"""The normalised score: 0 for uniform rank, 1 for the planted optimum, and honest about what it does not know."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from agents import AgentSpec, Episode, FixedAllocation, History, evaluate, make_agent
from agents.agent import AnyEnv
from agents.evaluate import FIRST_SEED, LANES, StandingStill, mean_rewards, reference
from lelora_env.errors import LeLoRAError, UnknownNameError
from lelora_env.instances import list_instances
from tests.toy_env import Array, ToyEnv, ToyVectorEnv

NAME = "planted-type/test-0"


def _oracle(env: Any) -> FixedAllocation:
    best = [(choice.rank, choice.location) for choice in env.unwrapped.task.best_allocation()]
    return FixedAllocation(AgentSpec.from_env(env), allocation=best)


def _uniform(env: AnyEnv) -> FixedAllocation:
    return FixedAllocation(AgentSpec.from_env(env))


def test_uniform_rank_scores_zero_and_the_planted_optimum_one() -> None:
    uniform, oracle = evaluate("fixed", [NAME]), evaluate(_oracle, [NAME])
    assert uniform.scores[NAME].shape == (LANES,)
    assert uniform.score == pytest.approx(0, abs=1e-3)
    assert oracle.score == pytest.approx(1, abs=1e-3)
    assert (oracle.returns[NAME] > uniform.returns[NAME]).all()
    assert -1 < evaluate("random", [NAME], lanes=2).score < 0.9


def test_a_return_is_the_mean_reward_of_single_runs_from_the_same_seeds() -> None:
    lanes = mean_rewards(NAME, _uniform, lanes=2)
    for lane in range(2):
        env: Any = gym.make("LeLoRA-v0", instance=NAME)
        env.reset(seed=FIRST_SEED + lane)
        action, rewards, done = np.tile([3, 0], env.unwrapped.num_matrices), [], False
        while not done:
            _, reward, done, _, _ = env.step(action)
            rewards.append(reward)
        assert lanes[lane] == pytest.approx(np.mean(rewards), rel=1e-4)


def test_there_is_a_reference_for_every_planted_instance_and_best_is_better() -> None:
    for name in list_instances():
        if name.startswith("planted"):
            known = reference(name)
            assert known["best"] > known["uniform"] + 10 * max(known["spread"]) / np.sqrt(LANES), name
            assert known["best_is"] == "planted optimum"


def test_the_score_is_the_mean_over_instances_of_means() -> None:
    found = evaluate("fixed", [NAME, "planted-type/test-1"], lanes=2)
    by_hand = []
    for name, returns in found.returns.items():
        known = reference(name)
        by_hand.append(np.mean([(r - known["uniform"]) / (known["best"] - known["uniform"]) for r in returns]))
    assert found.score == pytest.approx(np.mean(by_hand))


def test_agents_that_go_by_what_is_reported_hear_it_unless_told_otherwise() -> None:
    deaf, hearing = evaluate("credit", [NAME], lanes=2, learn=False), evaluate("credit", [NAME], lanes=2)
    assert deaf.score == pytest.approx(0, abs=0.05)  # knows nothing, and takes uniform rank
    assert hearing.score > deaf.score + 0.3


def test_standing_still_hands_on_all_but_learning() -> None:
    env = ToyVectorEnv(2)
    agent = make_agent("random", env, seed=3)
    still, twin = StandingStill(agent), make_agent("random", env, seed=3)
    observation = env.reset()[0]
    np.testing.assert_array_equal(still.act(observation), twin.act(observation))
    still.load_state_dict(twin.state_dict())
    assert sorted(still.state_dict()) == sorted(twin.state_dict())
    assert still.update(None) == {}  # type: ignore[arg-type]


def test_the_first_episode_of_every_lane_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lane 0 diverges at once, begins anew and ends again before lane 1 has ended its first."""
    episodes = [Episode(0, -8.0, 2, True), Episode(0, -1.0, 1, True), Episode(1, -6.0, 3, True)]

    def run(*_: Any, **__: Any) -> History:
        return History(2, episodes=episodes)

    monkeypatch.setitem(mean_rewards.__globals__, "run", run)
    found: Array = mean_rewards(NAME, _uniform, lanes=2)
    assert found.tolist() == [-4.0, -2.0]


@pytest.mark.parametrize(("instances", "message"), [
    ([], "at least one instance"),
    (["planted-typ/test-0"], "unknown instance with a reference result 'planted-typ/test-0'. Did you mean"),
    (["docstrings-minilm/test-0"], "unknown instance with a reference result 'docstrings-minilm/test-0'"),
])
def test_instances_without_a_reference_are_refused_before_anything_runs(
    instances: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(evaluate.__globals__, "run")
    with pytest.raises(LeLoRAError, match=message):
        evaluate("fixed", instances)


def test_unknown_agents_and_stray_options_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'fixed'"):
        evaluate("fixd", [NAME])
    with pytest.raises(UnknownNameError, match="lerning_rate"):
        evaluate("reinforce", [NAME], lerning_rate=1)
    with pytest.raises(LeLoRAError, match=r"options \(rank\) are for agents given by name"):
        evaluate(_oracle, [NAME], rank=2)
    with pytest.raises(LeLoRAError, match="make a LeLoRA-v0 environment with component_info"):
        evaluate(lambda env: make_agent("credit", env), [NAME], learn=True, lanes=1)


def test_the_toy_has_the_single_environments_view() -> None:
    """What budget-aware agents read of the toy is the same for one lane and for many."""
    one, many = AgentSpec.from_env(ToyEnv(small_matrices=2)), AgentSpec.from_env(ToyVectorEnv(3, small_matrices=2))
    np.testing.assert_array_equal(one.sizes(), many.sizes())
    assert one.sizes()[:, 2].tolist() == [4 * 39] * 2 + [4 * 65] * 4
    assert one.matrices == many.matrices
