from typing import Any

import numpy as np
import pytest
import torch

from lelora_env.errors import DataError
from lelora_env.tasks import make_task
from lelora_env.tasks.dataset import DatasetTask

ROWS = [{"x": i, "y": i % 2} for i in range(40)]
SIZES = {"reward_size": 5, "tune_size": 6, "seed": 0}


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    values = torch.tensor([row["x"] for row in rows])
    return {"input_ids": values[:, None], "attention_mask": torch.ones_like(values)[:, None],
            "labels": torch.tensor([row["y"] for row in rows])}


@pytest.mark.parametrize("as_dataset", [False, True])
def test_rows_of_a_list_and_of_a_dataset(as_dataset: bool) -> None:
    import datasets

    rows = datasets.Dataset.from_list(ROWS) if as_dataset else ROWS
    task = DatasetTask(rows, collate)
    made = task.splits(None, **SIZES)
    found = torch.cat([made[split]["input_ids"][:, 0] for split in ("train", "reward", "tune", "eval")])
    assert sorted(found.tolist()) == list(range(40))
    assert made.sources["reward"] == [f"train:{i}" for i in made.reward["input_ids"][:, 0].tolist()]
    assert make_task(task) is task


def test_default_loss_and_score_by_head() -> None:
    batch = {"labels": torch.tensor([1, 0])}
    logits = torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    task = DatasetTask(ROWS, collate)
    scores = task.score(task.predict(logits, batch).numpy(), batch)
    assert scores == {"accuracy": 1.0, "loss": pytest.approx((np.log1p(np.exp(-2.0)) + np.log(2)) / 2)}
    regression = DatasetTask(ROWS, collate, num_labels=1)
    scores = regression.score(regression.predict(torch.tensor([[3.0], [1.0]]), batch).numpy(), batch)
    assert scores == {"pearson": pytest.approx(1.0), "loss": pytest.approx((4 + 1) / 2)}
    causal = DatasetTask(ROWS, collate, head="causal-lm")
    tokens = {"labels": torch.tensor([[-100, 2]])}
    scores = causal.score(causal.predict(torch.zeros(1, 2, 5), tokens).numpy(), tokens)
    assert scores == {"token_accuracy": 0.0, "loss": pytest.approx(np.log(5))}


def test_functions_of_the_users_own() -> None:
    task = DatasetTask(
        ROWS, collate, head="none", num_labels=0, metric="closeness",
        loss=lambda logits, rows: (logits.abs().sum(-1), torch.ones(len(logits))),
        predict=lambda logits, rows: logits, score=lambda predictions, rows: {"closeness": 7.0, "loss": 1.0},
    )
    assert task.loss(torch.tensor([[2.0, -1.0]]), {})[0].item() == 3.0
    assert task.score(np.zeros(1), {})[task.metric] == 7.0


def test_key_columns_keep_doubles_apart() -> None:
    doubled = [*ROWS, *ROWS]
    made = DatasetTask(doubled, collate, key_columns=("x",)).splits(None, **SIZES)
    train = set(made.train["input_ids"][:, 0].tolist())
    for split in ("reward", "tune", "eval"):
        assert not train & set(made[split]["input_ids"][:, 0].tolist())


def test_an_empty_tune_split_has_the_same_columns() -> None:
    made = DatasetTask(ROWS, collate).splits(None, reward_size=5, tune_size=0, seed=0)
    assert {name: tuple(values.shape) for name, values in made.tune.items()} == {
        "input_ids": (0, 1), "attention_mask": (0, 1), "labels": (0,)}


def test_what_does_not_fit() -> None:
    with pytest.raises(DataError, match="belong together"):
        DatasetTask(ROWS, collate, score=lambda p, r: {"loss": 0.0})
    with pytest.raises(DataError, match="metric must name"):
        DatasetTask(ROWS, collate, score=lambda p, r: {"loss": 0.0}, predict=lambda logits, rows: logits)
    with pytest.raises(DataError, match="head='none'"):
        DatasetTask(ROWS, collate, head="none")
    with pytest.raises(DataError, match=r"tensor of \d+ rows"):
        DatasetTask(ROWS, lambda rows: {"labels": torch.zeros(2)}).splits(None, **SIZES)
    with pytest.raises(DataError, match="no column 'token_type_ids'"):
        DatasetTask(ROWS, collate, inputs=("input_ids", "token_type_ids")).splits(None, **SIZES)
    with pytest.raises(DataError, match="key_columns"):
        DatasetTask(ROWS, collate, key_columns=("z",)).splits(None, **SIZES)
    with pytest.raises(DataError, match="too few rows"):
        DatasetTask(ROWS[:9], collate).splits(None, **SIZES)
    with pytest.raises(DataError, match="gives 3 outputs"):
        DatasetTask(ROWS, collate).loss(torch.zeros(1, 3), {"labels": torch.zeros(1)})
