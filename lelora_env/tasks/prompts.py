"""How an instruction becomes the text that a model reads."""

from collections.abc import Sequence
from typing import Any

from lelora_env.errors import DataError, UnknownNameError
from lelora_env.tasks.causal import Example, Formatter, Segment
from lelora_env.tasks.files import Table, require_columns
from lelora_env.tasks.splits import content_key

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""The prompts of Stanford Alpaca (https://github.com/tatsu-lab/stanford_alpaca), without and with an input."""

PROMPTS: dict[str, tuple[str, str]] = {
    "alpaca": (ALPACA, ALPACA_INPUT),
    "question": ("Question: {instruction}\nAnswer: ", "{input}\nQuestion: {instruction}\nAnswer: "),
    "plain": ("{instruction}\n", "{instruction}\n{input}\n"),
}
"""Name → template without and with an input."""


def prompt_templates(prompt: str) -> tuple[str, str]:
    """The two templates that `prompt` names; or itself, if it is a template.

    Raises:
        UnknownNameError: Neither a known name nor a text with ``{instruction}``.
    """
    if "{instruction}" in prompt:
        return prompt, prompt if "{input}" in prompt else prompt.replace("{instruction}", "{instruction}\n{input}")
    if prompt not in PROMPTS:
        raise UnknownNameError("prompt", prompt, PROMPTS, "A template that contains {instruction} works too.")
    return PROMPTS[prompt]


def render_prompt(prompt: str, instruction: str, extra: str = "") -> str:
    """The text before the answer. Braces in the data stay as they are."""
    plain, with_input = prompt_templates(prompt)
    template = with_input if extra.strip() else plain
    before, found, after = template.partition("{instruction}")
    fill = [part.replace("{input}", extra) for part in (before, after)]
    return fill[0] + (instruction if found else "") + fill[1]


def make_example(prompt: str, instruction: str, extra: str, output: str, answer: str | None = None) -> Example | None:
    """A prompt and its answer as a row; ``None`` if there is no answer to learn."""
    if not output.strip():
        return None
    text = render_prompt(prompt, instruction, extra)
    key = content_key(instruction, extra) if (instruction + extra).strip() else content_key(output)
    return Example(key, (Segment(text), Segment(output, learn=True, ends=True)), text, answer)


def column_of(table: Table, name: str) -> list[str]:
    """A column as texts; empty texts where the table has no such column."""
    if name not in table:
        return [""] * len(next(iter(table.values())))
    return ["" if value is None else str(value) for value in table[name]]


def first_columns(table: Table, candidates: Sequence[tuple[str, str, str]], where: str) -> tuple[str, str, str]:
    """The first (instruction, input, output) columns that the table has; the input may be missing.

    Raises:
        DataError: None fits.
    """
    for names in candidates:
        if names[0] in table and names[2] in table:
            return names
    require_columns(table, (candidates[0][0], candidates[0][2]), where)
    return candidates[0]


def instruction_format(columns: Sequence[str], prompt: str) -> Formatter:
    """Rows of (instruction, input, output) columns as examples.

    Raises:
        DataError: Not three column names.
        UnknownNameError: An unknown prompt.
    """
    if len(columns) != 3:
        raise DataError(f"columns must be three names: instruction, input and output (got {tuple(columns)!r})")
    names = (columns[0], columns[1], columns[2])
    prompt_templates(prompt)

    def formatter(table: Table, tokenizer: Any, where: str) -> list[Example | None]:
        instruction, extra, output = first_columns(table, [names], where)
        parts = zip(column_of(table, instruction), column_of(table, extra), column_of(table, output), strict=True)
        return [make_example(prompt, *part) for part in parts]

    return formatter
