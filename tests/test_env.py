"""The single environment against the contracts of Gymnasium and SB3."""

import contextlib
import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.wrappers import RecordEpisodeStatistics, TimeLimit
from torch import nn

from lelora_env import LeLoRAEnv, LeLoRAError
from lelora_env.errors import ActionError, NotReadyError
from tests.families import tiny_model
from tests.helpers import TokenTask, two_layer

STEP_KEYS = {
    "L1", "L2", "train_loss", "trained_parameters", "trained_fraction", "mean_rank", "update_norm_primary",
    "update_norm_medium", "update_norm_minor", "delta_norm", "grad_norm", "learning_rate", "diverged", "reward_l1",
    "reward_l2", "reward_rank_cost", "reward_divergence", "env_step", "optimiser_steps",
}
TINY: dict[str, Any] = {"reward_size": 8, "tune_size": 0, "batch_size": 4, "rank_set": (0, 1, 2)}


class CountedModule(nn.Sequential):
    """A module that counts how often somebody copies it."""

    copies = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "CountedModule":
        CountedModule.copies += 1
        raise AssertionError("the model was deep-copied")

    def __reduce__(self) -> Any:
        raise AssertionError("the model was pickled")


class VectorTask(TokenTask):
    """Regression on random vectors, for `two_layer`."""

    head = "none"
    inputs: tuple[str, ...] = ("input",)

    def _draw(self, rng: np.random.Generator, count: int) -> dict[str, torch.Tensor]:
        return {"input": torch.from_numpy(rng.standard_normal((count, 16))).float(),
                "labels": torch.from_numpy(rng.standard_normal((count, 8))).float()}

    def __init__(self) -> None:
        self.rows = 40

    def loss(self, logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return ((logits - batch["labels"]) ** 2).sum(1), torch.ones(len(logits))


def counted() -> CountedModule:
    CountedModule.copies = 0
    return CountedModule(*two_layer().children())


def options(**more: Any) -> dict[str, Any]:
    return {"task": VectorTask(), "target_modules": "all-linear", **TINY, **more}


@pytest.mark.parametrize("make", [
    lambda: gym.make("LeLoRA-v0"),
    lambda: gym.make("lelora_env:LeLoRA-v0", steps_per_action=3, horizon=5),
    lambda: gym.make("LeLoRA-v0", model=two_layer(), **options(horizon=1, extra_features=("grad_norm", "update_norm"))),
    lambda: gym.make("LeLoRA-v0", raw_observation=True, spectrum="full",
                     extra_features=("relative_depth", "grad_norm", "update_norm")),
    lambda: gym.make("LeLoRA-v0", model=tiny_model("bert", num_labels=3), task=TokenTask(), **TINY),
])
def test_both_checkers_pass_without_warnings(make: Any) -> None:
    env = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped)
    from stable_baselines3.common.env_checker import check_env as check_sb3

    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        check_sb3(make())
    assert all("unconventional shape" in str(w.message) for w in seen), [str(w.message) for w in seen]


def test_ten_thousand_random_actions_stay_in_the_spaces() -> None:
    env = gym.make("LeLoRA-v0", horizon=100, extra_features=("relative_depth", "grad_norm", "update_norm"))
    vector = gym.make_vec("LeLoRA-v0", num_envs=50, vectorization_mode="vector_entry_point", horizon=100,
                          extra_features=("relative_depth", "grad_norm", "update_norm"), learning_rate=0.1)
    vector.action_space.seed(0)
    observation, _ = vector.reset(seed=0)
    for _ in range(200):
        observation, reward, _, truncated, infos = vector.step(vector.action_space.sample())
        assert vector.observation_space.contains(observation)
        assert np.isfinite(reward).all()
        assert not truncated.any()
        assert np.isfinite(infos["L1"]).all()
    assert env.observation_space == vector.single_observation_space


