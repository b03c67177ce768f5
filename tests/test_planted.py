"""The planted task: its optimum is where it says, by construction and by measurement."""

from collections import Counter

import numpy as np
import pytest

from lelora_env import LeLoRAError, LeLoRAVectorEnv
from lelora_env.allocation import bank_components, build_choice_table, component_range, encode_action
from lelora_env.config import AdapterConfig
from lelora_env.instances import INSTANCES, CycleInstances, list_instances
from lelora_env.tasks.planted import PLANS, PlantedTask
from tests.helpers import make_lanes


def best_action(env: LeLoRAVectorEnv) -> np.ndarray:
    assert isinstance(env.task, PlantedTask)
    config = env.adapter_config
    ranks = np.array([config.rank_set.index(c.rank) for c in env.task.best_allocation()])
    places = np.array([config.locations.index(c.location) for c in env.task.best_allocation()])
    return np.tile(encode_action(ranks, places), (env.num_envs, 1))


def finish(env: LeLoRAVectorEnv, action: np.ndarray) -> tuple[float, float]:
    """Mean final L1 and mean return of an episode under one allocation."""
    env.reset(seed=0)
    total = np.zeros(env.num_envs)
    for _ in range(env.horizon):
        _, reward, _, _, infos = env.step(action)
        total += reward
    return float(infos["L1"].mean()), float(total.mean())


@pytest.mark.parametrize("plan", PLANS)
def test_the_teacher_changes_exactly_the_planted_components(plan: str) -> None:
    task = PlantedTask(plan=plan, layers=3)
    for linear, change, choice in zip(task.build_model().maps(), task.changes(), task.choices, strict=True):
        left, values, right = np.linalg.svd(linear.weight.detach().double().numpy(), full_matrices=False)
        assert values[0] == pytest.approx(2.0, rel=1e-5)
        m = len(values)
        window = component_range(m, choice.rank, {"primary": 0.0, "medium": 0.5, "minor": 1.0}[choice.location])
        moved = np.linalg.norm(change @ right.T, axis=0)
        assert set(np.flatnonzero(moved > 1e-3)) == set(window)
        bank = bank_components(m, AdapterConfig(rank_set=(0, 2, 4, 8)))
        assert np.abs(left[:, bank].T @ change).max() < 1e-6


def test_best_allocation_beats_everything_else_by_far() -> None:
    """By the default instance's horizon the best gains about 90 %, no single action reaches 60 %."""
    env = make_lanes(2)
    config = env.adapter_config
    best, best_return = finish(env, best_action(env))
    assert 0.05 < best < 0.15
    rng = np.random.default_rng(0)
    env.reset(seed=0)
    for _ in range(env.horizon):
        infos = env.step(rng.integers(0, env.single_action_space.nvec, size=env.action_space.shape))[4]
    assert 1 - infos["L1"].mean() < 0.6 * (1 - best)
    for place in range(3):
        same = np.tile([len(config.rank_set) - 1, place], (2, env.num_matrices))
        loss, total = finish(env, same)
        assert 1 - loss < 0.6 * (1 - best)
        assert total < best_return
    with_rank_zero = best_action(env)
    with_rank_zero[:, 0] = 0  # drop one planted matrix
    assert finish(env, with_rank_zero)[0] > best + 0.02


@pytest.mark.parametrize("instance", [
    name if name.endswith("test-0") else pytest.param(name, marks=pytest.mark.slow)
    for name in list_instances("planted-priced")
])
def test_with_a_price_the_exact_allocation_is_best(instance: str) -> None:
    """Against every change of one matrix's rank or location: a lane for each, same rows for all."""
    best = best_action(make_lanes(1, instance=instance))[0]
    others = [best]
    for matrix in range(len(best) // 2):
        for rank in range(4):
            for place in range(3 if rank else 1):
                other = best.copy()
                other[2 * matrix : 2 * matrix + 2] = rank, place
                if rank != best[2 * matrix] or (rank and place != best[2 * matrix + 1]):
                    others.append(other)
    env = make_lanes(len(others), instance=instance, common_random_numbers=True)
    env.reset(seed=0)
    total = np.zeros(len(others))
    for _ in range(env.horizon):
        total += env.step(np.array(others))[1]
    assert total[0] > total[1:].max()


def test_the_plan_depends_on_type_and_relative_depth_alone() -> None:
    small, deep = PlantedTask(layers=6), PlantedTask(layers=12, width=64)
    assert small.choices == [c for layer in range(0, 12, 2) for c in deep.choices[4 * layer : 4 * layer + 4]]
    spread = Counter(c.location for c in small.choices if c.rank)
    assert set(spread.values()) == {4}
    assert sum(c.rank == 0 for c in small.choices) == 12


def test_a_plan_can_be_spelt_out() -> None:
    task = PlantedTask(layers=1, plan={"layers.0.up": (4, "minor")}, ranks=(4,))
    assert [c.rank for c in task.choices] == [0, 0, 4, 0]
    with pytest.raises(LeLoRAError, match=r"Did you mean 'layers.0.up'"):
        PlantedTask(layers=1, plan={"layers.0.ups": (4, "minor")})
    with pytest.raises(LeLoRAError, match="width"):
        PlantedTask(width=16)


def test_component_ranges_of_the_paper() -> None:
    assert component_range(4096, 8, 0.5) == range(2048, 2056)  # Section 3.1: r = 8, s = 2048
    assert component_range(4096, 8, 0.0) == range(8)
    assert component_range(4096, 8, 1.0) == range(4088, 4096)
    assert component_range(6, 8, 0.5) == range(6)  # r is clipped to m
    assert component_range(10, 8, 0.5) == range(2, 10)  # the start is clipped to m - r
    assert component_range(100, 4, 0.29) == range(29, 33)
    assert bank_components(6, AdapterConfig(rank_set=(0, 4))) == [0, 1, 2, 3, 4, 5]  # windows overlap


def test_choice_table_by_hand() -> None:
    table = build_choice_table([4, 6], AdapterConfig(rank_set=(0, 2, 5), locations=("primary", "minor")))
    assert table.components.tolist() == [[0, 1, 2, 3, -1, -1], [0, 1, 2, 3, 4, 5]]
    assert table.ranks.tolist() == [[0, 2, 4], [0, 2, 5]]
    assert table.legal.tolist() == [[True, True, False], [True, True, True]]
    assert table.mask[0, 1].int().tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0]]
    assert table.mask[1, 2].int().tolist() == [[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]]
    assert table.mask[:, 0].sum() == 0


def test_instances_are_named_split_and_cycled_through() -> None:
    import gymnasium as gym

    train, test = list_instances("planted-free", "train"), list_instances("planted-free", "test")
    assert not set(train) & set(test)
    assert len({INSTANCES[name].seed for name in train + test}) == len(train + test)
    env = CycleInstances(gym.make("LeLoRA-v0", instance=train[0]), train[:2])
    starts = [env.reset(seed=0) for _ in range(3)]
    assert [info["instance"] for _, info in starts] == [train[0], train[1], train[0]]
    assert np.array_equal(starts[0][0], starts[2][0])
    assert starts[0][1]["L1"] != starts[1][1]["L1"]
    env.step(env.action_space.sample())
    with pytest.raises(LeLoRAError, match="other spaces"):
        CycleInstances(gym.make("LeLoRA-v0", instance=train[0]), ["planted-deep/test-0"]).reset()
    with pytest.raises(LeLoRAError, match="unknown instance family"):
        list_instances("planted")
