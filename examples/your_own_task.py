"""A task of your own: rows and a collator, nothing else.

Run: python examples/your_own_task.py
"""

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

import lelora_env  # noqa: F401  (registers the environment)
from lelora_env.tasks.dataset import DatasetTask

LETTERS = "abcdefgh"


def make_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Words with a label: is the first letter one of a-d? A ``datasets.Dataset`` works too."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(list(LETTERS), 6)) for _ in range(count)]
    return [{"word": word, "early": int(word[0] < "e")} for word in words]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows to tensors: token ids (N, T), their mask (N, T) and labels (N,)."""
    ids = torch.tensor([[1 + LETTERS.index(letter) for letter in row["word"]] for row in rows])
    labels = torch.tensor([row["early"] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def main(horizon: int = 60) -> dict[str, float]:
    """Fine-tune a small model on the task with one fixed allocation; gives the scores at the end."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(
        vocab_size=16, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, num_labels=2,
    ))
    # key_columns: equal words count as one row, so that none is both trained on and judged by.
    task = DatasetTask(make_rows(2000, seed=1), collate, name="letters", num_labels=2, key_columns=("word",))
    env = gym.make("LeLoRA-v0", model=model, task=task, horizon=horizon, learning_rate=5e-3, device="cpu")
    _, info = env.reset(seed=0)
    print(f"start: loss on the reward batch {info['L1']:.3f}")
    action = env.action_space.sample()
    action[0::2], action[1::2] = 3, 0  # the largest rank, at the head of the spectrum, for every matrix
    done = False
    while not done:
        _, _, terminated, truncated, info = env.step(action)
        done = terminated or truncated
    scores: dict[str, float] = env.unwrapped.evaluate("eval")  # type: ignore[attr-defined]
    print(f"end: loss on the reward batch {info['L1']:.3f}; held-out rows: "
          + ", ".join(f"{name} {value:.3f}" for name, value in scores.items()))
    env.close()
    return scores


if __name__ == "__main__":
    main()
