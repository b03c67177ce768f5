import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lelora_env.errors import DataError, ModelError, UnknownNameError
from lelora_env.tasks import TASKS, Task, make_task
from lelora_env.tasks.classification import TextClassification
from lelora_env.tasks.dataset import DatasetTask
from lelora_env.tasks.files import RawData
from lelora_env.tasks.glue import TEXT_DATASETS
from tests.small_tokenizers import bert_like, gpt_like


def raw(labels: list[Any], columns: tuple[str, ...] = ("text",), eval_labels: list[Any] | None = None) -> RawData:
    def table(values: list[Any], start: int) -> dict[str, list[Any]]:
        texts = {name: [f"{name[-1]} {'x' * (i % 5)} {start + i}" for i in range(len(values))] for name in columns}
        return {**texts, "label": list(values)}

    held = None if eval_labels is None else table(eval_labels, 10_000)
    return RawData(table(labels, 0), held, "validation", "rows")


def splits_of(task: Task, **sizes: int) -> Any:
    return task.splits(bert_like(), **{"reward_size": 4, "tune_size": 4, "seed": 0} | sizes)


def test_columns_equal_the_tokenisers_own_row_by_row() -> None:
    tokenizer = bert_like()
    data = raw([0, 1] * 20, ("sentence1", "sentence2"))
    rows = TextClassification(data).splits(tokenizer, reward_size=4, tune_size=4, seed=0)
    assert set(rows.train) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    for split in ("train", "reward", "tune", "eval"):
        for i, source in enumerate(rows.sources[split]):
            row = int(source.split(":")[1])
            expected = tokenizer(data.train["sentence1"][row], data.train["sentence2"][row])
            length = len(expected["input_ids"])
            for name in ("input_ids", "attention_mask", "token_type_ids"):
                values = rows[split][name][i].tolist()
                assert values[:length] == expected[name]
                assert not any(values[length:])  # [PAD] is 0 here
            assert rows[split]["labels"][i] == data.train["label"][row]
        assert rows[split]["attention_mask"].sum(1).max() == rows[split]["input_ids"].shape[1]


def test_no_held_out_row_is_trained_on() -> None:
    rows = splits_of(TextClassification(raw([0, 1] * 40)), reward_size=8, tune_size=8)
    names = [name for split in ("train", "reward", "tune", "eval") for name in rows.sources[split]]
    assert len(names) == len(set(names)) == 80
    as_rows = {split: {tuple(row) for row in torch.nn.functional.pad(
        rows[split]["input_ids"], (0, 40 - rows[split]["input_ids"].shape[1])).tolist()}
        for split in ("train", "reward", "tune", "eval")}
    for split in ("reward", "tune", "eval"):
        assert not as_rows["train"] & as_rows[split]


def test_long_rows_are_cut_and_counted() -> None:
    data = RawData({"text": [f"{i} " + "y" * (30 if i % 3 == 0 else 4) for i in range(30)], "label": [0, 1] * 15}, None,
                   "eval", "rows")
    rows = splits_of(TextClassification(data, max_length=12))
    assert rows.notes == {"truncated": 10}
    assert max(rows[split]["input_ids"].shape[1] for split in ("train", "reward", "tune", "eval")) == 12


def test_a_missing_pad_token_is_replaced_and_masked() -> None:
    tokenizer = gpt_like()
    rows = TextClassification(raw([0, 1] * 10)).splits(tokenizer, reward_size=2, tune_size=2, seed=0).train
    padding = rows["attention_mask"] == 0
    assert padding.any()
    assert (rows["input_ids"][padding] == tokenizer.eos_token_id).all()
    assert "token_type_ids" not in rows


