"""Native lanes: equal to single runs, independent of each other, all three autoreset modes."""

import copy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode

from lelora_env import LeLoRAEnv, LeLoRAError, LeLoRAVectorEnv
from lelora_env.errors import NotReadyError
from tests.families import FAMILIES, tiny_model
from tests.helpers import TokenTask, action_for, make_lanes

TINY: dict[str, Any] = {
    "reward_size": 8, "tune_size": 0, "batch_size": 4, "rank_set": (0, 1, 2), "parametrisation": "unit"
}


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("more", [{}, {"max_grad_norm": 0.1, "extra_features": ("grad_norm",)}])
def test_native_lanes_equal_gymnasiums_sync_vector_env_bitwise(mode: AutoresetMode, more: dict[str, Any]) -> None:
    lanes = 3
    native = make_lanes(lanes, horizon=4, autoreset_mode=mode, **more)
    sync = gym.make_vec("LeLoRA-v0", num_envs=lanes, vectorization_mode="sync", horizon=4,
                        vector_kwargs={"autoreset_mode": mode}, **more)
    assert native.metadata["autoreset_mode"] == mode
    assert native.observation_space == sync.observation_space
    assert native.action_space == sync.action_space
    assert data_equivalence(native.reset(seed=5), sync.reset(seed=5), exact=True)
    sync.action_space.seed(1)
    for step in range(11):
        if mode == AutoresetMode.DISABLED and step and step % 4 == 0:
            mask = np.ones(lanes, dtype=bool)
            assert data_equivalence(native.reset(options={"reset_mask": mask}),
                                    sync.reset(options={"reset_mask": mask.copy()}), exact=True)
        actions = sync.action_space.sample()
        ours, theirs = native.step(actions), sync.step(actions)
        for mine, other in zip(ours[:4], theirs[:4], strict=True):
            assert mine.dtype == other.dtype
            assert np.array_equal(mine, other), step
        assert data_equivalence(ours[4], theirs[4], exact=True), step


@pytest.mark.parametrize("family", [f for f in FAMILIES if f in ("bert", "deberta-v2", "gpt2", "llama", "mpnet")])
def test_one_step_of_a_lane_equals_the_same_step_alone(family: str) -> None:
    model = tiny_model(family, num_labels=3)
    model.config.pad_token_id = 1
    options = {"model": model, "task": TokenTask(), "target_modules": "all-linear", **TINY,
               "raw_observation": True, "adam_eps": 1e-5}  # so that Adam does not amplify last bits of ~0 gradients
    lanes = make_lanes(3, **options)
    alone = LeLoRAEnv(**options)
    rng = np.random.default_rng(0)
    lanes.reset(seed=0)
    alone.reset(seed=0)
    for _ in range(3):
        actions = rng.integers(0, lanes.single_action_space.nvec, size=lanes.action_space.shape)
        for lane in range(3):
            alone.set_state(lanes.get_state(lane))
            observation, reward, *_ = alone.step(actions[lane])
            before = lanes.get_state(lane)
            together = lanes.fork().step(actions)
            assert np.abs(observation - together[0][lane]).max() <= 1e-5
            assert abs(reward - together[1][lane]) <= 1e-6
            assert all(torch.equal(v, before[k]) for k, v in lanes.get_state(lane).items())
        lanes.step(actions)


def test_lanes_do_not_feel_each_others_actions() -> None:
    one, two = make_lanes(2), make_lanes(2)
    one.reset(seed=0)
    two.reset(seed=0)
    a, b = action_for(one, 3, 0), action_for(one, 3, 0)
    b[1] = 0
    for _ in range(3):
        left, right = one.step(a), two.step(b)
    assert np.array_equal(left[0][0], right[0][0])
    assert left[1][0] == right[1][0]
    assert left[1][1] != right[1][1]


def test_a_diverged_lane_ends_alone_and_restarts_bitwise() -> None:
    env = make_lanes(3, autoreset_mode="NextStep", horizon=8)
    calm = make_lanes(3, autoreset_mode="NextStep", horizon=8)
    start, _ = env.reset(seed=0)
    calm.reset(seed=0)
    with torch.no_grad():
        env.tuner.bank.rows["32"][1, 3] = float("nan")
    action = action_for(env, 1, 0)
    observation, reward, terminated, truncated, infos = env.step(action)
    expected = calm.step(action)
    assert terminated.tolist() == [False, True, False]
    assert infos["diverged"].tolist() == [False, True, False]
    assert not truncated.any()
    assert np.isfinite(reward).all()
    assert env.observation_space.contains(observation)
    for lane in (0, 2):
        assert np.array_equal(observation[lane], expected[0][lane])
        assert reward[lane] == expected[1][lane]
    observation, reward, terminated, _, infos = env.step(action)
    assert (reward[1], terminated[1], infos["env_step"][1]) == (0.0, False, 0)
    assert np.array_equal(observation[1], start[1])  # the planted model has no head: every start is the same
    assert np.array_equal(observation[0], calm.step(action)[0][0])


