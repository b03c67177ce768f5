from collections import Counter

import numpy as np
import pytest

from lelora_env.errors import DataError
from lelora_env.tasks.splits import content_key, plan_rows, sample_pool


def test_splits_are_disjoint_by_row_and_by_content() -> None:
    rng = np.random.default_rng(0)
    keys = [f"text {i}" for i in rng.integers(0, 150, 400)]  # many doubles
    held = [f"text {i}" for i in range(140, 170)]
    plan = plan_rows(keys, held, reward_size=20, tune_size=30, seed=3)
    content = {split: {keys[i] for i in plan[split]} for split in ("train", "reward", "tune")}
    content["eval"] = {held[i] for i in plan.eval}
    for a in content:
        for b in content:
            assert a == b or not content[a] & content[b]
    assert (len(plan.reward), len(plan.tune), len(plan.eval)) == (20, 30, 30)
    assert len(content["reward"]) == 20
    assert len(content["tune"]) == 30
    # Every row is in exactly one place: a split, or counted as left out.
    assert len(plan.train) + 20 + 30 + sum(plan.notes.values()) == 400
    assert plan.notes["train_row_in_eval"] == sum(key in set(held) for key in keys)


def test_same_seed_same_rows_and_other_seed_other_rows() -> None:
    keys = [str(i) for i in range(200)]
    first, again, other = (plan_rows(keys, None, reward_size=8, tune_size=8, seed=s) for s in (1, 1, 2))
    for split in ("train", "reward", "tune", "eval"):
        assert np.array_equal(first[split], again[split])
    assert set(first.reward) != set(other.reward)


def test_eval_is_held_out_and_does_not_move_with_the_other_sizes() -> None:
    keys = [str(i) for i in range(200)]
    small = plan_rows(keys, None, reward_size=4, tune_size=0, seed=0)
    large = plan_rows(keys, None, reward_size=40, tune_size=50, seed=0)
    assert len(small.eval) == 20
    assert np.array_equal(small.eval, large.eval)
    every = np.concatenate([large[split] for split in ("train", "reward", "tune", "eval")])
    assert sorted(every) == list(range(200))
    sources = large.sources()
    assert Counter(name for rows in sources.values() for name in rows).most_common(1)[0][1] == 1
    assert all(name.startswith("train:") for name in sources["eval"])


def test_limits_and_official_eval() -> None:
    keys, held = [str(i) for i in range(100)], [f"e{i}" for i in range(50)]
    plans = [plan_rows(keys, held, reward_size=5, tune_size=5, seed=s, train_rows=7, eval_rows=9) for s in (0, 1)]
    assert [len(plan.train) for plan in plans] == [7, 7]
    assert np.array_equal(plans[0].eval, plans[1].eval)  # what is reported does not hang on the split seed
    assert plans[0].sources("dev")["eval"][0].startswith("dev:")


def test_unusable_rows_are_never_taken() -> None:
    usable = np.arange(60) % 2 == 0
    plan = plan_rows([str(i) for i in range(60)], None, reward_size=5, tune_size=5, seed=0, usable=usable)
    taken = np.concatenate([plan[split] for split in ("train", "reward", "tune", "eval")])
    assert sorted(taken) == list(range(0, 60, 2))


def test_source_numbers_refer_to_the_raw_data_when_only_a_pool_was_split() -> None:
    pool = sample_pool(1000, 50, seed=4)
    assert len(pool) == 50
    assert np.array_equal(pool, np.unique(pool))
    plan = plan_rows([str(i) for i in pool], None, reward_size=3, tune_size=3, seed=0)
    assert plan.sources("x", pool)["reward"] == [f"train:{pool[i]}" for i in plan.reward]


@pytest.mark.parametrize(("keys", "named"), [(["a", "b", "c"], "reward_size"), (["a"] * 50, "1 of them distinct")])
def test_too_few_rows_say_how_many_are_needed(keys: list[str], named: str) -> None:
    with pytest.raises(DataError, match=named) as error:
        plan_rows(keys, ["x"], reward_size=2, tune_size=3, seed=0)
    assert "6 are needed" in str(error.value)
    assert "Lower reward_size or tune_size" in str(error.value)


def test_a_task_option_is_named_as_it_can_be_given() -> None:
    keys = [str(i) for i in range(100)]
    with pytest.raises(DataError, match=r'"eval_rows": 85}.*--task-set eval_rows=85\)'):
        plan_rows(keys, None, reward_size=10, tune_size=4, seed=0, eval_rows=95)
    assert len(plan_rows(keys, None, reward_size=10, tune_size=4, seed=0, eval_rows=85).train) == 1


def test_exactly_enough_rows_are_enough() -> None:
    plan = plan_rows(["a", "b", "c", "d", "e", "f"], ["x"], reward_size=2, tune_size=3, seed=0)
    assert len(plan.train) == 1


@pytest.mark.parametrize("option", ["reward_size", "tune_size", "train_rows", "eval_rows"])
def test_senseless_sizes(option: str) -> None:
    options = {"reward_size": 1, "tune_size": 1, "seed": 0, option: -1}
    with pytest.raises(DataError, match=option):
        plan_rows([str(i) for i in range(50)], None, **options)  # type: ignore[arg-type]


def test_content_ignores_white_space_only() -> None:
    assert content_key(" a  b\n", None) == content_key("a b", "")
    assert content_key("a b") != content_key("a B")
    assert content_key("a", "b") != content_key("a b")
