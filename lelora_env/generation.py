"""Answers as a model would give them: greedy generation from a lane's merged model.

Shapes: N prompts · T tokens.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lelora_env.errors import LeLoRAError

if TYPE_CHECKING:
    from lelora_env.vector_env import LeLoRAVectorEnv

Generate = Callable[[list[str]], list[str]]
"""Prompts in, continuations out."""


def greedy(model: nn.Module, tokenizer: Any, max_new_tokens: int = 256, batch_size: int = 16) -> Generate:
    """A model as a function from prompts to greedy continuations.

    Args:
        model: A causal transformers model in evaluation mode.
        tokenizer: Its tokenizer, with a pad token.
        max_new_tokens: Longest continuation, in tokens.
        batch_size: Prompts generated together (left-padded).
    """

    @torch.no_grad()
    def generate(prompts: list[str]) -> list[str]:
        answers: list[str] = []
        for start in range(0, len(prompts), batch_size):
            rows = tokenizer(prompts[start : start + batch_size], return_tensors="pt", padding=True,
                             padding_side="left").to(next(model.parameters()).device)
            tokens = model.generate(  # type: ignore[operator]
                **rows, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
            new = tokens[:, rows["input_ids"].shape[1] :]
            answers += tokenizer.batch_decode(new, skip_special_tokens=True)
        return answers

    return generate


def evaluate_generated(
    env: "LeLoRAVectorEnv", *, lane: int = 0, split: str = "eval", limit: int | None = None, max_new_tokens: int = 256
) -> dict[str, float]:
    """Score freely generated answers: exact match of the extracted answer, or the candidate named first.

    Args:
        env: The environment; its task must be one whose answers can be judged (mathematics, choice).
        lane: Which lane's model answers.
        split: Which rows' questions to ask.
        limit: Only the first so many rows.
        max_new_tokens: Longest answer, in tokens.

    Raises:
        LeLoRAError: The task has no rule for generated answers, or is not for causal models.
    """
    from lelora_env.export import merged_model

    task, tuner = env.task, env.tuner
    if not hasattr(task, "generated_score"):
        raise LeLoRAError(f"the task {task.name!r} has no rule for generated answers; use evaluate(), or a task "
                          "such as gsm8k or boolq.")
    tokenizer = env.source.tokenizer()
    answer = greedy(merged_model(tuner, lane), tokenizer, max_new_tokens)
    sources = list(tuner.splits.sources[split])[:limit]
    score: dict[str, float] = task.generated_score(answer, sources, tokenizer=tokenizer)
    return score
