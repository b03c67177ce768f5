"""The built-in text task: balanced, without doubles, the same every time, and not to be had from keywords."""

import re
import subprocess
import sys
from collections import Counter
from functools import cache

import numpy as np
import pytest

from lelora_env.errors import DataError
from lelora_env.tasks import docstrings
from lelora_env.tasks.docstrings import SOURCES, docstrings_task, read_docstrings
from lelora_env.tasks.files import RawData
from tests.small_tokenizers import bert_like

CLASSES = sorted(SOURCES)
CHANCE = 1 / len(CLASSES)


@cache
def rows() -> RawData:
    return read_docstrings()


def held_out() -> tuple[list[str], list[str]]:
    table = rows().eval
    assert table is not None
    return table["text"], table["label"]


def words_of(text: str) -> list[str]:
    return [word for word in re.findall(r"[a-z]+", text.lower()) if word != "x"]


@cache
def word_table() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Which word stands in which sentence: train and eval, and their class numbers."""
    train, (texts, labels) = rows().train, held_out()
    vocabulary = {word: i for i, word in enumerate(sorted({w for text in train["text"] for w in words_of(text)}))}

    def table(sentences: list[str]) -> np.ndarray:
        found = np.zeros((len(sentences), len(vocabulary)), np.float32)
        for i, sentence in enumerate(sentences):
            found[i, [vocabulary[word] for word in words_of(sentence) if word in vocabulary]] = 1
        return found

    y, z = (np.array([CLASSES.index(label) for label in column]) for column in (train["label"], labels))
    return table(train["text"]), y, table(texts), z


def keyword_accuracy(per_class: int) -> float:
    """Best keywords of each class, chosen on train; each keyword in a sentence is a vote. Ties: a fair share."""
    a, y, b, z = word_table()
    shares = np.stack([a[y == c].mean(0) for c in range(len(CLASSES))])  # (C, words)
    weights = np.zeros_like(shares)
    for c in range(len(CLASSES)):
        gain = shares[c] * np.log((shares[c] + 1e-3) / (np.delete(shares, c, 0).mean(0) + 1e-3))
        weights[c, np.argsort(-gain)[:per_class]] = 1
    votes = b @ weights.T  # (N, C)
    best = votes == votes.max(1, keepdims=True)
    return float((best[np.arange(len(z)), z] / best.sum(1)).mean())


def test_classes_are_balanced_and_large() -> None:
    texts, labels = held_out()
    for column, least in ((rows().train["label"], 120), (labels, 120)):
        counts = Counter(column)
        assert sorted(counts) == CLASSES
        assert len(set(counts.values())) == 1
        assert min(counts.values()) >= least
    assert len(texts) == len(set(texts))


def test_no_near_copy_within_or_across_splits() -> None:
    texts = rows().train["text"] + held_out()[0]
    keys = [" ".join(words_of(text)) for text in texts]
    assert len(set(keys)) == len(keys)


def test_sentences_are_prose_with_few_masks() -> None:
    for text in rows().train["text"]:
        assert 10 <= len(text.split()) <= 24
        assert re.fullmatch(r"[A-Z][A-Za-z ,;:'()\-]+\.", text), text
        assert text.count("X") <= 0.2 * len(text.split()) + 1


def test_library_names_never_appear() -> None:
    for text in rows().train["text"] + held_out()[0]:
        assert not set(words_of(text)) & {"numpy", "python", "sklearn", "torch", "pytorch", "matplotlib", "pandas"}


def test_no_frequent_word_names_its_class() -> None:
    a, y, _, _ = word_table()
    counts = np.stack([a[y == c].sum(0) for c in range(len(CLASSES))])
    frequent = counts.sum(0) >= 0.02 * len(y)
    assert frequent.sum() > 50
    assert (counts.max(0) / counts.sum(0))[frequent].max() < 0.97


def test_keyword_lists_do_not_solve_it_and_reading_does_better() -> None:
    from sklearn.linear_model import LogisticRegression

    a, y, b, z = word_table()
    single, short, long = (keyword_accuracy(count) for count in (1, 3, 10))
    linear = LogisticRegression(C=0.5, max_iter=300).fit(a, y).score(b, z)
    assert single <= 0.35
    assert short <= 0.42
    assert long <= 0.52
    assert linear >= 0.55  # there is something to learn ...
    assert linear >= long + 0.1  # ... and it is not in a list of words
    assert single > CHANCE


def test_the_same_rows_in_another_process() -> None:
    code = ("from lelora_env.tasks.docstrings import docstrings_task; import sys; heavy = 'pandas sklearn matplotlib';"
            "print(docstrings_task().fingerprint, *[name for name in heavy.split() if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={"PYTHONHASHSEED": "123", "PYTHONPATH": "."})
    assert done.stdout.split() == [docstrings_task().fingerprint]  # and nothing heavy was imported to read it


def test_as_a_task() -> None:
    task = docstrings_task(max_length=64)
    made = task.splits(bert_like(), reward_size=32, tune_size=100, seed=0)
    assert task.num_labels == len(CLASSES) == len(task.label_names)
    assert len(made.sources["eval"]) == len(held_out()[0])
    assert made.notes.keys() <= {"truncated"}
    assert docstrings_task().max_length == 32


def test_a_missing_library_and_a_stripped_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "SOURCES", {"a": ("no_such_library", ("x.py",))})
    with pytest.raises(DataError, match="not installed"):
        read_docstrings.__wrapped__()
    monkeypatch.setattr(docstrings, "SOURCES", {"a": ("numpy", ("version.py",)), "b": ("", ("this.py",))})
    with pytest.raises(DataError, match="stripped of docstrings"):
        read_docstrings.__wrapped__()


def test_a_sentence_of_two_classes_belongs_to_none() -> None:
    shared = "This sentence stands in the sources of two libraries at once."
    own = "This sentence stands in the sources of one library and nowhere else."
    copy = own.replace("one library", "X one, library")  # the same up to a mask and a comma
    found = docstrings._distinct({"a": [shared, own, copy], "b": [shared.lower().capitalize()]})
    assert found == {"a": [own], "b": []}
