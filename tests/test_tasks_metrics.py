import math
from collections.abc import Callable

import numpy as np
import pytest

from lelora_env.tasks.metrics import METRICS

ARRAYS = tuple[np.ndarray, np.ndarray]


def test_values_worked_out_by_hand() -> None:
    predicted, labels = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])  # tp 2, fp 1, tn 1, fn 1
    assert METRICS["accuracy"](predicted, labels) == pytest.approx(3 / 5)
    assert METRICS["f1"](predicted, labels) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert METRICS["matthews_correlation"](predicted, labels) == pytest.approx(
        (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))
    assert METRICS["macro_f1"](predicted, labels) == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_correlations_by_hand() -> None:
    a, b = np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, 2.0])
    x, y = a - a.mean(), b - b.mean()
    assert METRICS["pearson"](a, b) == pytest.approx(float(x @ y / math.sqrt((x @ x) * (y @ y))))
    assert METRICS["spearman"](a, b) == pytest.approx(1 - 6 * (0 + 1 + 1) / (3 * 8))


@pytest.mark.parametrize("name", ["matthews_correlation", "pearson", "spearman"])
@pytest.mark.parametrize(
    "make",
    [
        lambda y: (np.zeros_like(y), y),
        lambda y: (y, np.ones_like(y)),
        lambda y: (np.full(len(y), np.nan), y),
        lambda y: (y[:1], y[:1]),
        lambda y: (2.5 + 1e-9 * np.arange(len(y)), y.astype(float)),
    ],
)
def test_no_spread_scores_zero_without_a_warning(name: str, make: Callable[[np.ndarray], ARRAYS]) -> None:
    assert METRICS[name](*make(np.array([0, 1, 0, 1]))) == 0.0


def test_a_constant_answer_and_no_rows() -> None:
    labels = np.array([1, 1, 0])
    assert METRICS["f1"](np.zeros(3, np.int64), labels) == 0.0
    assert METRICS["accuracy"](np.zeros(3, np.int64), labels) == pytest.approx(1 / 3)
    for metric in METRICS.values():
        assert metric(np.zeros(0), np.zeros(0)) == 0.0
