"""Conversations for causal models: the model's own chat template, loss on the assistant's turns only."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lelora_env.errors import DataError
from lelora_env.tasks.causal import Example, Formatter, Segment
from lelora_env.tasks.files import RawData, Table, require_columns
from lelora_env.tasks.hints import set_option
from lelora_env.tasks.instruction import CausalTask
from lelora_env.tasks.prompts import make_example, prompt_templates
from lelora_env.tasks.splits import content_key

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A plain template for models that have none: ``chat_template="chatml"``."""

Message = Mapping[str, Any]


def chat_task(
    data: str | Path | RawData, *, column: str = "messages", chat_template: str | None = None, **options: Any
) -> CausalTask:
    """Conversations, as lists of ``{"role": ..., "content": ...}``.

    Each row is written with the tokeniser's chat template; the turns of role ``assistant`` carry the
    loss, with whatever the template puts after them. Rows without an assistant's turn, or that the
    template does not write turn by turn, are dropped (note ``"no_answer"``).

    Args:
        data: See `CausalTask`.
        column: The column of conversations.
        chat_template: A Jinja template, or ``"chatml"``; ``None`` takes the tokeniser's own.
        options: Further options of `CausalTask`.
    """
    return CausalTask(data, chat_format(column, chat_template), **{"name": "chat"} | options)


def chat_format(column: str, chat_template: str | None) -> Formatter:
    """Conversations as examples."""
    template = CHATML if chat_template == "chatml" else chat_template

    def formatter(table: Table, tokenizer: Any, where: str) -> list[Example | None]:
        require_columns(table, (column,), where, "column")
        if template is None and not getattr(tokenizer, "chat_template", None):
            raise DataError(f"{where} holds conversations, but the tokenizer has no chat template; use an instruction-"
                            f"tuned model, or give a Jinja template of your own or "
                            f"ChatML: {set_option('chat_template', 'chatml', 'chat')}")
        examples = [_example(tokenizer, messages, template, where) for messages in table[column]]
        if examples and not any(examples):
            raise DataError(f"{where}: no conversation in column {column!r} has an assistant's turn that the chat "
                            "template can write")
        return examples

    return formatter


def _example(tokenizer: Any, messages: Any, template: str | None, where: str) -> Example | None:
    turns = _checked(messages, where)
    segments: list[Segment] = []
    written, prompt, answer = "", "", None
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before = _render(tokenizer, turns[:i], template, where, opens_answer=True) if i else ""
        after = _render(tokenizer, turns[: i + 1], template, where, opens_answer=False)
        if not before.startswith(written) or not after.startswith(before):
            return None
        segments += [Segment(before[len(written):]), Segment(after[len(before):], learn=True)]
        written, prompt, answer = after, before, str(turn["content"])
    asked = [turn["content"] for turn in turns if turn["role"] != "assistant"]
    if not segments:
        return None
    return Example(content_key(*(asked or [written])), tuple(segments), prompt, answer, bos=False)


def _checked(messages: Any, where: str) -> list[Message]:
    ok = isinstance(messages, list) and all(
        isinstance(turn, Mapping) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in messages
    )
    if not ok:
        raise DataError(f"{where}: expected a list of {{'role': ..., 'content': ...}} in each row (got "
                        f"{str(messages)[:120]!r})")
    return list(messages)


def _render(
    tokenizer: Any, turns: Sequence[Message], template: str | None, where: str, *, opens_answer: bool
) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=opens_answer, chat_template=template
        )
    except Exception as error:
        raise DataError(f"{where}: the chat template refuses a conversation: {error}. Its roles are "
                        f"{[turn['role'] for turn in turns]}") from error
    return text


def ultrafeedback_task(
    data: str | Path | RawData | None = None, *, prompt: str = "alpaca", **options: Any
) -> CausalTask:
    """UltraFeedback's preferred answers as instruction data: columns ``prompt`` and ``chosen``.

    Args:
        data: ``None`` reads ``HuggingFaceH4/ultrafeedback_binarized``; else a file, folder or hub name.
            ``chosen`` is a text, or a conversation whose last turn is the answer.
        prompt: See `lelora_env.tasks.instruction.instruction_task`.
        options: Further options of `CausalTask`.
    """
    prompt_templates(prompt)

    def formatter(table: Table, tokenizer: Any, where: str) -> list[Example | None]:
        require_columns(table, ("prompt", "chosen"), where)
        rows = zip(table["prompt"], table["chosen"], strict=True)
        return [make_example(prompt, str(question or ""), "", _last_turn(chosen)) for question, chosen in rows]

    settings: dict[str, Any] = {"name": "ultrafeedback"}
    if data is None:
        settings |= {"train_split": "train_sft", "eval_splits": ("test_sft",)}
    return CausalTask(data or "HuggingFaceH4/ultrafeedback_binarized", formatter, **settings | options)


def _last_turn(chosen: Any) -> str:
    if isinstance(chosen, list):
        return str(chosen[-1].get("content") or "") if chosen and isinstance(chosen[-1], Mapping) else ""
    return str(chosen or "")
