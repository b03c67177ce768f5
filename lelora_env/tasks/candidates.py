"""The candidate answers of a multiple-choice question: which there are, and which one wins."""

import re
from typing import NamedTuple

import numpy as np

from lelora_env.errors import DataError
from lelora_env.tasks.causal import Example, Segment
from lelora_env.tasks.files import Table, require_columns
from lelora_env.tasks.prompts import column_of, render_prompt
from lelora_env.tasks.splits import content_key

_FORMAT_LINE = re.compile(r"answer format:\s*(\S+)\s*$", re.IGNORECASE)
_NUMBERED = re.compile(r"([a-z]+)\d+", re.IGNORECASE)


class Question(NamedTuple):
    """A multiple-choice question.

    Attributes:
        names: Its candidates, such as ``("answer1", "answer2")``.
        examples: The question with each candidate as its answer.
        gold: Which candidate is right.
    """

    names: tuple[str, ...]
    examples: tuple[Example, ...]
    gold: int


def candidate_names(instruction: str, answer: str) -> tuple[str, ...]:
    """The candidates of a question: its line ``Answer format: a/b/c``, or the numbered choices in its text.

    Args:
        instruction: The question as the model reads it.
        answer: The right answer, such as ``"answer2"``, which tells how choices are called.
    """
    line = _FORMAT_LINE.search(instruction.strip())
    if line:
        return tuple(name for name in line[1].split("/") if name)
    numbered = _NUMBERED.fullmatch(answer)
    if numbered:
        found = re.findall(rf"\b({numbered[1]}\d+)\s*:", instruction, re.IGNORECASE)
        return tuple(dict.fromkeys(name.lower() for name in found))
    return ("true", "false") if answer in ("true", "false") else ()


def read_questions(table: Table, prompt: str, where: str) -> list[Question | None]:
    """Rows in the Commonsense-170k format as questions; ``None`` where the answer is none of the candidates.

    Raises:
        DataError: A column is missing, or no row at all can be used.
    """
    require_columns(table, ("instruction", "output", "answer"), where)
    rows = zip(*(column_of(table, name) for name in ("instruction", "input", "output", "answer")), strict=True)
    questions = [_question(prompt, *row) for row in rows]
    if questions and not any(questions):
        raise DataError(f"{where}: no row is a multiple-choice question; expected an instruction that ends in "
                        "'Answer format: answer1/answer2', and a column 'answer' with one of them")
    return questions


def _question(prompt: str, instruction: str, extra: str, output: str, answer: str) -> Question | None:
    answer = answer.strip()
    names = candidate_names(instruction, answer)
    if len(names) < 2 or answer not in names:
        return None
    before, found, after = output.rpartition(answer)
    text = render_prompt(prompt, instruction, extra)
    key = content_key(instruction, extra)
    outputs = [before + name + after if found else name for name in names]
    examples = tuple(
        Example(key, (Segment(text), Segment(candidate, learn=True, ends=True)), text, name)
        for name, candidate in zip(names, outputs, strict=True)
    )
    return Question(names, examples, names.index(answer))


def first_candidate(text: str, names: tuple[str, ...]) -> str | None:
    """The candidate that a generated text names first, as a whole word; ``None`` if it names none."""
    pattern = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    found = re.search(rf"\b(?:{pattern})\b", text, re.IGNORECASE)
    return next((name for name in names if found and name.lower() == found[0].lower()), None)


def share_right(costs: np.ndarray, question: np.ndarray, gold: np.ndarray) -> float:
    """Share of questions whose cheapest candidate is the right one, in [0, 1].

    A cost that is not finite never wins. Of equal costs the wrong candidate wins, so that a model that
    cannot tell candidates apart scores 0 instead of whatever their order gives.

    Args:
        costs: (N,) negative log-likelihood of each candidate row.
        question: (N,) number of the question that each row belongs to.
        gold: (N,) 1 for the right candidate.
    """
    if not len(costs):
        return 0.0
    costs = np.where(np.isfinite(costs), costs, np.inf)
    order = np.lexsort((gold, costs, question))  # (N,) by question, then cost, then wrong first
    first = np.r_[True, np.diff(question[order]) != 0]
    winners = order[first]
    return float(np.mean((gold[winners] == 1) & np.isfinite(costs[winners])))
