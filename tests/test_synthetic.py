"""Environments without a model: Gymnasium's contract, the real environment's columns, and the measured drift."""

import copy
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode

from agents import make_agent, run
from lelora_env import AdapterConfig, EnvConfig, LeLoRAError
from lelora_env.errors import ActionError, DataError, NotReadyError, UnknownNameError
from lelora_env.matrices import MatrixInfo
from lelora_env.synthetic import SyntheticEnv, SyntheticVectorEnv, feature_rows, keyed_normal, mixed

MATRICES = [MatrixInfo(name=f"{layer}.{kind}", layer=layer, type=kind, out_features=out, in_features=6,
                       transposed=False, bias=False) for layer, (kind, out) in enumerate([("query", 5), ("up", 12)])]
SPECTRA = [np.array([5.0, 4, 3, 2, 1]), np.array([9.0, 7, 5, 3, 2, 1])]


class RankLoss(SyntheticVectorEnv):
    """L1 starts at 10 and falls by the sum of all ranks, and by a tenth for each location index."""

    def __init__(self, num_envs: int = 1, **options: Any) -> None:
        modes = {name: options.pop(name) for name in ("autoreset_mode", "max_episode_steps") if name in options}
        config = EnvConfig(**{"horizon": 3, "spectrum": 4, "steps_per_action": 2, **options})
        adapter = AdapterConfig(rank_set=(0, 1, 4))
        super().__init__(num_envs, MATRICES, feature_rows(MATRICES, SPECTRA, 4), adapter, config, **modes)

    def start_losses(self, starting: np.ndarray) -> np.ndarray:
        return 10 + keyed_normal(self.clocks.seeds, self.clocks.episodes)

    def step_losses(self, rank_index: np.ndarray, location_index: np.ndarray, running: np.ndarray) -> np.ndarray:
        ranks = np.array([0, 1, 4])[rank_index]
        return np.asarray(self.clocks.losses - ranks.sum(1) - 0.1 * location_index.sum(1))


class OneRankLoss(SyntheticEnv):
    def __init__(self, **options: Any) -> None:
        super().__init__(RankLoss(1, autoreset_mode=AutoresetMode.DISABLED, **options))


gym.register(id="RankLoss-v0", entry_point=OneRankLoss, vector_entry_point=RankLoss)


def test_the_mixer_is_the_published_one() -> None:
    assert int(mixed(0)) == 0x910A2DEC89025CC1  # SplitMix64's first output for the seed 1


def test_keyed_numbers_are_normal_and_a_function_of_their_address() -> None:
    numbers = keyed_normal(np.arange(200)[:, None], 3, np.arange(500))
    assert abs(numbers.mean()) < 0.01
    assert abs(numbers.std() - 1) < 0.01
    assert abs((numbers**4).mean() - 3) < 0.1
    for first, second in ((numbers[1:], numbers[:-1]), (numbers[:, 1:], numbers[:, :-1])):
        assert abs((first * second).mean()) < 0.015
    assert keyed_normal(17, 3, 40) == numbers[17, 40]
    assert keyed_normal(3, 17, 40) != numbers[17, 40]


def test_rows_are_what_the_real_environment_shows_of_the_same_spectra() -> None:
    env: Any = gym.make("LeLoRA-v0").unwrapped
    observation, _ = env.reset(seed=0)
    spectrum = env.tuner.base.spectrum
    spectra = [values[: min(m.out_features, m.in_features)].numpy()
               for values, m in zip(spectrum.singular_values, env.matrices, strict=True)]
    rows = feature_rows(env.matrices, spectra, env.env_config.spectrum)
    assert rows.shape == observation.shape
    np.testing.assert_allclose(rows, observation, atol=2e-5)


@pytest.mark.parametrize("name", ["RankLoss-v0", "LeLoRA-drift-v0"])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_native_lanes_equal_gymnasiums_sync_vector_env_bitwise(name: str, mode: AutoresetMode) -> None:
    lanes = 3
    options: dict[str, Any] = {"horizon": 4, "rank_cost": 0.5, "parameter_budget": 0.5}
    native = gym.make_vec(name, num_envs=lanes, vectorization_mode="vector_entry_point", autoreset_mode=mode, **options)
    sync = gym.make_vec(name, num_envs=lanes, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode},
                        **options)
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