@pytest.mark.parametrize("exact", [True, False])
def test_lanes_that_have_been_reset_apart_equal_single_runs(exact: bool) -> None:
    """Lane 1 starts its next episode two env steps into lane 0's; bitwise where the rows of all lanes are one shape."""
    options: dict[str, Any] = {"horizon": 9, "common_random_numbers": not exact}
    if not exact:  # wider padding for one lane's sake, and batched kernels, may change last bits
        options |= {"model": tiny_model("bert", num_labels=3), "task": TokenTask(), "raw_observation": True,
                    "adam_eps": 1e-5, "dropout": 0.1, **TINY}
    lanes = make_lanes(2, **options)
    single = [LeLoRAEnv(**options) for _ in range(2)]
    rng = np.random.default_rng(0)
    seeds = [4, 5] if exact else [4, 4]
    first, _ = lanes.reset(seed=4)
    for lane in range(2):
        assert np.allclose(single[lane].reset(seed=seeds[lane])[0], first[lane], atol=0 if exact else 1e-5)
    for step in range(6):
        if step == 2:
            again, _ = lanes.reset(options={"reset_mask": np.array([False, True])})
            assert np.allclose(single[1].reset()[0], again[1], atol=0 if exact else 1e-5)
        actions = rng.integers(0, lanes.single_action_space.nvec, size=lanes.action_space.shape)
        observation, reward, _, _, infos = lanes.step(actions)
        for lane in range(2):
            alone = single[lane].step(actions[lane])
            assert infos["env_step"][lane] == alone[4]["env_step"] == (step + 1 if lane == 0 or step < 2 else step - 1)
            assert np.allclose(alone[0], observation[lane], rtol=0, atol=0 if exact else 1e-4)
            assert np.allclose(alone[1], reward[lane], rtol=0, atol=0 if exact else 1e-5)
            assert np.allclose(alone[4]["train_loss"], infos["train_loss"][lane], rtol=0, atol=0 if exact else 1e-4)


def test_a_mask_as_the_first_reset_draws_one_seed_for_all_lanes() -> None:
    env = make_lanes(3, common_random_numbers=True)
    env.reset(options={"reset_mask": np.array([False, True, False])})
    env.reset(options={"reset_mask": np.array([True, False, True])})
    seeds = [int(env.get_state(lane)["finetune.clock"][0]) for lane in range(3)]
    assert seeds[0] == seeds[1] == seeds[2] >= 0
    _, reward, *_ = env.step(action_for(env, 3, 0))
    assert reward[0] == reward[1] == reward[2]


def test_common_random_numbers_share_data_but_not_actions() -> None:
    env = make_lanes(3, model=tiny_model("bert", num_labels=3), task=TokenTask(), common_random_numbers=True,
                     horizon=5, **TINY)
    env.reset(seed=4)
    action = action_for(env, 2, 0)
    action[2] = 0
    _, reward, *_ = env.step(action)
    assert reward[0] == pytest.approx(reward[1], abs=1e-6)
    assert reward[2] != reward[0]
    with pytest.raises(LeLoRAError, match="share one seed"):
        env.reset(seed=[1, 2, 3])
    apart = make_lanes(3, model=tiny_model("bert", num_labels=3), task=TokenTask(), horizon=5, **TINY)
    apart.reset(seed=4)
    _, reward, *_ = apart.step(action)
    assert abs(reward[0] - reward[1]) > 1e-5


def test_a_state_moves_between_lanes() -> None:
    env = make_lanes(3, model=tiny_model("bert", num_labels=3), task=TokenTask(), horizon=9, **TINY)
    env.reset(seed=0)
    action = action_for(env, 2, 0)
    env.step(action)
    env.set_state(env.get_state(0))
    for _ in range(2):
        observation, reward, *_ = env.step(action)
    assert np.ptp(observation, axis=0).max() <= 1e-6
    assert np.ptp(reward) <= 1e-6


