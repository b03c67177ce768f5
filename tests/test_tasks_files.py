import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from lelora_env.errors import DataError
from lelora_env.tasks.files import read_raw, require_columns

ROWS: list[dict[str, Any]] = [
    {"sentence": "line\u2028separator\x85and\u2029more", "label": 0},
    {"sentence": "None", "label": 1},
    {"sentence": "NA", "label": 1},
    {"sentence": 'comma, "quote"', "label": 0},
]


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix in (".jsonl", ".ndjson"):
        path.write_bytes("\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    elif path.suffix == ".json":
        path.write_bytes(json.dumps(rows, ensure_ascii=False).encode())
    elif path.suffix == ".parquet":
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"])
def test_every_file_type_gives_the_rows_that_were_written(tmp_path: Path, suffix: str) -> None:
    raw = read_raw(write(tmp_path / f"mine{suffix}", ROWS))
    assert raw.train["sentence"] == [row["sentence"] for row in ROWS]
    assert raw.train["label"] == [row["label"] for row in ROWS]
    assert raw.eval is None


def test_a_folder_with_train_and_validation(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "validation.jsonl", ROWS[:1])
    write(tmp_path / "test.jsonl", ROWS[:2])
    raw = read_raw(tmp_path)
    assert raw.eval is not None
    assert (len(raw.train["label"]), len(raw.eval["label"]), raw.eval_name) == (4, 1, "validation")


def test_shards_are_joined_in_order_and_a_test_file_serves_as_held_out(tmp_path: Path) -> None:
    write(tmp_path / "train-00000-of-00002.parquet", ROWS[:2])
    write(tmp_path / "train-00001-of-00002.parquet", ROWS[2:])
    write(tmp_path / "test.parquet", ROWS[:1])
    raw = read_raw(tmp_path)
    assert raw.train["sentence"] == [row["sentence"] for row in ROWS]
    assert raw.eval_name == "test"


def test_a_folder_with_one_file_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "reviews.csv", ROWS)
    assert len(read_raw(tmp_path / "folder").train["label"]) == 4


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file or folder .*nowhere\.jsonl"):
        read_raw(tmp_path / "nowhere.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match=r"no train\.\* file \(found: no data files\)"):
        read_raw(tmp_path / "folder")


@pytest.mark.parametrize("content", [b"", b"[]"])
def test_empty_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "empty.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"empty|no rows|cannot read"):
        read_raw(path)


@pytest.mark.parametrize("name", ["header.csv", "header.tsv"])
def test_a_header_without_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text,label\n")
    with pytest.raises(DataError, match="no rows"):
        read_raw(tmp_path / name)


@pytest.mark.parametrize("content", [b'{"a": 1}\n{"a": \n', bytes(range(128, 256))])
def test_nothing_but_our_own_message_for_broken_files(tmp_path: Path, content: bytes) -> None:
    import datasets

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger, before = logging.getLogger("datasets"), datasets.logging.get_verbosity()
    logger.addHandler(handler)
    (tmp_path / "broken.jsonl").write_bytes(content)
    try:
        with pytest.raises(DataError, match="cannot read"):
            read_raw(tmp_path / "broken.jsonl")
    finally:
        logger.removeHandler(handler)
    assert lines == []
    assert datasets.logging.get_verbosity() == before


def test_broken_and_unknown_files(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(DataError, match="JSON parse error"):
        read_raw(broken)
    other = tmp_path / "text.docx"
    other.write_text("x")
    with pytest.raises(DataError, match=r"expected one of \.jsonl"):
        read_raw(other)


def test_two_file_types_for_one_split(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "train.csv", ROWS)
    with pytest.raises(DataError, match="several file types"):
        read_raw(tmp_path)


def test_an_unreachable_hub_says_what_to_do() -> None:
    with pytest.raises(DataError, match="local folder"):
        read_raw("someone/some-data-set")


def test_a_missing_column_is_named_with_the_closest() -> None:
    with pytest.raises(DataError, match=r"no column 'sentence'\. Did you mean 'sentense'\?"):
        require_columns({"sentense": [], "label": []}, ["sentence"], "file")
    with pytest.raises(DataError, match=r'"text_columns": "sentense"}.*--task-set text_columns=sentense\)'):
        require_columns({"sentense": [], "label": []}, ["sentence"], "file", "text_columns")


def test_the_users_progress_bar_setting_comes_back(tmp_path: Path) -> None:
    import datasets

    before = datasets.are_progress_bars_disabled()
    read_raw(write(tmp_path / "a.jsonl", ROWS))
    assert datasets.are_progress_bars_disabled() == before
