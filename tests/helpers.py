"""Small things that several test files need."""

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

import lelora_env  # noqa: F401  (registers the environment)
from lelora_env import LeLoRAVectorEnv
from lelora_env.tasks.base import Rows, Splits, causal_rows, cross_entropy_rows


def make_lanes(lanes: int, **options: Any) -> LeLoRAVectorEnv:
    """A native vector environment with autoreset disabled, on the built-in instance unless told otherwise."""
    options.setdefault("autoreset_mode", "Disabled")
    env = gym.make_vec("LeLoRA-v0", num_envs=lanes, vectorization_mode="vector_entry_point", **options)
    assert isinstance(env, LeLoRAVectorEnv)
    return env


class TokenTask:
    """Random token rows with labels, for tiny models of any family."""

    name = "tokens"
    num_labels = 3
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    metric = "score"

    def __init__(self, head: str = "sequence-classification", rows: int = 48, length: int = 12) -> None:
        self.head: Any = head
        self.rows = rows
        self.length = length
        if head == "causal-lm":
            self.num_labels = 0

    def _draw(self, rng: np.random.Generator, count: int) -> Rows:
        ids = torch.from_numpy(rng.integers(5, 60, size=(count, self.length)))
        lengths = rng.integers(3, self.length + 1, size=count)
        mask = torch.from_numpy((np.arange(self.length) < lengths[:, None]).astype(np.int64))
        ids = torch.where(mask.bool(), ids, 1)
        if self.head == "causal-lm":
            return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}
        return {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % 3}

    def splits(self, tokenizer: Any, *, reward_size: int, tune_size: int, seed: int) -> Splits:
        rng = np.random.default_rng(seed)
        return Splits(
            self._draw(rng, self.rows), self._draw(rng, reward_size), self._draw(rng, tune_size), self._draw(rng, 20)
        )

    def loss(self, logits: Tensor, batch: Rows) -> tuple[Tensor, Tensor]:
        rows = causal_rows if self.head == "causal-lm" else cross_entropy_rows
        return rows(logits, batch["labels"])

    def predict(self, logits: Tensor, batch: Rows) -> Tensor:
        total, weight = self.loss(logits, batch)
        return torch.stack([total, weight], 1)

    def score(self, predictions: np.ndarray, rows: Rows) -> dict[str, float]:
        loss = float(predictions[:, 0].sum() / predictions[:, 1].sum())
        return {"score": -loss, "loss": loss}


def action_for(env: LeLoRAVectorEnv, rank_index: int, location_index: int) -> np.ndarray:
    """The same choice for every matrix of every lane."""
    return np.tile(np.array([rank_index, location_index]), (env.num_envs, env.num_matrices))


def dense_weights(env: LeLoRAVectorEnv, lane: int) -> list[np.ndarray]:
    """Every current weight (O, I), float64, put together from residual and bank with plain NumPy."""
    bank = env.tuner.bank
    rows = {name: value.detach()[lane].double().cpu().numpy() for name, value in bank.rows.items()}
    result: dict[int, np.ndarray] = {}
    for group, residual in zip(bank.spectrum.layout.groups, bank.spectrum.residual, strict=True):
        size = len(group.components)
        for i, matrix in enumerate(group.matrices):
            total = residual[i].double().cpu().numpy().copy()
            for k in range(i * size, (i + 1) * size):
                gain = rows["sigma"][group.sigma + k, 0] if "sigma" in rows else float(bank.spectrum.scale[matrix])
                total += gain * np.outer(rows[str(group.out_features)][group.left + k],
                                         rows[str(group.in_features)][group.right + k])
            result[matrix] = total
    return [result[matrix] for matrix in range(env.num_matrices)]


def assert_norms_are_exact(env: LeLoRAVectorEnv) -> None:
    """After a few random steps, the observed (raw) norms are those of the dense weights."""
    env.reset(seed=0)
    for _ in range(3):
        observation = env.step(env.action_space.sample())[0]
    for lane in range(env.num_envs):
        exact = [np.linalg.norm(weight) for weight in dense_weights(env, lane)]
        np.testing.assert_allclose(observation[lane, :, 2], exact, rtol=1e-5)


def two_layer(seed: int = 0) -> nn.Module:
    """A small plain module that is no transformers model."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model
