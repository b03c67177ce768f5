"""Multiple choice for causal models, in the format of Commonsense-170k.

A row has ``instruction`` (the question and its choices), ``input``, ``output`` ("the correct answer is
answer2") and ``answer`` ("answer2"). Training is on the right output. Tune and eval rows become one row
per candidate: the candidate with the largest likelihood is the model's answer.

Source of the format: Hu et al. 2023, LLM-Adapters (https://github.com/AGI-Edgerunners/LLM-Adapters).
Shapes: N rows (one per candidate in tune and eval) · T tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lelora_env.tasks.base import Head, Rows, Splits
from lelora_env.tasks.candidates import Question, first_candidate, read_questions, share_right
from lelora_env.tasks.causal import (
    Encoded,
    check_max_length,
    choose_pool,
    encode_examples,
    token_losses,
    token_statistics,
)
from lelora_env.tasks.commonsense import read_commonsense
from lelora_env.tasks.files import RawData, Table, read_raw
from lelora_env.tasks.instruction import Generate, pick_rows
from lelora_env.tasks.prompts import prompt_templates
from lelora_env.tasks.splits import plan_rows
from lelora_env.tasks.tokens import need_tokenizer, pad_id


class ChoiceTask:
    """Multiple choice, scored by the likelihood of each candidate answer.

    Columns beside ``input_ids``, ``attention_mask`` and ``labels`` (N, T): ``question``, ``candidate``
    and ``gold`` (N,) int64. `score` gives ``accuracy`` (the candidate with the largest summed
    log-likelihood), ``accuracy_norm`` (per token) and ``loss``, which counts right candidates only.
    A question of which any candidate is cut off (note ``"answer_cut_off"``), or whose answer is none of
    its candidates (``"no_answer"``), is dropped and counted.

    Args:
        data: A file, a folder, a hub name, rows already read, or ``None`` for the hub data set `name`.
        name: The task's name.
        prompt: See `lelora_env.tasks.instruction.instruction_task`.
        max_length: Longest row in tokens; what the model can take, where that is less.
        train_rows: At most so many training questions; ``None`` for all.
        eval_rows: At most so many eval questions; ``None`` for all.
    """

    head: Head = "causal-lm"
    num_labels: int = 0
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    metric: str = "accuracy"

    def __init__(
        self,
        data: str | Path | RawData | None = None,
        *,
        name: str = "choice",
        prompt: str = "alpaca",
        max_length: int = 512,
        train_rows: int | None = None,
        eval_rows: int | None = None,
    ) -> None:
        check_max_length(max_length)
        prompt_templates(prompt)
        self.name, self.max_length = name, max_length
        self.train_rows, self.eval_rows = train_rows, eval_rows
        self._data, self._prompt = data, prompt

    @cached_property
    def _raw(self) -> RawData:
        if self._data is None:
            return read_commonsense(self.name)
        return self._data if isinstance(self._data, RawData) else read_raw(self._data)

    def splits(self, tokenizer: Any, *, reward_size: int, tune_size: int, seed: int) -> Splits:
        """Read, split and tokenise; see `Task.splits`. `tune_size` counts questions, not rows.

        Raises:
            DataError: Unreadable or too few data.
        """
        need_tokenizer(tokenizer, self.name)
        raw = self._raw
        held = (self.eval_rows or 1000) if raw.eval is None else 0
        pool = choose_pool(raw, held_out_rows=reward_size + tune_size + held, train_rows=self.train_rows, seed=seed)
        train = self._encode(tokenizer, pool.train)
        official = self._encode(tokenizer, pool.eval) if pool.eval is not None else None
        plan = plan_rows(
            train.keys, official.keys if official is not None else None,
            reward_size=reward_size, tune_size=tune_size, seed=seed,
            train_rows=self.train_rows, eval_rows=self.eval_rows,
            usable=train.usable, eval_usable=official.usable if official is not None else None,
            left_out=train.left_out, eval_left_out=official.left_out if official is not None else {},
        )
        sources = plan.sources(raw.eval_name, pool.index)
        rows: dict[str, Rows] = {}
        for split in ("train", "reward", "tune", "eval"):
            part = official if split == "eval" and official is not None else train
            every = split in ("tune", "eval")
            rows[split], repeats = part.rows(plan[split], pad_id(tokenizer), every_candidate=every)
            sources[split] = [source for source, n in zip(sources[split], repeats, strict=True) for _ in range(n)]
        notes = dict(plan.notes)
        for encoded in (train, official):
            for reason, count in (encoded.left_out if encoded is not None else {}).items():
                notes[reason] = notes.get(reason, 0) + count
        return Splits(**rows, sources=sources, notes={reason: count for reason, count in notes.items() if count})

    def loss(self, logits: Tensor, batch: Rows) -> tuple[Tensor, Tensor]:
        """Next-token cross-entropy of the answer, nats; see `Task.loss`.

        Raises:
            ModelError: A model that gives no logits of shape (N, T, V).
        """
        return token_losses(logits, batch["labels"])

    def predict(self, logits: Tensor, batch: Rows) -> Tensor:
        """Summed loss and number of answer tokens: (N, 2)."""
        return token_statistics(logits, batch["labels"])[:, :2]

    def score(self, predictions: np.ndarray, rows: Rows) -> dict[str, float]:
        """Accuracy over questions, in [0, 1], and the mean loss of the right answers."""
        total, count = np.asarray(predictions, np.float64).T
        question, gold = (rows[name].cpu().numpy() for name in ("question", "gold"))
        right = gold == 1
        weight = count[right].sum()
        return {
            "accuracy": share_right(total, question, gold),
            "accuracy_norm": share_right(total / np.maximum(count, 1), question, gold),
            "loss": float(total[right].sum() / weight) if weight else math.nan,
        }

    def generated_score(self, generate: Generate, sources: Sequence[str], tokenizer: Any = None) -> dict[str, float]:
        """Let the model answer freely; the candidate that it names first counts.

        Args:
            generate: The model, as a function from prompts to continuations.
            sources: Which rows, as in `Splits.sources`; the rows of one question count once.
            tokenizer: Not used.

        Returns:
            ``generated_accuracy`` in [0, 1]; ``answered``, the share of questions with any candidate in the
            generated text; the number of questions, ``rows``.
        """
        questions = pick_rows(self._raw, sources, self._questions)
        texts = generate([question.examples[0].prompt for question in questions])
        found = [first_candidate(text, question.names) for text, question in zip(texts, questions, strict=True)]
        right = [name == question.names[question.gold] for name, question in zip(found, questions, strict=True)]
        return {
            "generated_accuracy": sum(right) / max(len(right), 1),
            "answered": sum(name is not None for name in found) / max(len(found), 1),
            "rows": float(len(questions)),
        }

    def _questions(self, table: Table) -> list[Question | None]:
        return read_questions(table, self._prompt, self._raw.where)

    def _encode(self, tokenizer: Any, table: Table) -> "EncodedQuestions":
        questions = self._questions(table)
        flat = [example for question in questions if question for example in question.examples]
        return EncodedQuestions(questions, encode_examples(tokenizer, flat, self.max_length))


@dataclass(frozen=True)
class EncodedQuestions:
    """Questions and the tokens of all their candidates, one after the other."""

    questions: list[Question | None]
    encoded: Encoded

    @cached_property
    def starts(self) -> np.ndarray:
        """Where the candidates of each question begin, and the end: (N + 1,)."""
        return np.cumsum([0, *(len(question.names) if question else 0 for question in self.questions)])

    @cached_property
    def usable(self) -> np.ndarray:
        """(N,) bool, whether the question is one and all its candidates are whole."""
        whole = self.encoded.usable & ~self.encoded.cut
        spans = zip(self.questions, self.starts[:-1], self.starts[1:], strict=True)
        return np.array([question is not None and bool(whole[a:b].all()) for question, a, b in spans], bool)

    @property
    def keys(self) -> list[str]:
        """The content of each question."""
        return [question.examples[0].key if question else "" for question in self.questions]

    @property
    def left_out(self) -> dict[str, int]:
        """How many questions cannot be used, by reason."""
        no_answer = sum(question is None for question in self.questions)
        return {"no_answer": no_answer, "answer_cut_off": int((~self.usable).sum()) - no_answer}

    def rows(self, index: np.ndarray, padding: int, *, every_candidate: bool) -> tuple[Rows, list[int]]:
        """The rows of the questions at `index`, and how many each has: all candidates, or the right one."""
        picked: list[tuple[int, int, int, int]] = []  # position, question, candidate, gold
        repeats = []
        for i in index.tolist():
            question = self.questions[i]
            assert question is not None  # plan_rows gives usable rows only
            candidates = range(len(question.names)) if every_candidate else [question.gold]
            picked += [(int(self.starts[i]) + c, i, c, int(c == question.gold)) for c in candidates]
            repeats.append(len(candidates))
        table = torch.tensor(picked, dtype=torch.int64).reshape(-1, 4)  # (N, 4)
        columns = self.encoded.rows(table[:, 0].numpy(), padding)
        return {**columns, "question": table[:, 1], "candidate": table[:, 2], "gold": table[:, 3]}, repeats


def choice_task(name: str = "choice", data: str | Path | RawData | None = None, **options: Any) -> ChoiceTask:
    """A multiple-choice task by name, from the hub or from files in the Commonsense-170k format.

    Args:
        name: ``"boolq"``, ``"piqa"``, ``"siqa"``, ``"hellaswag"``, ``"winogrande"``, ``"arc-e"``, ``"arc-c"``,
            ``"obqa"``, ``"commonsense170k"``; or ``"choice"`` with `data` of your own.
        data: See `ChoiceTask`.
        options: Further options of `ChoiceTask`.
    """
    return ChoiceTask(data, name=name, **options)