def test_step_returns_plain_types_fixed_keys_and_fresh_arrays() -> None:
    env = gym.make("LeLoRA-v0", horizon=2)
    first, info = env.reset(seed=0)
    assert set(info) == {"L1", "env_step", "optimiser_steps"}
    second, reward, terminated, truncated, info = env.step(env.action_space.sample())
    assert type(reward) is float
    assert type(terminated) is bool
    assert type(truncated) is bool
    assert set(info) == STEP_KEYS
    assert all(type(value) in (float, int, bool) for value in info.values())
    parts = [value for key, value in info.items() if key.startswith("reward_")]
    assert sum(parts) == pytest.approx(reward)
    assert not np.shares_memory(first, second)
    *_, terminated, truncated, info = env.step(env.action_space.sample())
    assert (terminated, truncated) == (True, False)
    assert set(info) == STEP_KEYS


def test_budget_end_terminates_and_outside_limit_truncates() -> None:
    env = TimeLimit(gym.make("LeLoRA-v0", horizon=5), 3)
    env.reset(seed=0)
    ends = [env.step(env.action_space.sample())[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]


def test_observation_shows_progress_and_the_type_table() -> None:
    env = gym.make("LeLoRA-v0", horizon=4)
    observation, _ = env.reset(seed=0)
    names = env.get_wrapper_attr("feature_names")
    assert observation[:, names.index("progress")].tolist() == [0.0] * 24
    observation, *_ = env.step(env.action_space.sample())
    assert observation[:, names.index("progress")].tolist() == [0.25] * 24
    assert observation[:4, names.index("type")].tolist() == [0.0, 2.0, 5.0, 8.0]  # query, value, up, down
    assert observation[::4, names.index("layer")].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_same_seed_same_bits_other_seed_other_bits() -> None:
    def rollout(seed: int) -> list[np.ndarray]:
        env = gym.make("LeLoRA-v0", model=tiny_model("bert", num_labels=3), task=TokenTask(), horizon=4, **TINY)
        env.action_space.seed(3)
        result = [env.reset(seed=seed)[0]]
        for _ in range(4):
            observation, reward, *_ = env.step(env.action_space.sample())
            result += [observation, np.array(reward)]
        return result

    first, again, other = rollout(5), rollout(5), rollout(6)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_reset_without_a_seed_moves_on_to_another_episode() -> None:
    env = gym.make("LeLoRA-v0", model=tiny_model("bert", num_labels=3), task=TokenTask(), horizon=4, **TINY)
    action = env.action_space.sample()
    losses = []
    for seed in (1, None, 1, None):
        env.reset(seed=seed)
        losses.append(env.step(action)[4]["train_loss"])
    assert losses[0] == losses[2] != losses[1] == losses[3]


def test_nobody_copies_a_module_that_was_handed_in(tmp_path: Path) -> None:
    from stable_baselines3.common.monitor import Monitor

    model = counted()
    env = gym.make("LeLoRA-v0", model=model, **options())
    assert env.spec is not None
    assert RecordEpisodeStatistics(TimeLimit(env, 3)).spec is not None
    Monitor(gym.make("LeLoRA-v0", model=model, **options()), str(tmp_path / "log")).close()
    again = env.spec.make()
    env.reset(seed=0)
    again.reset(seed=0)
    vector = gym.make_vec("LeLoRA-v0", num_envs=2, vectorization_mode="vector_entry_point", model=model, **options())
    assert vector.spec is not None
    copy.deepcopy(vector.spec)
    copy.deepcopy(env)
    check_env(gym.make("LeLoRA-v0", model=model, **options()).unwrapped)
    assert CountedModule.copies == 0
    assert again.unwrapped.source.module is model  # type: ignore[attr-defined]


def test_environments_on_one_module_do_not_train_each_other() -> None:
    model = two_layer()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    one = gym.make("LeLoRA-v0", model=model, **options(learning_rate=0.05))
    two = gym.make("LeLoRA-v0", model=model, **options(learning_rate=0.05))
    lone = gym.make("LeLoRA-v0", model=two_layer(), **options(learning_rate=0.05))
    action = np.array([2, 0, 2, 2])
    for env in (one, two, lone):
        env.reset(seed=0)
    for _ in range(3):
        one.step(action)
    assert one.step(action)[1] != two.step(action)[1]
    two.reset(seed=0)
    assert two.step(action)[1] == lone.step(action)[1]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    shared = [env.unwrapped.tuner.base.spectrum for env in (one, two)]  # type: ignore[attr-defined]
    assert shared[0] is shared[1]


def test_sync_sub_environments_with_one_module_are_independent() -> None:
    vector = gym.make_vec("LeLoRA-v0", num_envs=2, vectorization_mode="sync", model=two_layer(), **options())
    vector.reset(seed=[3, 3])  # type: ignore[arg-type]
    actions = np.array([[2, 0, 2, 0], [0, 0, 0, 0]])
    rewards = [vector.step(actions)[1] for _ in range(3)][-1]
    lone = gym.make("LeLoRA-v0", model=two_layer(), **options())
    lone.reset(seed=3)
    assert [lone.step(actions[1])[1] for _ in range(3)][-1] == rewards[1] != rewards[0]


def test_spec_is_json_and_makes_the_same_environment() -> None:
    env = gym.make("LeLoRA-v0", horizon=3, rank_set=(0, 2))
    assert env.spec is not None
    spec = gym.envs.registration.EnvSpec.from_json(env.spec.to_json())
    twin = gym.make(spec)
    assert json.loads(env.spec.to_json())["kwargs"] == {"horizon": 3, "rank_set": [0, 2]}
    assert twin.action_space == env.action_space
    assert np.array_equal(twin.reset(seed=1)[0], env.reset(seed=1)[0])


def test_prefixed_id_works_in_a_spawned_worker(tmp_path: Path) -> None:
    code = ("import multiprocessing as m\n"
            "def work(q):\n"
            "    import gymnasium as gym\n"
            "    q.put(gym.make('lelora_env:LeLoRA-v0').reset(seed=0)[0].shape)\n"
            "if __name__ == '__main__':\n"
            "    c = m.get_context('spawn'); q = c.Queue(); p = c.Process(target=work, args=(q,)); p.start()\n"
            "    print(q.get(timeout=100)); p.join()\n")
    script = tmp_path / "spawned.py"
    script.write_text(code)
    root = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    out = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=150,
                         env={**os.environ, "PYTHONPATH": root})
    assert out.stdout.strip() == "(24, 36)"


