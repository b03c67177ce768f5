"""Instruction tuning of causal models: prompt in, answer out, loss on the answer only."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from lelora_env.errors import DataError
from lelora_env.tasks.base import Head, Rows, Splits
from lelora_env.tasks.causal import (
    Example,
    Formatter,
    check_max_length,
    choose_pool,
    count_unusable,
    encode_examples,
    token_losses,
    token_statistics,
)
from lelora_env.tasks.files import EVAL_NAMES, RawData, Table, read_raw, select_rows
from lelora_env.tasks.prompts import instruction_format
from lelora_env.tasks.splits import plan_rows
from lelora_env.tasks.tokens import need_tokenizer, pad_id

_Row = TypeVar("_Row")

Generate = Callable[[list[str]], list[str]]
"""Prompts in, generated continuations out (without the prompt)."""


class CausalTask:
    """Rows of text for a causal language model, with the loss on parts of them.

    Columns: ``input_ids``, ``attention_mask`` and ``labels``, each (N, T), right-padded (with the
    end-of-text token where a tokeniser has no pad token). The main metric is ``token_accuracy``: the
    share of answer tokens that are the most likely ones, given the right tokens before them.
    For rows longer than `max_length` see `lelora_env.tasks.causal`.

    Args:
        data: A file, a folder with ``train.*`` and ``validation.*``, a hub name, or rows already read.
        formatter: Makes the text of each row.
        judge: Whether a generated text answers like the reference; ``None`` if that cannot be told.
        max_length: Longest row in tokens; what the model can take, where that is less.
        train_rows: At most so many training rows; ``None`` for all.
        eval_rows: At most so many eval rows; ``None`` for all.
        name: The task's name.
        subset: The configuration of a hub data set.
        train_split: The training split of a hub data set.
        eval_splits: Names of the held-out split, best first.
        eval_data: Held-out rows from somewhere else, read like `data`: its held-out split, or its only one.
    """

    head: Head = "causal-lm"
    num_labels: int = 0
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    metric: str = "token_accuracy"

    def __init__(
        self,
        data: str | Path | RawData,
        formatter: Formatter,
        *,
        judge: Callable[[str, str], bool] | None = None,
        max_length: int = 512,
        train_rows: int | None = None,
        eval_rows: int | None = None,
        name: str = "instruction",
        subset: str | None = None,
        train_split: str = "train",
        eval_splits: Sequence[str] = EVAL_NAMES,
        eval_data: str | Path | RawData | None = None,
    ) -> None:
        check_max_length(max_length)
        self.name, self.max_length = name, max_length
        self.train_rows, self.eval_rows = train_rows, eval_rows
        self._data, self._eval_data = data, eval_data
        self._format, self._judge = formatter, judge
        self._subset, self._train_split, self._eval_splits = subset, train_split, tuple(eval_splits)

    @cached_property
    def _raw(self) -> RawData:
        raw = self._data
        if not isinstance(raw, RawData):
            raw = read_raw(raw, subset=self._subset, train_split=self._train_split, eval_splits=self._eval_splits)
        if self._eval_data is None:
            return raw
        other = self._eval_data if isinstance(self._eval_data, RawData) else read_raw(self._eval_data)
        held, name = (other.train, "eval") if other.eval is None else (other.eval, other.eval_name)
        return RawData(raw.train, held, name, raw.where)

    def splits(self, tokenizer: Any, *, reward_size: int, tune_size: int, seed: int) -> Splits:
        """Read, split and tokenise; see `Task.splits`.

        Raises:
            DataError: Unreadable or too few data.
        """
        need_tokenizer(tokenizer, self.name)
        raw = self._raw
        held = self.eval_rows or 1000 if raw.eval is None else 0
        pool = choose_pool(raw, held_out_rows=reward_size + tune_size + held, train_rows=self.train_rows, seed=seed)
        examples = self._format(pool.train, tokenizer, raw.where)
        encoded = encode_examples(tokenizer, examples, self.max_length)
        eval_examples = self._format(pool.eval, tokenizer, raw.where) if pool.eval is not None else examples
        eval_encoded = encode_examples(tokenizer, eval_examples, self.max_length) if pool.eval is not None else encoded
        left_out, eval_left_out = count_unusable(examples, encoded), count_unusable(eval_examples, eval_encoded)
        plan = plan_rows(
            _keys(examples), _keys(eval_examples) if pool.eval is not None else None,
            reward_size=reward_size, tune_size=tune_size, seed=seed, train_rows=self.train_rows,
            eval_rows=self.eval_rows, usable=encoded.usable, eval_usable=eval_encoded.usable,
            left_out=left_out, eval_left_out=eval_left_out,
        )
        notes = Counter(plan.notes) + left_out + (eval_left_out if pool.eval is not None else Counter())
        rows: dict[str, Rows] = {}
        for split in ("train", "reward", "tune", "eval"):
            source = eval_encoded if split == "eval" else encoded
            rows[split] = source.rows(plan[split], pad_id(tokenizer))
            notes["truncated"] += int(source.cut[plan[split]].sum())
        return Splits(**rows, sources=plan.sources(raw.eval_name, pool.index), notes=dict(+notes))

    def loss(self, logits: Tensor, batch: Rows) -> tuple[Tensor, Tensor]:
        """Next-token cross-entropy of the answers, nats; see `Task.loss`.

        Raises:
            ModelError: A model that gives no logits of shape (N, T, V).
        """
        return token_losses(logits, batch["labels"])

    def predict(self, logits: Tensor, batch: Rows) -> Tensor:
        """Summed loss, number of answer tokens, number guessed right: (N, 3)."""
        return token_statistics(logits, batch["labels"])

    def score(self, predictions: np.ndarray, rows: Rows) -> dict[str, float]:
        """Token accuracy in [0, 1], mean loss (nats per answer token) and perplexity."""
        total, count, right = np.asarray(predictions, np.float64).sum(0)
        loss = total / count if count else math.nan
        perplexity = math.exp(min(loss, 700.0)) if math.isfinite(loss) else loss
        return {"token_accuracy": right / count if count else 0.0, "loss": loss, "perplexity": perplexity}

    def generated_score(self, generate: Generate, sources: Sequence[str], tokenizer: Any = None) -> dict[str, float]:
        """Let the model answer freely, and compare the answers with the references.

        Args:
            generate: The model, as a function from prompts to continuations.
            sources: Which rows, as in `Splits.sources`, such as ``splits.sources["eval"][:100]``.
            tokenizer: The tokeniser, where the format needs it (chat).

        Returns:
            ``exact_match`` in [0, 1] and the number of rows, ``rows``.

        Raises:
            DataError: The task has no rule for generated answers.
        """
        if self._judge is None:
            raise DataError(f"task {self.name!r} has no rule that tells whether a generated answer is right; use its "
                            "loss, or a task with references (gsm8k, math, boolq, ...)")
        examples = pick_rows(self._raw, sources, lambda table: self._format(table, tokenizer, self._raw.where))
        texts = generate([example.prompt for example in examples])
        judged = [self._judge(text, e.answer) for text, e in zip(texts, examples, strict=True) if e.answer is not None]
        return {"exact_match": float(np.mean(judged)) if judged else 0.0, "rows": float(len(judged))}


def pick_rows(
    raw: RawData, sources: Sequence[str], formatter: Callable[[Table], list[_Row | None]]
) -> list[_Row]:
    """What `formatter` makes of the raw rows that `sources` name, each once, in their order."""
    found: list[_Row] = []
    for source in dict.fromkeys(sources):
        split, _, row = source.rpartition(":")
        table = raw.train if split == "train" or raw.eval is None else raw.eval
        made = formatter(select_rows(table, [int(row)]))[0]
        if made is not None:
            found.append(made)
    return found


def instruction_task(
    data: str | Path | RawData,
    *,
    columns: Sequence[str] = ("instruction", "input", "output"),
    prompt: str = "alpaca",
    **options: Any,
) -> CausalTask:
    """A plain instruction file.

    Args:
        data: See `CausalTask`.
        columns: The columns of the instruction, of its (optional) input and of the answer.
        prompt: A name from `lelora_env.tasks.prompts.PROMPTS`, or a template with ``{instruction}``.
        options: Further options of `CausalTask`.
    """
    return CausalTask(data, instruction_format(tuple(columns), prompt), **{"name": "instruction"} | options)


def _keys(examples: Sequence[Example | None]) -> list[str]:
    return ["" if example is None else example.key for example in examples]