def test_fork_goes_its_own_way() -> None:
    env = make_lanes(2)
    env.reset(seed=0)
    twin = copy.deepcopy(env)
    assert twin.tuner.base is env.tuner.base
    action = action_for(env, 3, 0)
    before = env.get_state(0)
    twin.step(action)
    assert all(torch.equal(v, before[k]) for k, v in env.get_state(0).items())
    ahead = twin.fork()
    env.step(action)
    for lane in range(2):  # the same action leads to the same state, each in its own environment
        own = twin.get_state(lane)
        assert all(torch.equal(v, own[k]) for k, v in env.get_state(lane).items())
    changed = twin.get_state(0)["rows.32"]
    assert not torch.equal(changed, before["rows.32"])
    assert data_equivalence(ahead.step(action)[:2], env.step(action)[:2], exact=True)
    assert torch.equal(twin.get_state(0)["rows.32"], changed)
    with pytest.raises(LeLoRAError, match="fork"):
        copy.copy(env)


def test_each_mode_keeps_its_own_metadata() -> None:
    modes = [make_lanes(1, autoreset_mode=mode) for mode in AutoresetMode]
    assert [env.metadata["autoreset_mode"] for env in modes] == list(AutoresetMode)
    assert LeLoRAVectorEnv.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP


def test_outside_limit_truncates() -> None:
    env = make_lanes(2, horizon=5, max_episode_steps=2, autoreset_mode="SameStep")
    env.reset(seed=0)
    env.step(action_for(env, 0, 0))
    _, _, terminated, truncated, infos = env.step(action_for(env, 0, 0))
    assert truncated.all()
    assert not terminated.any()
    assert infos["final_info"]["env_step"].tolist() == [2, 2]
    assert infos["env_step"].tolist() == [0, 0]


def test_disabled_mode_refuses_finished_lanes() -> None:
    env = make_lanes(2, horizon=1)
    env.reset(seed=0)
    env.step(action_for(env, 0, 0))
    with pytest.raises(NotReadyError, match="reset_mask"):
        env.step(action_for(env, 0, 0))
    env.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(NotReadyError, match=r"\[1\]"):
        env.step(action_for(env, 0, 0))


@pytest.mark.parametrize("mask", [np.array([True]), np.array([1, 0]), np.array([False, False]), [True, False]])
def test_bad_reset_masks(mask: Any) -> None:
    env = make_lanes(2)
    env.reset(seed=0)
    with pytest.raises(LeLoRAError, match="reset_mask"):
        env.reset(options={"reset_mask": mask})


@pytest.mark.parametrize("seed", [[1], -1, [1, 2, 3]])
def test_bad_seeds(seed: Any) -> None:
    with pytest.raises(LeLoRAError, match="seed"):
        make_lanes(2).reset(seed=seed)


def test_gymnasium_wrappers_accept_the_native_environment() -> None:
    native = make_lanes(2, horizon=2, autoreset_mode="NextStep")
    env = gym.wrappers.vector.DictInfoToList(gym.wrappers.vector.RecordEpisodeStatistics(make_lanes(
        2, horizon=2, autoreset_mode="NextStep")))
    native.reset(seed=0)
    _, listed = env.reset(seed=0)
    assert [info["env_step"] for info in listed] == [0, 0]
    total = np.zeros(2)
    for step in range(3):
        action = action_for(native, 3, 0)
        observation, reward, _, _, infos = native.step(action)
        wrapped, same_reward, _, _, listed = env.step(action)
        total += reward
        assert np.array_equal(wrapped, observation)
        assert np.array_equal(same_reward, reward)
        assert [info["L1"] for info in listed] == infos["L1"].tolist()
        assert ["episode" in info for info in listed] == [step == 1] * 2
        if step == 1:
            assert [info["episode"]["r"] for info in listed] == pytest.approx(total.tolist())


def test_a_state_goes_into_several_lanes_and_no_others() -> None:
    env = make_lanes(4)
    env.reset(seed=0)
    env.step(env.action_space.sample())
    states = [env.get_state(lane) for lane in range(4)]
    env.set_state(states[1], [3, 0, 3, 3])  # named more than once
    for lane, expected in enumerate((1, 1, 2, 1)):
        found = env.get_state(lane)
        assert all(torch.equal(value, states[expected][key]) for key, value in found.items()), lane
    env.set_state(states[2])
    assert all(torch.equal(env.get_state(3)[key], value) for key, value in states[2].items())


def test_a_few_lanes_and_many_lanes_are_reset_to_the_same_start() -> None:
    """Few lanes are measured one by one, many in one pass; on the built-in instance the bits are the same."""
    found = []
    for lanes in (4, 40):
        env = make_lanes(lanes)
        env.reset(seed=0)
        env.step(np.ones_like(env.action_space.sample()))
        mask = np.arange(lanes) == 1
        observation, infos = env.reset(seed=None, options={"reset_mask": mask})
        found.append((observation[1], infos["L1"][1], env.get_state(1)["rows.32"]))
    assert np.array_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert torch.equal(found[0][2], found[1][2])
