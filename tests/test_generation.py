"""Generated answers come from the adapted weights and are judged by the task."""

import json
from pathlib import Path

import pytest
import torch

from lelora_env import LeLoRAError
from lelora_env.export import merged_model
from lelora_env.generation import evaluate_generated, greedy
from tests.families import tiny_model
from tests.helpers import TokenTask, action_for, make_lanes
from tests.small_tokenizers import gpt_like


def test_trained_answers_are_generated_and_judged(tmp_path: Path) -> None:
    """Fine-tune a tiny causal model until it answers 'true' to everything; half the questions want that."""
    folder = tmp_path / "choice"
    folder.mkdir()
    for name, count in (("train", 60), ("validation", 8)):
        rows = [{"instruction": f"is this right? {i}", "input": "", "output": "the correct answer is true",
                 "answer": "true" if name == "train" or i % 2 else "false"} for i in range(count)]
        if name == "validation":
            for row in rows:
                row["output"] = f"the correct answer is {row['answer']}"
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = gpt_like()
    model = tiny_model("llama", "causal-lm", vocab_size=len(tokenizer), tie_word_embeddings=True,
                       max_position_embeddings=256)
    env = make_lanes(1, model=model, task=f"boolq:{folder}", tokenizer=tokenizer, target_modules="all-linear",
                     rank_set=(0, 16), parametrisation="unit", learning_rate=0.01, horizon=120, batch_size=8,
                     reward_size=8, tune_size=4, max_grad_norm=1.0)
    env.reset(seed=0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for step in range(120):
        env.step(action_for(env, 1, step % 2))
    score = evaluate_generated(env, max_new_tokens=8)
    assert score == {"generated_accuracy": 0.5, "answered": 1.0, "rows": 8.0}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    texts = greedy(merged_model(env.tuner), tokenizer, 8, batch_size=2)(["is this right? 3", "is this right? 44", "is"])
    assert texts[0] == greedy(merged_model(env.tuner), tokenizer, 8, batch_size=1)(["is this right? 3"])[0]


def test_tasks_without_a_rule_say_so() -> None:
    env = make_lanes(1, model=tiny_model("bert", num_labels=3), task=TokenTask(), rank_set=(0, 2), reward_size=4,
                     tune_size=0)
    env.reset(seed=0)
    with pytest.raises(LeLoRAError, match="no rule for generated answers"):
        evaluate_generated(env)