def test_fork_and_state_continue_exactly_and_apart() -> None:
    env = gym.make("LeLoRA-v0", model=tiny_model("bert", num_labels=3), task=TokenTask(), horizon=12, dropout=0.1,
                   **TINY)
    env.reset(seed=0)
    actions = [env.action_space.sample() for _ in range(8)]
    for action in actions[:3]:
        env.step(action)
    state = env.unwrapped.get_state()  # type: ignore[attr-defined]
    fork = copy.deepcopy(env)
    expected = [env.step(action)[:2] for action in actions[3:6]]
    forked = [fork.step(action)[:2] for action in actions[3:6]]
    assert data_equivalence(expected, forked, exact=True)
    env.step(actions[6])
    assert data_equivalence(fork.step(actions[7])[0], env.step(actions[7])[0]) is False
    env.unwrapped.set_state(state)  # type: ignore[attr-defined]
    assert data_equivalence(expected, [env.step(action)[:2] for action in actions[3:6]], exact=True)
    with pytest.raises(LeLoRAError, match="fork"):
        copy.copy(env.unwrapped)


def test_deepcopy_survives_wrappers() -> None:
    env = RecordEpisodeStatistics(gym.make("LeLoRA-v0", horizon=3))
    env.reset(seed=0)
    twin = copy.deepcopy(env)
    action = env.action_space.sample()
    for _ in range(3):
        a, b = env.step(action), twin.step(action)
    assert a[1] == b[1]
    assert a[4]["episode"]["l"] == b[4]["episode"]["l"] == 3


