"""Class labels as they are found in data: which are missing, which classes there are, and whether they make sense."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lelora_env.errors import DataError, ModelError
from lelora_env.tasks.hints import set_option

SHOWN = 10
"""How many classes a message lists."""


def is_missing(value: Any, *, nan: bool = True) -> bool:
    """Whether a row has no label: ``None``, an empty or blank text, or NaN if `nan`."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (nan and isinstance(value, float) and math.isnan(value))


def labelled(values: Iterable[Any], *, nan: bool = True) -> np.ndarray:
    """(N,) bool, which rows have a label."""
    return np.array([not is_missing(value, nan=nan) for value in values], bool)


def restore_numbers(columns: Sequence[list[Any]]) -> list[list[Any]]:
    """Undo what an empty cell does to a CSV column of whole numbers: all its values are read as texts.

    Args:
        columns: The label column of each table of one data set.

    Returns:
        The columns with whole numbers in place of their texts, if any cell is empty and all others are
        whole numbers; otherwise as they are.
    """
    values = [value for column in columns for value in column]
    empty = any(isinstance(value, str) and is_missing(value) for value in values)
    if not empty or not all(is_missing(value) or isinstance(value, int) or _whole(value) for value in values):
        return list(columns)
    return [[int(value) if _whole(value) else value for value in column] for column in columns]


def class_names(
    values: Iterable[Any], *, given: Sequence[Any] | None, num_labels: int | None, where: str, column: str
) -> tuple[Any, ...]:
    """The label of each class number.

    Args:
        values: The labels of the training rows that have one.
        given: The classes that the user named; they are taken as they are.
        num_labels: The number of classes that the user gave; ``None`` counts them, and then whole numbers
            must be 0..K-1 without gaps and every class must have 2 rows: anything else is more often a
            mistake in the data than a class.
        where: Where the rows come from, for messages.
        column: The label column, for messages.

    Raises:
        DataError: Labels that cannot be classes.
    """
    if given is not None:
        return tuple(given)
    try:
        counts = Counter(values)
    except TypeError as error:
        raise DataError(f"{where}: column {column!r} holds lists or dictionaries; expected one number or text a row"
                        ) from error
    numbers = all(isinstance(value, int | float) for value in counts)
    if num_labels is not None and numbers:
        return tuple(range(num_labels))
    fractions = [value for value in counts if isinstance(value, float) and not value.is_integer()]
    if fractions:
        raise DataError(f"{where} has labels such as {min(fractions)!r} that are no class numbers; for real-valued "
                        f"labels give regression=True: {set_option('regression', True, 'text')}")
    names = tuple(sorted(counts, key=_order))
    found = f"{where}: column {column!r} holds {_listed({name: counts[name] for name in names})}"
    if len(names) < 2:
        total = counts.total()
        rows = "the only row" if total == 1 else f"all {total} labelled rows"
        raise DataError(f"{where} has {len(names)} different labels in column {column!r} ({rows}: {names[0]!r}); "
                        "expected at least 2. Give rows of another class too")
    if num_labels is not None and len(names) > num_labels:
        raise DataError(f"{found}: {len(names)} different labels; expected at most {num_labels} (num_labels). Correct "
                        f"the data, or give the right number: {set_option('num_labels', len(names), 'text')}")
    if num_labels is None:
        _check_classes(names, counts, numbers=numbers, found=found)
    return names


def check_class_logits(logits: Any, rows: int, num_labels: int) -> None:
    """Check that a model gave one row of logits for each row; their number is left to the caller.

    Raises:
        ModelError: It gave something else, as a model without a classification head does.
    """
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != rows:
        got = type(logits).__name__ if shape is None else f"a tensor of shape {tuple(shape)}"
        raise ModelError(f"the module returns no logits of shape (rows, num_labels), but {got} for {rows} rows; load "
                         f"it with AutoModelForSequenceClassification(num_labels={num_labels})")


def _check_classes(names: tuple[Any, ...], counts: Mapping[Any, int], *, numbers: bool, found: str) -> None:
    """Refuse classes that look like mistakes."""
    plain = [int(name) if numbers else name for name in names]
    named = (f"if all of them are classes, name them: {set_option('labels', plain, 'text')}" if len(names) <= SHOWN
             else "if all of them are classes, name them with the task's option labels=[...]")
    if numbers and plain != list(range(len(plain))):
        raise DataError(f"{found}; expected the class numbers 0, 1, ... without gaps. Correct or remove the rows that "
                        f"do not belong; {named}; for real-valued labels give regression=True")
    if min(counts.values()) < 2:
        raise DataError(f"{found}; expected at least 2 rows of every class. Correct or remove the rows that do not "
                        f"belong, or give more rows; {named}")


def _listed(counts: Mapping[Any, int]) -> str:
    """Classes and how many rows each has; of many classes, the smallest and the largest by name are kept."""
    items = [f"{name!r} ({count} {'row' if count == 1 else 'rows'})" for name, count in counts.items()]
    left_out = len(items) - SHOWN
    if left_out > 0:
        items = [*items[: SHOWN - 1], f"{left_out} more", items[-1]]
    return ", ".join(items)


def _whole(value: Any) -> bool:
    return isinstance(value, str) and value.strip().removeprefix("-").isdecimal()


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers by value, also when written as text; then other texts by name."""
    text = str(value)
    return (0, float(text), text) if text.lstrip("-").isdigit() else (1, 0.0, text)
