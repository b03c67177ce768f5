"""Norms, changes and current singular values from inner products, against dense matrices."""

from typing import Any

import numpy as np
import pytest
import torch

from lelora_env.tasks.dataset import DatasetTask
from tests.families import tiny_model
from tests.helpers import TokenTask, assert_norms_are_exact, dense_weights, make_lanes, two_layer


def numbers_task(inputs: int, outputs: int) -> DatasetTask:
    """Rows of random numbers for a plain module."""
    rng = np.random.default_rng(0)
    rows = [{"input": rng.normal(size=inputs).tolist(), "label": int(rng.integers(outputs))} for _ in range(64)]

    def collate(part: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {"input": torch.tensor([row["input"] for row in part]),
                "labels": torch.tensor([row["label"] for row in part])}

    def loss(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none"), torch.ones(len(logits))

    return DatasetTask(rows, collate, eval=rows[:8], head="none", inputs=("input",), loss=loss, metric="zero",
                       predict=lambda logits, batch: logits, score=lambda predictions, rows: {"zero": 0.0})


@pytest.mark.parametrize("parametrisation", ["usv", "sqrt", "unit"])
def test_matrices_with_banks_of_different_sizes(parametrisation: str) -> None:
    """24x16 has m = 16 and a bank of 12 components; 8x24 has m = 8, where the windows overlap."""
    env = make_lanes(3, model=two_layer(), task=numbers_task(16, 8), rank_set=(0, 2, 4), target_modules=("0", "2"),
                     parametrisation=parametrisation, reward_size=8, tune_size=0, batch_size=4, horizon=10,
                     raw_observation=True, spectrum="full", learning_rate=0.05, extra_features=("update_norm",))
    assert {len(group.components) for group in env.source.base("none", 8, env.adapter_config, env.env_config)
            .spectrum.layout.groups} == {12, 8}
    env.reset(seed=0)
    start = [dense_weights(env, lane) for lane in range(3)]
    for turn in range(3):
        before = [dense_weights(env, lane) for lane in range(3)]
        actions = np.array([[2, 0, 1, 2], [1, 1, 2, 0], [0, 0, 2, 1]])
        observation, *_, infos = env.step(actions)
        for lane in range(3):
            now = dense_weights(env, lane)
            for m in range(2):
                assert observation[lane, m, 2] == pytest.approx(np.linalg.norm(now[m]), rel=1e-5)
                moved = np.linalg.norm(now[m] - before[lane][m])
                assert observation[lane, m, -1] == pytest.approx(moved, rel=1e-3, abs=1e-6)
            total = np.sqrt(sum(np.linalg.norm(a - b) ** 2 for a, b in zip(now, start[lane], strict=True)))
            assert infos["delta_norm"][lane] == pytest.approx(total, rel=1e-3)
        assert turn or np.abs(observation[0, 0, -1]) > 0


def test_small_changes_keep_their_precision() -> None:
    env = make_lanes(1, learning_rate=1e-6, warmup=0.0, raw_observation=True, extra_features=("update_norm",))
    env.reset(seed=0)
    before = dense_weights(env, 0)
    observation = env.step(np.tile([3, 0], (1, 24)))[0]
    after = dense_weights(env, 0)
    exact = [np.linalg.norm(a - b) for a, b in zip(after, before, strict=True)]
    assert max(exact) < 1e-4 * np.linalg.norm(before[0])
    np.testing.assert_allclose(observation[0, :, -1], exact, rtol=1e-3)


@pytest.mark.parametrize("parametrisation", ["usv", "sqrt", "unit"])
def test_norms_are_exact_for_a_bf16_model(parametrisation: str) -> None:
    model = tiny_model("bert", num_labels=3).to(torch.bfloat16)
    env = make_lanes(2, model=model, task=TokenTask(), rank_set=(0, 2, 4), reward_size=8, tune_size=0, batch_size=4,
                     horizon=10, raw_observation=True, parametrisation=parametrisation, target_modules="all-linear",
                     learning_rate=0.05)
    assert_norms_are_exact(env)