def test_state_of_another_environment_is_refused() -> None:
    one, two = LeLoRAEnv(), LeLoRAEnv(rank_set=(0, 2))
    one.reset(seed=0)
    two.reset(seed=0)
    before = two.get_state()
    with pytest.raises(LeLoRAError, match="does not fit"):
        two.set_state(one.get_state())
    assert all(torch.equal(v, before[k]) for k, v in two.get_state().items())


def test_divergence_ends_the_run_with_the_documented_penalty() -> None:
    env = gym.make("LeLoRA-v0", model=two_layer(), **options(learning_rate=1e25, horizon=10, max_grad_norm=None))
    env.reset(seed=0)
    rewards: list[float] = []
    info: dict[str, Any] = {}
    diverged = False
    for _ in range(10):
        observation, reward, terminated, _, info = env.step(np.array([2, 0, 2, 0]))
        assert env.observation_space.contains(observation)
        rewards.append(float(reward))
        diverged = bool(info["diverged"])
        if terminated:
            break
    assert diverged
    assert np.isfinite(rewards).all()
    worst = min([-env.reset(seed=0)[1]["L1"], *rewards[:-1]])
    assert rewards[-1] == pytest.approx(worst * (10 - len(rewards) + 1) - 1)
    assert info["reward_divergence"] == rewards[-1]
    assert env.step(np.array([0, 0, 0, 0]))[4]["diverged"] is False


def test_action_masks_forbid_ranks_that_do_not_fit() -> None:
    model = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 8))
    env = gym.make("LeLoRA-v0", model=nn.Sequential(nn.Linear(16, 4), nn.ReLU(), nn.Linear(4, 16), nn.Linear(16, 8)),
                   task=VectorTask(), target_modules="all-linear", rank_set=(0, 4, 8), reward_size=4, tune_size=0)
    masks = env.get_wrapper_attr("action_masks")().reshape(3, 6)
    assert masks.tolist() == [[True, True, False, True, True, True]] * 2 + [[True] * 6]
    env.reset(seed=0)
    info = env.step(np.array([2, 0, 2, 0, 2, 0]))[4]
    assert info["mean_rank"] == pytest.approx((4 + 4 + 8) / 3)  # clipped to the matrix
    assert info["trained_parameters"] == 4 * 21 + 4 * 21 + 8 * 25
    assert len(model) == 2


@pytest.mark.parametrize(("action", "message"), [
    (np.zeros(5, dtype=np.int64), "shape"),
    (np.zeros(48), "integers"),
    (np.full(48, 7), "out of range: rank index 7 for matrix 0"),
    (np.full(48, -1), "out of range"),
    ("nonsense", "shape"),
])
def test_bad_actions_change_nothing(action: Any, message: str) -> None:
    env = LeLoRAEnv()
    env.reset(seed=0)
    before = env.get_state()
    with pytest.raises(ActionError, match=message):
        env.step(action)
    assert all(torch.equal(v, before[k]) for k, v in env.get_state().items())


def test_step_before_reset_and_after_the_end() -> None:
    env = LeLoRAEnv(horizon=1)
    with pytest.raises(NotReadyError, match="reset"):
        env.step(env.action_space.sample())
    with pytest.raises(NotReadyError, match="reset"):
        env.evaluate()
    env.reset(seed=0)
    env.step(env.action_space.sample())
    with pytest.raises(NotReadyError, match="finished"):
        env.step(env.action_space.sample())


def test_evaluate_trains_nothing_and_scores_every_row() -> None:
    env = LeLoRAEnv()
    env.reset(seed=0)
    before = env.get_state()
    assert env.evaluate("eval")["improvement"] == pytest.approx(0.0, abs=0.02)
    assert all(torch.equal(v, before[k]) for k, v in env.get_state().items())


def test_a_caller_without_gradients_trains_all_the_same() -> None:
    found = []
    for context in (contextlib.nullcontext(), torch.no_grad()):
        env = gym.make("LeLoRA-v0")
        with context:
            env.reset(seed=0)
            found.append(env.step(np.array([3, 0] * 24))[4]["L1"])
    assert found[0] == found[1]
