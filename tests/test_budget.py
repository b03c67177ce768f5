"""The hard budget: what it makes of an action, by properties that hold whatever it does, and in the environment."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.env_checker import check_env as check_sb3

from lelora_env import AdapterConfig, LeLoRAEnv, LeLoRAError
from lelora_env.allocation import ChoiceTable, build_choice_table
from lelora_env.budget import Budget, build_budget, project
from lelora_env.keys import hashed_key
from tests.helpers import make_lanes

DIMENSIONS = [32, 32, 6, 4, 32, 1, 32, 16]
SIZES = torch.tensor([64, 96, 38, 37, 64, 33, 64, 49])


def table_of(ranks: tuple[int, ...], dimensions: list[int] = DIMENSIONS) -> ChoiceTable:
    return build_choice_table(dimensions, AdapterConfig(rank_set=ranks))


def numbers(table: ChoiceTable, index: np.ndarray, sizes: torch.Tensor = SIZES) -> np.ndarray:
    """What each lane's action trains, counted on the executed components themselves."""
    matrix = np.arange(index.shape[1])
    counts: np.ndarray = (table.mask.numpy()[matrix, index, 0].sum(-1) * sizes.numpy()).sum(1)
    return counts


def draws(table: ChoiceTable, lanes: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    matrices, ranks = table.ranks.shape
    lean = rng.uniform(0, 3, (lanes, 1))  # from lanes of large ranks to lanes of small ones
    index = np.floor(ranks * rng.random((lanes, matrices)) ** lean).astype(np.int64).clip(max=ranks - 1)
    return torch.from_numpy(index), torch.arange(lanes)


def rungs(table: ChoiceTable, matrix: int) -> list[tuple[int, int]]:
    """(rank, index) of the ranks that fit a matrix unclipped, and of the smallest, ascending."""
    return [(int(table.ranks[matrix, i]), i) for i in range(table.ranks.shape[1]) if table.legal[matrix, i]]


@pytest.mark.parametrize("ranks", [(0, 2, 4, 8), (1, 3, 9), (0, 32), (2, 4, 6, 8, 16, 32)])
@pytest.mark.parametrize("share", [0.3, 0.55, 0.9])
def test_properties_of_every_projection(ranks: tuple[int, ...], share: float) -> None:
    table = table_of(ranks)
    index, keys = draws(table)
    largest = numbers(table, np.full((1, len(DIMENSIONS)), len(ranks) - 1))[0]
    found = project(index, build_budget(share, table, SIZES), keys).numpy()
    before, after = numbers(table, index.numpy()), numbers(table, found)
    assert (after <= share * largest).all(), "above the budget"
    assert (found <= index.numpy()).all(), "a rank was raised"
    fits = before <= share * largest
    assert 0 < fits.sum() < len(fits)
    assert np.array_equal(found[fits], index.numpy()[fits]), "an action that fits was changed"
    for lane in np.flatnonzero(~fits):
        undone = []
        for matrix in np.flatnonzero(found[lane] != index[lane].numpy()).tolist():
            start = int(table.ranks[matrix, index[lane, matrix]])
            way = [i for rank, i in rungs(table, matrix) if rank < start]
            assert found[lane, matrix] in way, "not a legal rank, or none lowered"
            above = [i for i in way if i > found[lane, matrix]]
            undone.append((matrix, above[0] if above else int(index[lane, matrix])))
        lowest_step = min(int(table.ranks[m, i]) for m, i in undone)  # the rank that was lowered last
        last = [(m, i) for m, i in undone if int(table.ranks[m, i]) == lowest_step]
        assert any(_with(table, found[lane], m, i) > share * largest for m, i in last), "lowered further than needed"
        left = [int(table.ranks[m, i]) for m, i in enumerate(found[lane]) if table.ranks[m, i] > table.ranks[m, 0]]
        assert max(left, default=0) <= lowest_step, "a higher rank was left alone"


def _with(table: ChoiceTable, index: np.ndarray, matrix: int, rank_index: int) -> int:
    return int(numbers(table, np.where(np.arange(len(index)) == matrix, rank_index, index)[None])[0])


def test_worked_example() -> None:
    """Sizes 10 and 20 with ranks 0, 2, 4: 30 x 4 = 120 numbers at most."""
    table = table_of((0, 2, 4), [8, 8])
    sizes = torch.tensor([10, 20])

    def go(share: float, *index: int) -> list[int]:
        found = project(torch.tensor([index]), build_budget(share, table, sizes), torch.tensor([3]))
        return [int(i) for i in found[0]]

    assert go(1.0, 2, 2) == [2, 2]
    assert go(0.5, 2, 1) == [1, 1]  # 80 > 60: the 4 becomes a 2, 60 fits
    assert go(0.5, 1, 2) == [1, 1]  # 100 > 60
    assert go(0.5, 2, 2) == [1, 1]  # whichever 4 comes first, one lowering does not do
    assert go(1 / 3, 0, 2) == [0, 1]  # 80 > 40
    assert go(0.2, 0, 1) == [0, 0]  # 40 > 24
    with pytest.raises(LeLoRAError, match=r"the least that can train is 20: raise it to 0\.167"):
        go(0.1, 2, 0)


def test_clipped_ranks_go_down_to_a_smaller_number_of_components() -> None:
    """In a matrix of 4, ranks 4, 8 and 16 are all 4 components: the next smaller one is 2."""
    table = table_of((0, 2, 4, 8, 16), [4, 16])
    budget = build_budget(0.99, table, torch.tensor([100, 1]))
    for chosen in (2, 3, 4):
        assert project(torch.tensor([[chosen, 4]]), budget, torch.tensor([0])).tolist()[0][0] in (1, chosen)
    tight = build_budget(0.5, table, torch.tensor([100, 1]))
    assert [project(torch.tensor([[chosen, 0]]), tight, torch.tensor([0])).tolist() for chosen in (2, 3, 4)] == [
        [[1, 0]]] * 3


def fair_budget(matrices: int) -> tuple[Budget, torch.Tensor]:
    table = table_of((0, 2, 4, 8), [16] * matrices)
    return build_budget(1 - 1 / (2 * matrices), table, torch.full((matrices,), 5)), torch.tensor([[3] * matrices])


def test_ties_are_fair_between_matrices() -> None:
    """One of 6 equal matrices has to give way: each in a sixth of the cases, whatever the neighbouring keys are."""
    budget, index = fair_budget(6)
    lanes = 6000
    steps = torch.arange(lanes) % 100
    keys = hashed_key(torch.arange(lanes) // 100, torch.zeros(lanes, dtype=torch.int64), steps)
    found = project(index.expand(lanes, -1), budget, keys)
    assert ((found != 3).sum(1) == 1).all()
    share = (found != 3).double().mean(0).numpy()
    assert np.allclose(share, 1 / 6, atol=4 * np.sqrt(5 / 36 / lanes)), share
    again = project(index.expand(lanes, -1), budget, keys)
    assert torch.equal(found, again)
    alone = torch.cat([project(index, budget, keys[i : i + 1]) for i in range(20)])
    assert torch.equal(found[:20], alone), "a lane depends on its neighbours"


def test_keys_differ_in_every_part() -> None:
    parts = [torch.arange(40) for _ in range(3)]
    grid = torch.meshgrid(*parts, indexing="ij")
    keys = hashed_key(*(part.flatten() for part in grid))
    assert len(set(keys.tolist())) > 0.999 * 40**3  # a 31-bit key: about one pair of equal ones is expected
    high = hashed_key(torch.tensor([5, 5 + 2**31, 5 + 2**60]), torch.zeros(3, dtype=torch.int64))
    assert len(set(high.tolist())) == 3
    assert ((keys >= 0) & (keys < 2**31)).all()


def test_a_budget_that_the_smallest_ranks_exceed_is_refused() -> None:
    with pytest.raises(LeLoRAError, match=r"parameter_budget=0.2 allows .* least that can train .* to 0.5 or more, or"):
        LeLoRAEnv(rank_set=(4, 8), parameter_budget=0.2)
    LeLoRAEnv(rank_set=(4, 8), parameter_budget=0.5)
    with pytest.raises(LeLoRAError, match="least that can train is 512"):  # rank 8 in the smallest matrix
        LeLoRAEnv(rank_set=(0, 8), parameter_budget=1e-9)


@pytest.mark.parametrize("value", [0, 1.5, -0.1, True, "half", float("nan")])
def test_bad_budgets_are_refused(value: Any) -> None:
    with pytest.raises(LeLoRAError, match=r"parameter_budget must be in \(0, 1\], or None"):
        LeLoRAEnv(parameter_budget=value)


@pytest.mark.parametrize("parametrisation", ["usv", "unit"])
def test_the_environment_trains_what_fits_and_says_so(parametrisation: str) -> None:
    env = make_lanes(3, parameter_budget=0.3, parametrisation=parametrisation, horizon=20)
    free = make_lanes(3, parametrisation=parametrisation, horizon=20)
    sizes = np.array([m.out_features + m.in_features + (parametrisation == "usv") for m in env.matrices])
    limit = 0.3 * 8 * sizes.sum()
    for each in (env, free):
        each.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(4):
        action = rng.integers(0, env.single_action_space.nvec, env.action_space.shape)
        action[2, ::2] = 1  # fits
        before = env.get_state(0)
        infos = env.step(action)[4]
        executed, chosen = infos["executed_rank"], np.array(env.adapter_config.rank_set)[action[:, ::2]]
        assert executed.dtype == np.int64
        assert infos["_executed_rank"].all()
        assert (executed <= chosen).all()
        assert infos["projected"].tolist() == (executed < chosen).sum(1).tolist()
        assert infos["projected"][2] == 0
        assert infos["projected"][0] > 0
        assert infos["trained_parameters"].tolist() == (executed * sizes).sum(1).tolist()
        assert (infos["trained_parameters"] <= limit).all()
        assert infos["mean_rank"] == pytest.approx(executed.mean(1))
        moved = _moved(env, before)
        assert moved.tolist() == executed[0].tolist(), "components trained that were not executed, or the reverse"
        index = np.searchsorted(env.adapter_config.rank_set, executed)
        same = free.step(np.stack([index, action[:, 1::2]], axis=-1).reshape(action.shape))[4]
        assert same["L1"].tolist() == infos["L1"].tolist()
        assert "executed_rank" not in same
        assert "projected" not in same


def _moved(env: Any, before: dict[str, torch.Tensor]) -> np.ndarray:
    """How many components of each matrix differ from what they were, (M,)."""
    layout, after = env.tuner.base.spectrum.layout, env.get_state(0)
    slots = set()
    for name, slot in layout.row_slot.items():
        changed = (after[f"rows.{name}"] != before[f"rows.{name}"]).any(-1)
        slots |= set(slot[changed].tolist())
    return np.bincount(np.array(sorted(slots)) // layout.slots[1], minlength=layout.slots[0])


def test_a_replay_repeats_and_lanes_do_not_feel_each_other() -> None:
    actions = np.full((3, 48), 3)
    actions[:, 1::2] = 0

    def executed(lanes: int, seed: int) -> np.ndarray:
        env = make_lanes(lanes, parameter_budget=0.7, horizon=5)
        env.reset(seed=seed)
        return np.stack([env.step(actions[:lanes])[4]["executed_rank"] for _ in range(3)])

    three = executed(3, 7)
    assert np.array_equal(three, executed(3, 7))
    assert np.array_equal(three[:, 1:2], executed(1, 8))
    assert not np.array_equal(three[:, 0], three[:, 1])
    assert not np.array_equal(three[0], three[1])


def test_the_single_environment_and_lanes_that_are_reset() -> None:
    env = LeLoRAEnv(parameter_budget=0.25, horizon=3)
    env.reset(seed=0)
    info = env.step(np.tile([3, 0], 24))[4]
    assert info["executed_rank"].shape == (24,)
    assert type(info["projected"]) is int
    lanes = make_lanes(2, parameter_budget=0.25, horizon=1, autoreset_mode="NextStep")
    lanes.reset(seed=0)
    lanes.step(np.tile([3, 0], (2, 24)))
    infos = lanes.step(np.tile([3, 0], (2, 24)))[4]  # merely resets
    assert "executed_rank" not in infos


def test_the_checkers_pass_with_a_budget() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(LeLoRAEnv(parameter_budget=0.25, horizon=4), skip_render_check=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_sb3(LeLoRAEnv(parameter_budget=0.25, horizon=4))