def test_string_labels_are_numbered_in_sorted_order_and_digits_by_value() -> None:
    task = TextClassification(raw(["pos", "neg", "pos", "neutral"] * 5))
    assert task.label_names == ("neg", "neutral", "pos")
    assert task.num_labels == 3
    assert TextClassification(raw(["10", "9", "2"] * 5)).label_names == ("2", "9", "10")
    assert TextClassification(raw([1, 4, 2] * 5), labels=[1, 2, 4]).label_names == (1, 2, 4)
    assert TextClassification(raw([False, True] * 5)).num_labels == 2


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 1, 2] * 5, {"num_labels": 2}, "labels 2 do not fit a head of 2"),
        ([0, 1, -1] * 5, {"num_labels": 2}, "labels -1 do not fit"),
        ([0.5, 1.0, 2.0] * 5, {}, "regression=True"),
        (["a", "b", "c"] * 5, {"num_labels": 2}, "3 different labels"),
        ([1] * 15, {}, r"1 different labels .*all 15 labelled rows"),
        ([0, 1] * 9 + [99], {}, r"0 \(9 rows\), 1 \(9 rows\), 99 \(1 row\).*without gaps"),
        ([0, -1] * 9, {}, r"-1 \(9 rows\), 0 \(9 rows\).*\"labels\": \[-1, 0\]"),
        ([1, 2, 3] * 9, {}, r"--task-set 'labels=\[1, 2, 3\]'"),
        (["a", "b"] * 9 + ["bb"], {}, r"'bb' \(1 row\).*at least 2 rows of every class"),
        ([*range(40)] * 2, {"labels": [0, 1]}, "do not fit a head of 2"),
        ([f"c{i % 15}" for i in range(29)], {}, r"'c0' \(2 rows\).* 5 more, 'c9' \(2 rows\)"),
        ([None, "", " "] * 5, {}, "15 training rows, 15 without a label, 0 of them"),
        ([[0], [1]] * 8, {}, "holds lists"),
        (["high"] * 15, {"regression": True}, "regression needs numbers"),
        ([float("nan")] * 15, {"regression": True}, "not finite"),
    ],
)
def test_labels_that_do_not_fit(labels: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        splits_of(TextClassification(raw(labels), **options), reward_size=1, tune_size=1)


def test_an_unknown_label_in_the_held_out_rows() -> None:
    with pytest.raises(DataError, match="'odd' do not fit"):
        splits_of(TextClassification(raw(["a", "b"] * 10, eval_labels=["a", "odd"])))


def test_loss_predictions_and_score_against_closed_forms() -> None:
    task = TextClassification(raw([0, 1] * 10), num_labels=2)
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    batch = {"labels": torch.tensor([0, 0, 1])}
    expected = [np.log1p(np.exp(-2.0)), np.log1p(np.e), np.log(2.0)]
    total, weight = task.loss(logits, batch)
    assert total.tolist() == pytest.approx(expected, rel=1e-6)
    assert weight.tolist() == [1, 1, 1]
    scores = task.score(task.predict(logits, batch).numpy(), batch)
    assert scores["accuracy"] == pytest.approx(1 / 3)
    assert scores["loss"] == pytest.approx(np.mean(expected), rel=1e-6)


def test_regression_scores() -> None:
    task = TextClassification(raw([0.0, 2.5, 5.0] * 5), regression=True)
    assert (task.num_labels, task.metric) == (1, "pearson")
    logits, batch = torch.tensor([[1.0], [2.0], [4.0]]), {"labels": torch.tensor([0.0, 2.0, 6.0])}
    scores = task.score(task.predict(logits, batch).numpy(), batch)
    assert scores["loss"] == pytest.approx((1 + 0 + 4) / 3)
    assert scores["pearson"] == pytest.approx(np.corrcoef([1, 2, 4], [0, 2, 6])[0, 1])
    assert scores["spearman"] == pytest.approx(1.0)


def test_a_head_of_another_size_is_refused() -> None:
    task = TextClassification(raw([0, 1] * 10), num_labels=2)
    with pytest.raises(DataError, match="2 labels, but the model's head gives 3"):
        task.loss(torch.zeros(2, 3), {"labels": torch.zeros(2, dtype=torch.long)})


def test_blank_texts_are_left_out_and_counted() -> None:
    data = RawData({"text": ["", "  ", None, *(f"a {i}" for i in range(20))], "label": [0, 1, 0] + [0, 1] * 10}, None,
                   "eval", "rows")
    rows = splits_of(TextClassification(data))
    assert rows.notes == {"blank_text": 3}
    assert sum(len(rows.sources[split]) for split in ("train", "reward", "tune", "eval")) == 20


@pytest.mark.parametrize("missing", [None, "", "  "])
def test_rows_without_a_label_are_left_out_and_counted(missing: str | None) -> None:
    labels = ["neg", "pos"] * 12
    labels[5] = labels[8] = missing  # type: ignore[assignment]
    task = TextClassification(raw(labels, eval_labels=["pos", missing, "neg"]))
    rows = splits_of(task)
    assert task.label_names == ("neg", "pos")
    assert rows.notes == {"no_label": 3}
    assert not {"train:5", "train:8"} & {name for split in ("train", "reward", "tune") for name in rows.sources[split]}
    assert rows.sources["eval"] == ["validation:0", "validation:2"]


def test_missing_labels_of_numbers_and_of_regression() -> None:
    numbers = TextClassification(raw([0.0, 1.0, float("nan")] * 8))
    assert splits_of(numbers).notes == {"no_label": 8}
    assert numbers.label_names == (0, 1)
    regression = TextClassification(raw(["0.5", "", "1.5"] * 8), regression=True)
    made = splits_of(regression)
    assert made.notes == {"no_label": 8}
    assert set(made.train["labels"].tolist()) == {0.5, 1.5}


def test_an_empty_cell_does_not_turn_a_csv_columns_numbers_into_texts(tmp_path: Path,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, labels in (("train", ["0", "1", ""] * 8), ("validation", ["1", "0"])):
        lines = [f"{split} {i},{label}" for i, label in enumerate(labels)]
        (tmp_path / f"{split}.csv").write_text("\n".join(["text,label", *lines]))
    task = make_task(f"text:{tmp_path}")
    made = splits_of(task)
    assert task.num_labels == 2
    assert made.notes == {"no_label": 8}
    assert made.eval["labels"].tolist() == [1, 0]


@pytest.mark.parametrize("labels", ["0,1", 3, [0, 0], [0, 1, 2]])
def test_senseless_lists_of_classes(labels: Any) -> None:
    with pytest.raises(DataError, match="labels must be a list of different classes"):
        TextClassification("x", labels=labels, num_labels=2)


def test_blank_texts_alone_are_named_as_the_reason() -> None:
    blank: dict[str, list[Any]] = {"text": [" "] * 9, "label": [0, 1, 0] * 3}
    with pytest.raises(DataError, match="no usable training row: of 9 rows, 9 blank texts are left out"):
        _ = TextClassification(RawData(blank, None, "eval", "rows")).num_labels
    half: dict[str, list[Any]] = {"text": [" "] * 9 + ["a", "b", "c", "d"], "label": [0, 1] * 6 + [0]}
    with pytest.raises(DataError, match="13 training rows, 9 blank texts, 4 of them distinct"):
        splits_of(TextClassification(RawData(half, None, "eval", "rows")))
    with pytest.raises(DataError, match=r"no usable row.*9 blank texts"):
        splits_of(TextClassification(RawData(raw([0, 1] * 10).train, blank, "validation", "rows")))


def test_one_row_is_said_to_be_one_row() -> None:
    with pytest.raises(DataError, match="the only row: 1"):
        _ = TextClassification(raw([1])).num_labels


@pytest.mark.parametrize(("known", "longest"), [(9, 9), (64, 12), (int(1e30), 12), (-1, 12), (9.0, 9)])
def test_rows_are_cut_to_what_the_model_can_take(known: float, longest: int) -> None:
    data = RawData({"text": [f"{i} " + "y" * 30 for i in range(10, 40)], "label": [0, 1] * 15}, None, "eval", "rows")
    tokenizer = bert_like()
    tokenizer.model_max_length = known
    rows = TextClassification(data, max_length=12).splits(tokenizer, reward_size=4, tune_size=4, seed=0)
    assert {rows[split]["input_ids"].shape[1] for split in ("train", "reward", "tune", "eval")} == {longest}
    assert rows.notes == {"truncated": 30}


def test_a_model_without_a_head_is_refused() -> None:
    batch = {"labels": torch.zeros(4, dtype=torch.int64)}
    own = DatasetTask([{"labels": 0}] * 9, lambda rows: {"labels": torch.zeros(len(rows))})
    text = TextClassification(raw([0, 1] * 10))
    bare = {"last_hidden_state": torch.zeros(4, 7, 2)}
    for output in (bare, torch.zeros(4, 7, 2), torch.zeros(2), torch.zeros(3, 2)):
        for method in (text.loss, text.predict, own.loss, own.predict):
            with pytest.raises(ModelError, match=r"AutoModelForSequenceClassification\(num_labels=2\)"):
                method(output, batch)  # type: ignore[arg-type]


def test_no_tokenizer() -> None:
    with pytest.raises(DataError, match="needs a tokenizer"):
        TextClassification(raw([0, 1] * 10)).splits(None, reward_size=1, tune_size=1, seed=0)


GLUE = {
    "cola": (2, "matthews_correlation"), "sst2": (2, "accuracy"), "mrpc": (2, "accuracy"), "stsb": (1, "pearson"),
    "qqp": (2, "accuracy"), "mnli": (3, "accuracy"), "mnli-mm": (3, "accuracy"), "qnli": (2, "accuracy"),
    "rte": (2, "accuracy"), "wnli": (2, "accuracy"),
}


@pytest.mark.parametrize("name", sorted(GLUE))
def test_every_glue_task_reads_local_rows_in_both_spellings(name: str, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    classes, metric = GLUE[name]
    hub_columns = TEXT_DATASETS[name].columns
    plain = ("sentence",) if len(hub_columns) == 1 else ("sentence1", "sentence2")
    for columns in {hub_columns, plain}:
        folder = tmp_path / "-".join(columns)
        folder.mkdir()
        for split, count in (("train", 24), ("validation", 6)):
            labels = [i % 5 / 2 if classes == 1 else i % classes for i in range(count)]
            rows = [{**{c: f"{split} {c[-1]} {i}" for c in columns}, "label": label} for i, label in enumerate(labels)]
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        task = make_task(f"{name}:{folder}")
        made = splits_of(task)
        assert (task.num_labels, task.metric, len(made.eval["labels"])) == (classes, metric, 6)
        logits = torch.zeros(6, classes)
        assert metric in task.score(task.predict(logits, made.eval).numpy(), made.eval)
    assert {"f1"} <= set(TEXT_DATASETS[name].metrics) or name not in ("mrpc", "qqp")


def test_every_name_makes_a_task_and_the_registry_is_honest() -> None:
    for name in TASKS:
        options: dict[str, Any] = {"data": "some/data"} if name in ("text", "instruction", "chat", "choice") else {}
        task = make_task(name, **options | ({"num_labels": 2} if name == "text" else {}))
        assert isinstance(task, Task)
        assert task.name == name


def test_specs_as_mappings_and_objects() -> None:
    task = make_task({"name": "text", "data": "a/b", "max_length": 7}, max_length=9)
    assert isinstance(task, TextClassification)
    assert task.max_length == 9
    assert make_task(task) is task
    assert make_task(None).name == "planted"


def test_bad_specs() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'sst2'"):
        make_task("sst3")
    with pytest.raises(UnknownNameError, match=r"'max_lenght'.*Did you mean 'max_length'"):
        make_task("sst2", max_lenght=3)
    with pytest.raises(DataError, match="text:<file"):
        make_task("text")
    with pytest.raises(DataError, match="given twice"):
        make_task("sst2:a", data="b")
    with pytest.raises(DataError, match="takes no path"):
        make_task("docstrings:folder")
    with pytest.raises(DataError, match="DatasetTask"):
        make_task([1])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="already made"):
        make_task(make_task("docstrings"), max_length=3)
    with pytest.raises(UnknownNameError, match="accuracy"):
        TextClassification("x", metrics=("acuracy",))
    with pytest.raises(DataError, match="regression=True"):
        TextClassification("x", num_labels=1)


def test_the_fingerprint_follows_the_content() -> None:
    prints = [TextClassification(raw(labels)).fingerprint for labels in ([0, 1] * 5, [0, 1] * 5, [1, 0] * 5)]
    assert prints[0] == prints[1] != prints[2]
