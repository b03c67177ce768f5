"""Losses of rows of tokens against a slow twin in float64 NumPy."""

import numpy as np
import pytest
import torch

from lelora_env.tasks.base import causal_rows
from lelora_env.tasks.causal import token_statistics


def by_hand(logits: np.ndarray, labels: np.ndarray) -> list[tuple[float, int, int]]:
    """(nats, labelled tokens, tokens guessed right) of each row: position t predicts the label at t + 1."""
    result = []
    for row, label in zip(logits.astype(np.float64), labels, strict=True):
        total, count, right = 0.0, 0, 0
        for t in range(len(row) - 1):
            if label[t + 1] != -100:
                total += np.log(np.exp(row[t]).sum()) - row[t, label[t + 1]]
                count += 1
                right += int(row[t].argmax() == label[t + 1])
        result.append((total, count, right))
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beyond", [0, 3])
def test_token_losses_equal_the_slow_twin(dtype: torch.dtype, beyond: int) -> None:
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(0, 3, (5, 7, 11))).to(dtype)
    labels = rng.integers(0, 11, (5, 7))
    labels[rng.random((5, 7)) < 0.4] = -100
    labels[2] = -100  # a row without any label
    labels[:, 0] = 4  # nothing predicts the first token
    labels[3, 1:] = logits[3, :-1].float().argmax(-1)  # a row that is all right
    expected = by_hand(logits.float().numpy(), labels)
    given = torch.from_numpy(np.pad(labels, ((0, 0), (0, beyond)), constant_values=-100))
    total, weight = causal_rows(logits, given)
    statistics = token_statistics(logits, given)
    assert total.dtype == weight.dtype == torch.float32
    for row, (nats, count, right) in enumerate(expected):
        assert total[row].item() == pytest.approx(nats, rel=1e-5, abs=1e-6)
        assert weight[row] == count
        assert statistics[row].tolist() == pytest.approx([nats, count, right], rel=1e-5, abs=1e-6)
    assert expected[3][2] == 6


def test_gradient_of_token_losses_reaches_labelled_positions_only() -> None:
    """The gradient of a cross-entropy is softmax minus one-hot at labelled positions, and 0 elsewhere."""
    logits = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([[1, 2, -100, 3, 0], [-100, -100, 1, -100, -100]])
    causal_rows(logits, labels)[0].sum().backward()
    expected = np.zeros((2, 5, 4))
    values = logits.detach().double().numpy()
    for row, t, label in ((0, 0, 2), (0, 2, 3), (0, 3, 0), (1, 1, 1)):
        soft = np.exp(values[row, t]) / np.exp(values[row, t]).sum()
        expected[row, t] = soft - np.eye(4)[label]
    assert logits.grad is not None
    assert np.allclose(logits.grad.numpy(), expected, atol=1e-6)
