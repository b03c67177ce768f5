"""Rows of a causal language model: tokens, with labels on the answer only.

Shapes: N rows · T tokens · V vocabulary.

Policy for rows that are longer than `max_length` (or than the tokeniser's ``model_max_length``): the
prompt is kept and the end of the row is cut off (note ``"truncated"``); a row whose answer would be cut
off *entirely* is dropped (note ``"answer_cut_off"``), so that no row is without a loss.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lelora_env.errors import DataError, ModelError
from lelora_env.tasks.base import Rows, causal_rows, next_token_losses
from lelora_env.tasks.files import RawData, Table, select_rows, table_length
from lelora_env.tasks.hints import set_option
from lelora_env.tasks.splits import sample_pool
from lelora_env.tasks.tokens import Ragged, attention_mask, pad, row_limit

IGNORED = -100
"""The label of tokens that carry no loss."""


class Segment(NamedTuple):
    """A piece of a row's text, tokenised on its own.

    Attributes:
        text: The text.
        learn: Whether its tokens carry the loss.
        ends: Whether the end-of-text token follows (and is learnt with it).
    """

    text: str
    learn: bool = False
    ends: bool = False


class Example(NamedTuple):
    """One row before tokenising.

    Attributes:
        key: What makes two rows the same question.
        segments: Its text.
        prompt: What a model is given to generate from.
        answer: The reference for generated answers; ``None`` where there is none.
        bos: Whether the row may start with the beginning-of-text token (a chat template has its own).
    """

    key: str
    segments: tuple[Segment, ...]
    prompt: str = ""
    answer: str | None = None
    bos: bool = True


Formatter = Callable[[Table, Any, str], list[Example | None]]
"""(table, tokenizer, where) → one example a row, ``None`` for rows that cannot be used."""


@dataclass(frozen=True)
class Encoded:
    """Tokenised rows.

    Attributes:
        ids: Token ids.
        labels: The same, with `IGNORED` outside the answers.
        usable: (N,) bool, whether any token is learnt.
        cut: (N,) bool, whether the row's end was cut off.
    """

    ids: list[list[int]]
    labels: list[list[int]]
    usable: np.ndarray
    cut: np.ndarray

    def rows(self, index: Sequence[int] | np.ndarray, padding: int) -> Rows:
        """``input_ids``, ``attention_mask`` and ``labels`` of the rows at `index`, each (N, T)."""
        ids: Ragged = [self.ids[i] for i in index]
        labels: Ragged = [self.labels[i] for i in index]
        return {"input_ids": pad(ids, padding), "attention_mask": attention_mask(ids), "labels": pad(labels, IGNORED)}


def encode_examples(tokenizer: Any, examples: Sequence[Example | None], max_length: int) -> Encoded:
    """Tokenise rows, each different text once.

    Args:
        tokenizer: A Hugging Face tokeniser.
        examples: N rows; ``None`` gives an unusable row.
        max_length: Longest row in tokens, if the tokeniser's ``model_max_length`` is not less.
    """
    max_length = row_limit(tokenizer, max_length)
    texts = list(dict.fromkeys(segment.text for e in examples if e is not None for segment in e.segments))
    tokens: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    known = dict(zip(texts, tokens, strict=True))
    bos, eos = _leading_token(tokenizer), getattr(tokenizer, "eos_token_id", None)
    all_ids: list[list[int]] = []
    all_labels: list[list[int]] = []
    cut = np.zeros(len(examples), bool)
    for i, example in enumerate(examples):
        ids: list[int] = []
        labels: list[int] = []
        if example is not None:
            ids += bos if example.bos else []
            labels += [IGNORED] * len(ids)
            for segment in example.segments:
                piece = known[segment.text] + ([eos] if segment.ends and eos is not None else [])
                ids += piece
                labels += piece if segment.learn else [IGNORED] * len(piece)
        cut[i] = len(ids) > max_length
        all_ids.append(ids[:max_length])
        all_labels.append(labels[:max_length])
    usable = np.array([any(label != IGNORED for label in labels[1:]) for labels in all_labels], bool)
    return Encoded(all_ids, all_labels, usable, cut)


def _leading_token(tokenizer: Any) -> list[int]:
    """The beginning-of-text token, if this tokeniser puts one before a text."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return [bos] if bos is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [bos] else []


@dataclass(frozen=True)
class Pool:
    """A part of the raw data that is enough for the rows asked for.

    Attributes:
        train: The chosen training rows.
        index: Their row numbers in the raw data, ascending.
        eval: All official held-out rows, if any.
    """

    train: Table
    index: np.ndarray
    eval: Table | None


def choose_pool(raw: RawData, *, held_out_rows: int, train_rows: int | None, seed: int) -> Pool:
    """Restrict the training data before tokenising, when only `train_rows` of them are wanted.

    Half as many rows again are kept, for those that are too long or doubled.
    """
    size = table_length(raw.train)
    wanted = size if train_rows is None else int(1.5 * (train_rows + held_out_rows)) + 64
    index = sample_pool(size, wanted, seed)
    return Pool(raw.train if len(index) == size else select_rows(raw.train, index), index, raw.eval)


def count_unusable(examples: Sequence[Example | None], encoded: Encoded) -> Counter[str]:
    """How many rows cannot be formatted, and how many lost their whole answer."""
    unformatted = sum(example is None for example in examples)
    return +Counter(no_answer=unformatted, answer_cut_off=int((~encoded.usable).sum()) - unformatted)


def check_token_logits(logits: Any, labels: Tensor) -> None:
    """Check that a model gave logits for every token.

    Args:
        logits: What the model gave.
        labels: (N, T) or wider.

    Raises:
        ModelError: It is no tensor of shape (N, T, V), as from a model without a language-model head.
    """
    shape = getattr(logits, "shape", None)
    if shape is None or len(shape) != 3 or shape[0] != labels.shape[0] or shape[1] > labels.shape[1]:
        got = type(logits).__name__ if shape is None else f"a tensor of shape {tuple(shape)}"
        raise ModelError("the module returns no logits of shape (rows, tokens, vocabulary), but "
                         f"{got} for {labels.shape[0]} rows; load it with AutoModelForCausalLM")


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss (nats) and number of the learnt tokens of each row: total and weight, each (N,).

    Args:
        logits: (N, T, V).
        labels: (N, T) or wider, `IGNORED` = not learnt.

    Raises:
        ModelError: No logits of that shape.
    """
    check_token_logits(logits, labels)
    return causal_rows(logits, labels)


def token_statistics(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed loss (nats), number and correctly guessed number of the learnt tokens: (N, 3).

    Args:
        logits: (N, T, V).
        labels: (N, T), `IGNORED` = not learnt.

    Raises:
        ModelError: No logits of that shape.
    """
    check_token_logits(logits, labels)
    loss, following = next_token_losses(logits, labels)  # (N, T)
    learnt = following != IGNORED
    right = (logits.argmax(-1) == following) & learnt
    return torch.stack([loss.sum(-1), learnt.sum(-1).float(), right.sum(-1).float()], -1)


def check_max_length(max_length: int) -> None:
    """Check the length limit.

    Raises:
        DataError: Less than 2 tokens.
    """
    if max_length < 2:
        raise DataError(f"max_length must be at least 2 (got {max_length}); give {set_option('max_length', 128)}")