@pytest.mark.parametrize("name", ["RankLoss-v0", "LeLoRA-drift-v0"])
def test_both_checkers_pass_without_warnings(name: str) -> None:
    env = gym.make(name, horizon=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
    from stable_baselines3.common.env_checker import check_env as check_sb3

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        check_sb3(gym.make(name, horizon=5))
    assert all("unconventional shape" in str(w.message) for w in seen), [str(w.message) for w in seen]


def test_a_step_by_hand() -> None:
    env = RankLoss(2, alpha=0.5, rank_cost=2.0)
    _, infos = env.reset(seed=0)
    start = infos["L1"].copy()
    assert infos["env_step"].tolist() == [0, 0]
    observation, reward, terminated, _, infos = env.step(np.array([[2, 1, 1, 2], [0, 0, 0, 0]]))
    fall = 4 + 1 + 0.1 * 3
    np.testing.assert_allclose(infos["L1"], start - [fall, 0])
    np.testing.assert_allclose(infos["L2"], [-fall, 0])
    trained = 4 * (5 + 6 + 1) + 1 * (12 + 6 + 1)  # usv: u, v and σ
    assert infos["trained_parameters"].tolist() == [trained, 0]
    assert infos["mean_rank"].tolist() == [2.5, 0]
    assert infos["diverged"].tolist() == [False, False]
    fraction = trained / (5 * 6 + 12 * 6)
    np.testing.assert_allclose(reward, -(start - [fall, 0]) + [0.5 * fall - 2 * fraction, 0])
    parts = sum(infos[f"reward_{name}"] for name in ("l1", "l2", "rank_cost", "divergence"))
    np.testing.assert_allclose(parts, reward)
    assert infos["optimiser_steps"].tolist() == [2, 2]
    np.testing.assert_allclose(observation[..., -1], 1 / 3)
    assert not terminated.any()


def test_a_budget_lowers_ranks_before_they_count() -> None:
    env = RankLoss(1, parameter_budget=0.5)
    env.reset(seed=0)
    *_, infos = env.step(np.array([[2, 0, 2, 0]]))
    whole = 4 * (5 + 6 + 1) + 4 * (12 + 6 + 1)
    assert infos["trained_parameters"][0] <= whole / 2
    assert infos["projected"][0] >= 1
    assert infos["L2"][0] == pytest.approx(-infos["executed_rank"][0].sum())


def test_episodes_move_on_and_seeds_bring_them_back() -> None:
    env = gym.make("LeLoRA-drift-v0", horizon=5)
    action = env.action_space.sample()

    def episode(**options: Any) -> list[float]:
        env.reset(**options)
        return [float(env.step(action)[1]) for _ in range(5)]

    first, second = episode(seed=3), episode()
    assert first != second
    assert [episode(seed=3), episode()] == [first, second]
    assert episode(seed=4) != first


def test_lanes_reset_by_mask_leave_the_others_alone() -> None:
    env = gym.make_vec("LeLoRA-drift-v0", num_envs=2, vectorization_mode="vector_entry_point", horizon=9)
    twin = copy.deepcopy(env)
    env.reset(seed=1), twin.reset(seed=1)
    actions = env.action_space.sample()
    env.step(actions), twin.step(actions)
    observation, infos = env.reset(options={"reset_mask": np.array([True, False])})
    assert observation[0, 0, -1] == 0
    assert observation[1, 0, -1] == pytest.approx(1 / 9)
    assert infos["_L1"].tolist() == [True, False]
    ours, theirs = env.step(actions), twin.step(actions)
    assert ours[1][1] == theirs[1][1]
    assert ours[1][0] != theirs[1][0]


def test_outside_limit_truncates() -> None:
    env = RankLoss(1, max_episode_steps=2)
    env.reset(seed=0)
    assert not env.step(np.zeros((1, 4), dtype=np.int64))[3].any()
    _, _, terminated, truncated, _ = env.step(np.zeros((1, 4), dtype=np.int64))
    assert truncated.all()
    assert not terminated.any()


def test_errors_say_what_to_do() -> None:
    with pytest.raises(UnknownNameError, match="changes nothing here: leave it out"):
        gym.make("LeLoRA-drift-v0", learning_rate=1e-3)
    with pytest.raises(UnknownNameError, match="Did you mean 'horizon'"):
        gym.make("LeLoRA-drift-v0", horizom=5)
    with pytest.raises(LeLoRAError, match="num_envs must be an integer of at least 1"):
        RankLoss(0)
    with pytest.raises(DataError, match="has 5 singular values"):
        feature_rows(MATRICES, [np.ones(4), np.ones(6)], 4)
    with pytest.raises(DataError, match="feature_rows"):
        RankLoss(1, spectrum=7)
    env = RankLoss(1, autoreset_mode="Disabled", horizon=1)
    with pytest.raises(NotReadyError, match="reset"):
        env.step(np.zeros((1, 4), dtype=np.int64))
    env.reset(seed=0)
    with pytest.raises(ActionError, match="out of range"):
        env.step(np.array([[3, 0, 0, 0]]))
    env.step(np.zeros((1, 4), dtype=np.int64))
    with pytest.raises(NotReadyError, match="reset_mask"):
        env.step(np.zeros((1, 4), dtype=np.int64))
    with pytest.raises(ActionError, match="must have shape"):
        OneRankLoss().step(np.zeros(3, dtype=np.int64))


# ---------------------------------------------------------------------- the drift


def losses_of(env: Any, steps: int, *, action: np.ndarray | None = None) -> np.ndarray:
    """L1 at the start and after each step, (steps + 1, L)."""
    found = [env.reset(seed=11)[1]["L1"]]
    for _ in range(steps):
        found.append(env.step(env.action_space.sample() if action is None else action)[4]["L1"])
    return np.array(found)


def drift_lanes(lanes: int, **options: Any) -> Any:
    return gym.make_vec("LeLoRA-drift-v0", num_envs=lanes, vectorization_mode="vector_entry_point", **options)


def test_the_action_makes_no_difference_and_neither_do_other_lanes() -> None:
    env = drift_lanes(3, horizon=20)
    random, fixed = losses_of(env, 20), losses_of(env, 20, action=np.zeros((3, 48), dtype=np.int64))
    assert np.array_equal(random, fixed)
    assert np.array_equal(losses_of(drift_lanes(1, horizon=20), 20)[:, 0], random[:, 0])
    assert len(set(random[-1])) == 3


def test_common_random_numbers_give_all_lanes_the_same_losses() -> None:
    losses = losses_of(drift_lanes(3, horizon=20, common_random_numbers=True), 20)
    assert np.array_equal(losses, np.repeat(losses[:, :1], 3, axis=1))


MEASURED = {0: 0.694, 60: 0.676, 100: 0.631, 140: 0.474, 180: 0.294, 500: 0.237}
"""L1 after so many env steps in benchmarks/drift_curve.py: the mean of five lanes, at the end of one."""

MEASURED_NOISE = {(60, 120): 0.00068, (120, 170): 0.00161, (200, 340): 0.00167, (340, 490): 0.00034}
"""Spread of L2 less its running mean over 11 steps in those portions of the same runs."""


def test_the_reward_rises_as_in_the_measured_runs() -> None:
    losses = losses_of(drift_lanes(400), 500)
    for step, measured in MEASURED.items():
        assert losses[step].mean() == pytest.approx(measured, abs=0.03), step
    assert (losses > 0).all()
    assert losses[-50:].mean() < losses[:50].mean() - 0.4


def test_the_noise_of_l2_is_white_and_as_large_as_in_the_measured_runs() -> None:
    steps = np.diff(losses_of(drift_lanes(200), 500), axis=0)
    mean = np.stack([np.convolve(lane, np.full(11, 1 / 11), "valid") for lane in steps.T], axis=1)
    noise = steps[5:-5] - mean
    for (begin, end), measured in MEASURED_NOISE.items():
        assert 1 / 1.7 < noise[begin:end].std() / measured < 1.7, (begin, end)
    lag = (noise[1:] * noise[:-1]).mean() / (noise**2).mean()
    assert lag == pytest.approx(-1 / 11, abs=0.05)  # white noise less its running mean


def test_another_horizon_runs_through_the_same_curve() -> None:
    whole, short = losses_of(drift_lanes(300), 500), losses_of(drift_lanes(300, horizon=50), 50)
    np.testing.assert_allclose(short.mean(1), whole[::10].mean(1), atol=0.02)
    np.testing.assert_allclose(short[-1].std(), whole[-1].std(), rtol=0.35)


def test_an_agent_runs_in_it() -> None:
    env = drift_lanes(2, horizon=6)
    history = run(env, make_agent("reinforce", env, seed=0), episodes=1, seed=0)
    assert [episode.length for episode in history.episodes] == [6, 6]
