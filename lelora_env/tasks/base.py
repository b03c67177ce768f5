"""What a task is: rows in four disjoint splits, a loss per row and a score.

Shapes: N rows · T tokens · C classes · P numbers a row that a score needs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from lelora_env.errors import UnknownNameError

Rows = dict[str, Tensor]
"""Columns by name, each (N, ...).

Rows of tokens have a column ``attention_mask`` (N, T), 1 on tokens and 0 on the padding to their
right. A batch is cut to its longest row, and with it every *sequence column*: one that has as many
positions, and is called ``labels`` (integers) or something that ends in ``_ids``, ``_mask`` or
``_embeds``, such as ``input_ids``, ``token_type_ids`` or ``inputs_embeds``. All others keep their
whole width, whatever it is; a loss that needs them by token takes ``column[:, :logits.shape[1]]``.
"""

Head = Literal["sequence-classification", "causal-lm", "none"]


SPLIT_NAMES = ("train", "reward", "tune", "eval")


@dataclass(frozen=True)
class Splits:
    """The rows of a task, tokenised, on the CPU.

    train / reward / tune are disjoint parts of the training data; eval is only ever reported.

    Attributes:
        train: Rows that optimiser steps may use.
        reward: The fixed rows that rewards are measured on.
        tune: Rows on which everything that is chosen is chosen; may have 0 rows.
        eval: Rows that are only reported.
        sources: For each split, which row of the task's raw data each row came from, as
            strings such as ``"train:17"``; disjoint between splits.
        notes: What was left out, counted by reason, e.g. ``{"answer_cut_off": 3}``.
    """

    train: Rows
    reward: Rows
    tune: Rows
    eval: Rows
    sources: Mapping[str, list[str]] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Rows:
        """The rows of the split called `name`.

        Raises:
            UnknownNameError: No split has that name.
        """
        if name not in SPLIT_NAMES:
            raise UnknownNameError("split", name, SPLIT_NAMES)
        rows: Rows = getattr(self, name)
        return rows


@runtime_checkable
class Task(Protocol):
    """Data, loss and score. The one interface that users implement for a task of their own.

    Attributes:
        name: Short name, used in run folders and tables.
        head: Which kind of model fits: decides how a model given by path is loaded.
        num_labels: Outputs of a classification head (1 = regression); 0 where there is none.
        inputs: Columns that are passed to the model's ``forward`` by name, where the rows have them
            (``token_type_ids`` depends on the tokenizer). See `Rows` for what is cut to a batch's
            longest row; give labels that are not per token, such as the 0 and 1 of several labels
            at once, as floats, or under a name other than ``labels``.
        metric: Which entry of `score` is the main one; higher is better.
    """

    name: str
    head: Head
    inputs: tuple[str, ...]
    metric: str

    @property
    def num_labels(self) -> int:
        """See above; a plain attribute will do, a property may find it in the data."""
        ...

    def splits(self, tokenizer: Any, *, reward_size: int, tune_size: int, seed: int) -> Splits:
        """Read, split and tokenise the data. Same arguments, same rows.

        Args:
            tokenizer: The model's tokenizer; ``None`` for models that have none.
            reward_size: Rows to take out of the training data for the reward batch.
            tune_size: Rows to take out of the training data for `tune`.
            seed: Seed of the split.

        Raises:
            DataError: Unreadable, empty or too small data.
        """
        ...

    def loss(self, logits: Tensor, batch: Rows) -> tuple[Tensor, Tensor]:
        """Loss of each row, as a sum and a weight, so that rows can be averaged exactly.

        Args:
            logits: The model's output, (N, C), (N, T, C) or whatever the model gives.
            batch: The same N rows.

        Returns:
            total (N,): summed loss of the row (over its answer tokens, or its single label), nats
            or squared error; weight (N,): how many terms were summed. The loss of a set of rows is
            total.sum() / weight.sum().
        """
        ...

    def predict(self, logits: Tensor, batch: Rows) -> Tensor:
        """What `score` needs of each row, (N, P), so that whole logits need not be kept."""
        ...

    def score(self, predictions: np.ndarray, rows: Rows) -> dict[str, float]:
        """Metrics over a whole split, by name; always has `metric` and ``"loss"``."""
        ...


def cross_entropy_rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row: logits (N, C) with labels (N,); total and weight, each (N,)."""
    total = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    return total, torch.ones_like(total)


def squared_error_rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error of each row: logits (N, 1) with labels (N,); total and weight, each (N,)."""
    total = (logits.float().squeeze(-1) - labels.float()) ** 2
    return total, torch.ones_like(total)


def causal_rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token cross-entropy of each row: logits (N, T, V), labels (N, T) with -100 = ignored.

    Returns:
        total (N,): summed over the row's labelled tokens, nats; weight (N,): their number.
    """
    token, following = next_token_losses(logits, labels)
    return token.sum(-1), (following != -100).sum(-1).to(token.dtype)


def next_token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each position, 0 where it has no label.

    The labels are moved instead of the logits, whose memory then stays in one piece: several times
    faster than cutting the last position off them.

    Args:
        logits: (N, T, V).
        labels: (N, T) or wider (what lies beyond T is padding), -100 = ignored.

    Returns:
        Loss, nats, fp32, and the label that each position is to predict, both (N, T).
    """
    following = torch.nn.functional.pad(labels[:, 1 : logits.shape[1]], (0, 1), value=-100)  # (N, T)
    flat = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), following.flatten(), reduction="none", ignore_index=-100
    )
    return flat.view(following.shape), following
