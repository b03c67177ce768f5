"""Worked mathematics: GSM8K, MATH and MetaMathQA, with exact match of the final answer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lelora_env.errors import UnknownNameError
from lelora_env.tasks.answers import extract_answer, judge_solution, normalise_answer
from lelora_env.tasks.causal import Example, Formatter
from lelora_env.tasks.files import RawData, Table
from lelora_env.tasks.instruction import CausalTask
from lelora_env.tasks.prompts import column_of, first_columns, make_example, prompt_templates

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("instruction", "input", "output"),
    ("question", "input", "answer"),
    ("problem", "input", "solution"),
    ("query", "input", "response"),
)
"""Columns that are looked for: (question, input, worked solution)."""

HUB: dict[str, tuple[str, str | None]] = {
    "gsm8k": ("openai/gsm8k", "main"),
    "math": ("DigitalLearningGmbH/MATH-lighteval", None),
    "metamathqa": ("meta-math/MetaMathQA", None),
}
"""Name → data set and configuration on the hub. MetaMathQA has training rows only."""


def math_task(
    name: str = "gsm8k",
    data: str | Path | RawData | None = None,
    *,
    prompt: str = "alpaca",
    columns: Sequence[str] | None = None,
    **options: Any,
) -> CausalTask:
    """Worked solutions: loss on the solution, `CausalTask.generated_score` by its final answer.

    MetaMathQA has no held-out rows of its own: name them with ``eval_data`` (GSM8K's or MATH's data),
    or a part of the training rows is held out.

    Args:
        name: ``"gsm8k"``, ``"math"`` or ``"metamathqa"``.
        data: ``None`` reads from the hub; else a local file or folder with one of `COLUMNS`; a column
            ``answer`` beside ``output`` holds the final answer.
        prompt: See `instruction_task`.
        columns: The columns of question, input and worked solution, where they have other names.
        options: Further options of `CausalTask`.

    Raises:
        UnknownNameError: No such task.
    """
    if name not in HUB:
        raise UnknownNameError("mathematics task", name, HUB)
    hub, subset = HUB[name]
    settings: dict[str, Any] = {"name": name, "judge": judge_solution}
    if data is None:
        settings["subset"] = subset
    return CausalTask(hub if data is None else data, math_format(prompt, columns), **settings | options)


def math_format(prompt: str, columns: Sequence[str] | None = None) -> Formatter:
    """Questions and worked solutions as examples, with the final answer as the reference."""
    prompt_templates(prompt)
    candidates = COLUMNS if columns is None else ((columns[0], columns[1], columns[2]),)

    def formatter(table: Table, tokenizer: Any, where: str) -> list[Example | None]:
        question, extra, solution = first_columns(table, candidates, where)
        solutions = column_of(table, solution)
        answers = column_of(table, "answer") if solution != "answer" else [""] * len(solutions)
        rows = zip(column_of(table, question), column_of(table, extra), solutions, answers, strict=True)
        return [
            make_example(prompt, text, more, output, normalise_answer(answer) or extract_answer(output))
            for text, more, output, answer in rows
        ]

    return formatter
