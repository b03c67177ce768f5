"""Sentence and sentence-pair classification and regression from any text/label data.

Shapes: N rows · T tokens · C classes.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lelora_env.errors import DataError, UnknownNameError
from lelora_env.tasks.base import Head, Rows, Splits, cross_entropy_rows, squared_error_rows
from lelora_env.tasks.files import EVAL_NAMES, RawData, Table, read_raw, require_columns, table_length
from lelora_env.tasks.hints import describe, set_option
from lelora_env.tasks.labels import check_class_logits, class_names, labelled, restore_numbers
from lelora_env.tasks.metrics import METRICS
from lelora_env.tasks.splits import content_key, plan_rows
from lelora_env.tasks.tokens import encode_texts, need_tokenizer

TEXT_COLUMNS: tuple[tuple[str, ...], ...] = (("text",), ("sentence1", "sentence2"), ("sentence",))
"""Text columns that are looked for when none are named."""


class TextClassification:
    """Classification, or regression, of a text or a pair of texts.

    Columns: ``input_ids``, ``attention_mask``, ``token_type_ids`` where the tokeniser has them, and
    ``labels`` (N,). Rows without any text are left out (note ``"blank_text"``), and so are rows without
    a label (``"no_label"``); texts longer than `max_length` are cut (``"truncated"``).

    Args:
        data: A file, a folder with ``train.*`` and ``validation.*``, a hub name (see `read_raw`),
            rows that are already read, or a function that reads them.
        text_columns: One or two columns; ``None`` takes the first of `TEXT_COLUMNS` that is there.
        label_column: The column of labels: integers, or strings (numbered in sorted order).
        regression: Labels are real numbers; one output, squared error.
        num_labels: Number of classes; ``None`` counts the different labels of the training rows. These
            must then be texts, or numbers from 0 without gaps, with 2 rows or more of each.
        labels: The classes in the order of their numbers, such as ``[1, 2, 3, 4, 5]``; ``None`` takes
            those of the training rows, sorted.
        metrics: Names from `METRICS`, the main one first; by default accuracy and macro F1, or
            Pearson's and Spearman's correlation.
        max_length: Longest row in tokens; what the model can take, where that is less.
        train_rows: At most so many training rows; ``None`` for all.
        eval_rows: At most so many eval rows; ``None`` for all.
        name: The task's name.
        subset: The configuration of a hub data set.
        eval_splits: Names of the held-out split, best first.
        column_candidates: What to look for when `text_columns` is ``None``.
    """

    head: Head = "sequence-classification"
    inputs: tuple[str, ...] = ("input_ids", "attention_mask", "token_type_ids")

    def __init__(
        self,
        data: str | Path | RawData | Callable[[], RawData],
        *,
        text_columns: Sequence[str] | str | None = None,
        label_column: str = "label",
        regression: bool = False,
        num_labels: int | None = None,
        labels: Sequence[Any] | None = None,
        metrics: Sequence[str] | None = None,
        max_length: int = 128,
        train_rows: int | None = None,
        eval_rows: int | None = None,
        name: str = "text",
        subset: str | None = None,
        eval_splits: Sequence[str] = EVAL_NAMES,
        column_candidates: Sequence[Sequence[str]] = TEXT_COLUMNS,
    ) -> None:
        self.name = name
        self.regression = regression
        self.metrics = tuple(metrics or (("pearson", "spearman") if regression else ("accuracy", "macro_f1")))
        for metric in self.metrics:
            if metric not in METRICS:
                raise UnknownNameError("metric", metric, METRICS)
        self.metric = self.metrics[0]
        self.max_length, self.train_rows, self.eval_rows = max_length, train_rows, eval_rows
        self._data, self._subset, self._eval_splits = data, subset, tuple(eval_splits)
        self._text_columns = (text_columns,) if isinstance(text_columns, str) else text_columns
        self._column_candidates = tuple(tuple(names) for names in column_candidates)
        self._label_column, self._labels_given = label_column, labels
        self._num_labels = len(labels) if isinstance(labels, list | tuple) and num_labels is None else num_labels
        self._check_labels()

    @cached_property
    def num_labels(self) -> int:
        """Outputs of the head; reads the data if it was not given."""
        if self.regression:
            return 1
        return self._num_labels or len(self.label_names)

    def _check_labels(self) -> None:
        labels, count = self._labels_given, self._num_labels
        fits = isinstance(labels, list | tuple) and len(set(labels)) == count and not self.regression
        if labels is not None and not fits:
            raise DataError(f"labels must be a list of different classes, as many as num_labels if that is given, and "
                            f"cannot go with regression (got {labels!r}); give {set_option('labels', [1, 2], 'text')}")
        if count is not None and count < 2 and not self.regression:
            raise DataError(f"num_labels must be at least 2 (got {count}); for real-valued labels give "
                            f"regression=True: {set_option('regression', True, 'text')}")

    @cached_property
    def label_names(self) -> tuple[Any, ...]:
        """The label of each class number."""
        table = self._raw.train
        values = [table[self._label_column][i] for i in np.flatnonzero(self._usable(table))]
        if not values and self._labels_given is None:
            raise DataError(f"{self._raw.where} has no usable training row: of {table_length(table)} rows, "
                            f"{describe(self._left_out(table)) or 'none'} are left out")
        return class_names(values, given=self._labels_given, num_labels=self._num_labels, where=self._raw.where,
                           column=self._label_column)

    @cached_property
    def fingerprint(self) -> str:
        """A short digest of all texts and labels, to tell versions of the data apart."""
        digest = hashlib.sha256()
        for table in (self._raw.train, self._raw.eval or {}):
            if table:
                for key, label in zip(self._keys(table), table[self._label_column], strict=True):
                    digest.update(f"{key}\x01{label}\x02".encode())
        return digest.hexdigest()[:16]

    @cached_property
    def _raw(self) -> RawData:
        raw = self._data() if callable(self._data) else self._data
        if not isinstance(raw, RawData):
            raw = read_raw(raw, subset=self._subset, eval_splits=self._eval_splits)
        for table in (raw.train, raw.eval):
            if table is not None:
                require_columns(table, self._columns(table), raw.where, "text_columns")
                require_columns(table, (self._label_column,), raw.where, "label_column")
        tables = [table for table in (raw.train, raw.eval) if table is not None]
        columns = restore_numbers([table[self._label_column] for table in tables])
        tables = [{**table, self._label_column: column} for table, column in zip(tables, columns, strict=True)]
        return replace(raw, train=tables[0], eval=tables[1] if raw.eval is not None else None)

    def _columns(self, table: Table) -> tuple[str, ...]:
        if self._text_columns is not None:
            return tuple(self._text_columns)
        candidates = self._column_candidates
        return next((names for names in candidates if all(name in table for name in names)), candidates[0])

    def splits(self, tokenizer: Any, *, reward_size: int, tune_size: int, seed: int) -> Splits:
        """Read, split and tokenise; see `Task.splits`.

        Raises:
            DataError: Unreadable or too few data, or labels that are out of range.
        """
        need_tokenizer(tokenizer, self.name)
        raw = self._raw
        held = raw.eval
        left_out = self._left_out(raw.train)
        plan = plan_rows(
            self._keys(raw.train), self._keys(held) if held is not None else None,
            reward_size=reward_size, tune_size=tune_size, seed=seed,
            train_rows=self.train_rows, eval_rows=self.eval_rows,
            usable=self._usable(raw.train), eval_usable=self._usable(held) if held is not None else None,
            left_out=left_out, eval_left_out=self._left_out(held) if held is not None else {},
        )
        notes = Counter(plan.notes) + left_out + (self._left_out(held) if held is not None else Counter())
        rows: dict[str, Rows] = {}
        for split in ("train", "reward", "tune", "eval"):
            table = held if split == "eval" and held is not None else raw.train
            rows[split], cut = self._encode(tokenizer, table, plan[split])
            notes["truncated"] += cut
        return Splits(**rows, sources=plan.sources(raw.eval_name), notes=dict(+notes))

    def loss(self, logits: Tensor, batch: Rows) -> tuple[Tensor, Tensor]:
        """Cross-entropy (nats) or squared error of each row; see `Task.loss`.

        Raises:
            ModelError: A model that gives no logits of shape (N, C), such as a bare encoder.
            DataError: A head of another size than `num_labels`.
        """
        check_class_logits(logits, len(batch["labels"]), self.num_labels)
        if logits.shape[-1] != self.num_labels:
            raise DataError(f"task {self.name!r} has {self.num_labels} labels, but the model's head gives "
                            f"{logits.shape[-1]} outputs; load the model with num_labels={self.num_labels}")
        rows = squared_error_rows if self.regression else cross_entropy_rows
        return rows(logits, batch["labels"])

    def predict(self, logits: Tensor, batch: Rows) -> Tensor:
        """The predicted class, or value, and the row's loss: (N, 2)."""
        total, _ = self.loss(logits, batch)
        answer = logits.squeeze(-1) if self.regression else logits.argmax(-1)
        return torch.stack([answer.float(), total.float()], -1)

    def score(self, predictions: np.ndarray, rows: Rows) -> dict[str, float]:
        """The task's metrics and the mean loss."""
        labels = rows["labels"].cpu().numpy()
        values = np.asarray(predictions)
        answers = values[:, 0] if self.regression else values[:, 0].astype(np.int64)
        scores = {name: METRICS[name](answers, labels) for name in self.metrics}
        return {**scores, "loss": float(values[:, 1].mean()) if len(values) else math.nan}

    def _texts(self, table: Table) -> list[list[str]]:
        return [["" if text is None else str(text) for text in table[name]] for name in self._columns(table)]

    def _keys(self, table: Table) -> list[str]:
        return [content_key(*texts) for texts in zip(*self._texts(table), strict=True)]

    def _blank(self, table: Table) -> np.ndarray:
        """(N,) bool, which rows have no text at all."""
        texts = self._texts(table)
        return np.array([not any(text.strip() for text in row) for row in zip(*texts, strict=True)], bool)

    def _labelled(self, table: Table) -> np.ndarray:
        return labelled(table[self._label_column], nan=not self.regression)  # (N,)

    def _usable(self, table: Table) -> np.ndarray:
        """(N,) bool, which rows have a text and a label."""
        usable: np.ndarray = ~self._blank(table) & self._labelled(table)
        return usable

    def _left_out(self, table: Table) -> Counter[str]:
        """How many rows cannot be used, by reason."""
        blank = self._blank(table)
        return +Counter(blank_text=int(blank.sum()), no_label=int((~blank & ~self._labelled(table)).sum()))

    def _encode(self, tokenizer: Any, table: Table, index: np.ndarray) -> tuple[Rows, int]:
        texts = [[column[i] for i in index] for column in self._texts(table)]
        columns, cut = encode_texts(tokenizer, texts[0], texts[1] if len(texts) > 1 else None, self.max_length)
        columns["labels"] = self._labels([table[self._label_column][i] for i in index])
        return columns, cut

    def _labels(self, values: Sequence[Any]) -> Tensor:
        """Label values as a tensor: (N,) float32 for regression, else int64 class numbers."""
        if self.regression:
            try:
                numbers = torch.tensor([float(value) for value in values], dtype=torch.float32)
            except (TypeError, ValueError) as error:
                raise DataError(f"{self._raw.where}: regression needs numbers in column {self._label_column!r} "
                                f"({error})") from error
            if not torch.isfinite(numbers).all():
                raise DataError(f"{self._raw.where}: column {self._label_column!r} holds labels that are not finite")
            return numbers
        numbering: Mapping[Any, int] = {name: i for i, name in enumerate(self.label_names)}
        unknown = sorted({repr(value) for value in values if value not in numbering})
        if unknown:
            raise DataError(f"{self._raw.where}: labels {', '.join(unknown[:5])} do not fit a head of "
                            f"{self.num_labels} labels ({', '.join(map(repr, self.label_names[:10]))}); correct the "
                            "data or num_labels")
        return torch.tensor([numbering[value] for value in values], dtype=torch.int64)
