"""Scores by name: thin wrappers around scikit-learn and SciPy that never give NaN.

Predictions or labels without any spread (a head that always answers the same) score 0 where the
textbook formula divides by zero. Each function takes predictions (N,) and labels (N,).
"""

from collections.abc import Callable

import numpy as np

Metric = Callable[[np.ndarray, np.ndarray], float]


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose predicted class is the label, in [0, 1]."""
    return float(np.mean(predictions == labels)) if len(labels) else 0.0


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1, in [0, 1]; 0 where no row is predicted or labelled 1."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels == 1, predictions == 1, zero_division=0.0)) if len(labels) else 0.0


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Mean F1 over the classes that occur in labels or predictions, in [0, 1]."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="macro", zero_division=0.0)) if len(labels) else 0.0


def matthews_correlation(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews' correlation coefficient, in [-1, 1]: CoLA's official metric."""
    from sklearn.metrics import matthews_corrcoef

    if _flat(predictions) or _flat(labels):
        return 0.0
    return float(matthews_corrcoef(labels, predictions))


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson's correlation, in [-1, 1]: STS-B's official metric, with `spearman`."""
    from scipy.stats import pearsonr

    if _flat(predictions) or _flat(labels):
        return 0.0
    return float(pearsonr(predictions.astype(np.float64), labels.astype(np.float64)).statistic)


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Spearman's rank correlation, in [-1, 1]."""
    from scipy.stats import spearmanr

    if _flat(predictions) or _flat(labels):
        return 0.0
    return float(spearmanr(predictions, labels).statistic)


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "matthews_correlation": matthews_correlation,
    "pearson": pearson,
    "spearman": spearman,
}
"""Metrics that tasks may name."""


def _flat(values: np.ndarray) -> bool:
    """Whether a correlation with `values` is undefined: too few, not finite, or no spread beyond rounding."""
    if len(values) < 2 or not np.isfinite(values).all():
        return True
    values = values.astype(np.float64)
    return bool(np.ptp(values) <= 1e-7 * np.abs(values).max())
