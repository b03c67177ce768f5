"""Texts to padded token columns, fast: one batched tokeniser call, one NumPy scatter a column."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lelora_env.errors import DataError
from lelora_env.tasks.base import Rows

Ragged = Sequence[Sequence[int]]
"""One list of numbers a row, of any lengths."""


def need_tokenizer(tokenizer: Any, task: str) -> None:
    """Check that there is a tokeniser.

    Raises:
        DataError: There is none.
    """
    if tokenizer is None:
        raise DataError(f"task {task!r} reads text and needs a tokenizer (got None); give the model as a folder or hub "
                        "id, or pass tokenizer=")


def row_limit(tokenizer: Any, max_length: int) -> int:
    """The longest row in tokens: `max_length`, or what the model can take if that is less.

    Tokenisers that know no limit say so with a huge or a negative ``model_max_length``.
    """
    known = getattr(tokenizer, "model_max_length", None)
    return min(max_length, int(known)) if isinstance(known, int | float) and 2 <= known < 1e6 else max_length


def pad_id(tokenizer: Any) -> int:
    """The id to pad with: the pad token, else the end-of-text token (GPT-2, Llama), else 0. Always masked out."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value[0] if isinstance(value, list) else value)
    return 0


def pad(rows: Ragged, value: int) -> Tensor:
    """Right-pad lists of ints to the longest: (N, T) int64."""
    lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
    longest = int(lengths.max()) if len(rows) else 0
    padded = np.full((len(rows), longest), value, np.int64)
    flat = np.fromiter(chain.from_iterable(rows), np.int64, int(lengths.sum()))
    padded[np.arange(longest) < lengths[:, None]] = flat
    return torch.from_numpy(padded)  # (N, T)


def attention_mask(rows: Ragged) -> Tensor:
    """1 on tokens, 0 on padding: (N, T) int64."""
    return pad([[1] * len(row) for row in rows], 0)


def encode_texts(
    tokenizer: Any, first: Sequence[str], second: Sequence[str] | None, max_length: int
) -> tuple[Rows, int]:
    """Tokenise texts, or pairs of texts, and pad them to the longest row.

    Args:
        tokenizer: A Hugging Face tokeniser, with or without a pad token.
        first: N texts.
        second: N second texts, or ``None``.
        max_length: Longest row in tokens, special tokens included, if the tokeniser's
            ``model_max_length`` is not less (see `row_limit`); longer ones are cut at the end (of the
            longer text of a pair).

    Returns:
        Columns ``input_ids``, ``attention_mask`` and, if the tokeniser gives them,
        ``token_type_ids``, each (N, T); and how many rows were cut.
    """
    pairs = [list(first)] if second is None else [list(first), list(second)]
    if not first:
        return {"input_ids": pad([], 0), "attention_mask": pad([], 0)}, 0
    max_length = row_limit(tokenizer, max_length)
    encoded = tokenizer(*pairs, truncation=True, max_length=max_length, padding=False, verbose=False)
    ids = encoded["input_ids"]
    columns = {"input_ids": pad(ids, pad_id(tokenizer)), "attention_mask": attention_mask(ids)}
    if "token_type_ids" in encoded:
        columns["token_type_ids"] = pad(encoded["token_type_ids"], 0)
    full = [i for i, row in enumerate(ids) if len(row) >= max_length]
    if not full:
        return columns, 0
    whole = tokenizer(*([texts[i] for i in full] for texts in pairs), padding=False, verbose=False)["input_ids"]
    return columns, sum(len(row) > max_length for row in whole)
