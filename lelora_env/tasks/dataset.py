"""A task from a data set of your own and a collator: no class to write.

Shapes: N rows.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lelora_env.errors import DataError
from lelora_env.tasks.base import Head, Rows, Splits, cross_entropy_rows, squared_error_rows
from lelora_env.tasks.causal import token_losses, token_statistics
from lelora_env.tasks.labels import check_class_logits
from lelora_env.tasks.metrics import METRICS
from lelora_env.tasks.splits import plan_rows

Example = Mapping[str, Any]
Collator = Callable[[list[dict[str, Any]]], Mapping[str, Tensor]]
LossFunction = Callable[[Tensor, Rows], tuple[Tensor, Tensor]]
PredictFunction = Callable[[Tensor, Rows], Tensor]
ScoreFunction = Callable[[np.ndarray, Rows], dict[str, float]]


class Examples(Protocol):
    """A ``datasets.Dataset``, or a list of dictionaries."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, row: int, /) -> Example:
        """One row, columns by name."""
        ...


class DatasetTask:
    """A task from rows and a function that makes tensors of them.

    The collator is called once for each split with all of its rows, and must give columns of N rows
    each. Without functions of your own, loss and score follow from `head` and `num_labels`:
    cross-entropy and accuracy, squared error and Pearson's correlation (``num_labels=1``), or
    next-token cross-entropy and token accuracy (``head="causal-lm"``; labels -100 are ignored).

    Args:
        train: Training rows.
        collator: ``list[dict] -> dict[str, Tensor]``, each tensor (N, ...).
        eval: Held-out rows; ``None`` holds a tenth of `train` out.
        name: The task's name.
        head: Which kind of model fits.
        num_labels: Outputs of a classification head; 0 for ``causal-lm``.
        inputs: Columns that the model's ``forward`` takes.
        label_column: The collator's column of labels.
        key_columns: Columns of `train` that make two rows the same row; ``None`` treats all rows as different.
        loss: ``(logits, rows) -> (total (N,), weight (N,))``.
        predict: ``(logits, rows) -> (N, P)``; needed if `score` is given.
        score: ``(predictions, rows) -> {metric: ..., "loss": ...}``.
        metric: The main entry of `score`; ``None`` takes the default one.
    """

    def __init__(
        self,
        train: Examples,
        collator: Collator,
        *,
        eval: Examples | None = None,
        name: str = "dataset",
        head: Head = "sequence-classification",
        num_labels: int = 2,
        inputs: Sequence[str] = ("input_ids", "attention_mask"),
        label_column: str = "labels",
        key_columns: Sequence[str] | None = None,
        loss: LossFunction | None = None,
        predict: PredictFunction | None = None,
        score: ScoreFunction | None = None,
        metric: str | None = None,
    ) -> None:
        if (predict is None) != (score is None):
            raise DataError("predict and score belong together: give both or neither")
        if score is not None and metric is None:
            raise DataError("metric must name the main entry of your score function (higher is better)")
        if head == "none" and (loss is None or score is None):
            raise DataError("head='none' has no default loss and score; give loss, predict, score and metric")
        self.name, self.head, self.inputs = name, head, tuple(inputs)
        self.num_labels = 0 if head == "causal-lm" else num_labels
        default = {"causal-lm": "token_accuracy"}.get(head, "pearson" if num_labels == 1 else "accuracy")
        self.metric: str = metric or default
        self._train, self._eval, self._collator = train, eval, collator
        self._label_column, self._key_columns = label_column, key_columns
        self._loss, self._predict, self._score = loss, predict, score

    def splits(self, tokenizer: Any, *, reward_size: int, tune_size: int, seed: int) -> Splits:
        """Split and collate; see `Task.splits`. `tokenizer` is not used: the collator has its own.

        Raises:
            DataError: Too few rows, or a collator that gives something else than columns of N rows.
        """
        plan = plan_rows(
            self._keys(self._train, "train"), None if self._eval is None else self._keys(self._eval, "eval"),
            reward_size=reward_size, tune_size=tune_size, seed=seed,
        )
        rows = {}
        for split in ("train", "reward", "tune", "eval"):
            source = self._eval if split == "eval" and self._eval is not None else self._train
            rows[split] = self._collate([dict(source[int(i)]) for i in plan[split]], split)
        for name in ("reward", "train", "eval"):
            missing = [column for column in (*self.inputs, self._label_column) if column not in rows[name]]
            if missing and self._loss is None:
                raise DataError(f"the collator gives no column {missing[0]!r} (it gives "
                                f"{', '.join(rows[name])}); set inputs and label_column to what it gives")
        if not plan["tune"].size:
            rows["tune"] = {column: values[:0] for column, values in rows["reward"].items()}
        return Splits(**rows, sources=plan.sources("eval"), notes=plan.notes)

    def loss(self, logits: Tensor, batch: Rows) -> tuple[Tensor, Tensor]:
        """The given loss, or the one that fits the head; see `Task.loss`.

        Raises:
            ModelError: A model that gives no logits of the shape that the default loss needs.
            DataError: A head of another size than `num_labels`.
        """
        if self._loss is not None:
            return self._loss(logits, batch)
        labels = batch[self._label_column]
        if self.head == "causal-lm":
            return token_losses(logits, labels)
        check_class_logits(logits, len(labels), self.num_labels)
        if logits.shape[-1] != self.num_labels:
            raise DataError(f"task {self.name!r} has num_labels={self.num_labels}, but the model's head gives "
                            f"{logits.shape[-1]} outputs; make them equal")
        return squared_error_rows(logits, labels) if self.num_labels == 1 else cross_entropy_rows(logits, labels)

    def predict(self, logits: Tensor, batch: Rows) -> Tensor:
        """What `score` needs of each row: (N, P)."""
        if self._predict is not None:
            return self._predict(logits, batch)
        if self.head == "causal-lm":
            return token_statistics(logits, batch[self._label_column])
        total, weight = self.loss(logits, batch)
        answer = logits.squeeze(-1) if self.num_labels == 1 else logits.argmax(-1)
        return torch.stack([answer.float(), total.float(), weight.float()], -1)

    def score(self, predictions: np.ndarray, rows: Rows) -> dict[str, float]:
        """The given metrics, or the default one; always with ``"loss"``."""
        if self._score is not None:
            return self._score(predictions, rows)
        values = np.asarray(predictions, np.float64)
        if self.head == "causal-lm":
            total, weight, right = values.sum(0)
            return {"token_accuracy": float(right / max(weight, 1)), "loss": float(total / max(weight, 1))}
        labels = rows[self._label_column].cpu().numpy()
        loss = float(values[:, 1].sum() / max(values[:, 2].sum(), 1))
        return {self.metric: METRICS[self.metric](values[:, 0], labels), "loss": loss}

    def _keys(self, rows: Examples, split: str) -> list[object]:
        if self._key_columns is None:
            return [(split, i) for i in range(len(rows))]
        missing = [name for name in self._key_columns if len(rows) and name not in rows[0]]
        if missing:
            raise DataError(f"key_columns names {missing[0]!r}, which the {split} rows do not have")
        return [tuple(str(rows[i][name]) for name in self._key_columns) for i in range(len(rows))]

    def _collate(self, examples: Iterable[dict[str, Any]], split: str) -> Rows:
        batch = list(examples)
        if not batch:
            return {}
        columns = dict(self._collator(batch))
        for name, values in columns.items():
            if not isinstance(values, Tensor) or values.shape[:1] != (len(batch),):
                got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise DataError(f"the collator's column {name!r} of the {split} split must be a tensor of "
                                f"{len(batch)} rows (got {got})")
        return columns
