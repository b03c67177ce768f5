"""What the runs of a sweep say: tables with intervals, from their lines alone.

For each problem and method: the interquartile mean of the scores over seeds with a 95 % bootstrap interval, after
Agarwal et al. (2021), "Deep Reinforcement Learning at the Edge of the Statistical Precipice". Against the
reference: the probability that a run of the method beats one of the reference (ties count half), meaned over problems,
with an interval from resampling the seeds within each problem. Every estimate has an explicit generator of its own.

A diverged run, or one whose score is no finite number, counts with the score of the untrained model. A crashed one is
shown and never counted: a method with crashes looks better than it is. With few runs bootstrap intervals are too
narrow (about 80 % cover the truth with three, 90 % with five), and the interquartile mean of three is their mean.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import trim_mean

from lelora_env.compare.store import CRASHED, DIVERGED
from lelora_env.compare.sweep import Sweep

RESAMPLES = 4000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """As it stands in tables."""
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class Row:
    """One method on one problem.

    Attributes:
        problem: Its name.
        method: Its name.
        runs: Runs that count.
        diverged: Those of them that diverged.
        crashed: Runs that crashed and do not count.
        score: Interquartile mean of the task's score on eval; ``None`` without a run.
        tune: Mean score on tune; ``None`` without a tune split, or where a run diverged.
        trained_parameters: Mean over env steps and runs.
        trained_parameters_end: Mean over runs, at the last env step.
        mean_rank: Mean over matrices, env steps and runs.
    """

    problem: str
    method: str
    runs: int
    diverged: int
    crashed: int
    score: Interval | None
    tune: float | None
    trained_parameters: float
    trained_parameters_end: float
    mean_rank: float


@dataclass(frozen=True)
class Summary:
    """A sweep's tables.

    Attributes:
        rows: Problem by problem, methods in the sweep's order.
        improvement: Per method but the reference, the probability that it beats the reference; ``None`` without
            runs to compare.
        reference: The reference's name.
        missing: Runs of the sweep that have not been made, or crashed.
    """

    rows: tuple[Row, ...]
    improvement: dict[str, Interval | None]
    reference: str
    missing: int

    def lines(self) -> list[str]:
        """The tables as Markdown."""
        tuned = any(row.tune is not None for row in self.rows)
        head = ["problem", "method", "score (IQM, 95 %)", *(["tune"] if tuned else []), "trained parameters",
                "at the end", "mean rank", "runs", "diverged", "crashed"]
        cells = []
        for row in self.rows:
            tune = ["-" if row.tune is None else f"{row.tune:.4f}"] if tuned else []
            sizes = (f"{row.trained_parameters:,.0f}", f"{row.trained_parameters_end:,.0f}", f"{row.mean_rank:.2f}")
            cells.append([row.problem, row.method, str(row.score or "-"), *tune, *(sizes if row.runs else "---"),
                          str(row.runs), str(row.diverged), str(row.crashed)])
        lines = [*_markdown(head, cells), ""]
        against = [[name, "-" if better is None else str(better)] for name, better in self.improvement.items()]
        lines += _markdown(["method", f"probability of beating {self.reference} (95 %)"], against)
        return [*lines, "", f"{self.missing} runs of the sweep are missing."] if self.missing else lines


def _markdown(head: list[str], cells: list[list[str]]) -> list[str]:
    """A table whose columns stand straight in plain text too."""
    rows = [head, *cells]
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(head))]
    rows.insert(1, ["-" * width for width in widths])
    straight = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return ["| " + " | ".join(row) + " |" for row in straight]


def summarise(records: Sequence[dict[str, Any]], sweep: Sweep, seed: int = 0) -> Summary:
    """Draw up the tables.

    Args:
        records: Lines of the sweep's runs; those of other runs are left out.
        sweep: What was compared.
        seed: Seed of the bootstrap's generator: the same lines give the same table.
    """
    wanted = {run.key for run in sweep.runs()}
    here = [record for record in records if record["key"] in wanted]
    rows, scores = [], {}
    for problem in sweep.problems:
        for method in sweep.methods:
            found = [r for r in here if r["problem"] == problem.name and r["method"] == method.name]
            counted = sorted((r for r in found if r["status"] != CRASHED and _score(r) is not None),
                             key=lambda record: record["seed"])
            scores[problem.name, method.name] = np.array([_score(record) for record in counted], dtype=np.float64)
            rows.append(_row(problem.name, method.name, found, counted, _generator(seed, problem.name, method.name)))
    pairs = {
        method.name: [(scores[problem.name, method.name], scores[problem.name, sweep.reference])
                      for problem in sweep.problems]
        for method in sweep.methods if method.name != sweep.reference
    }
    improvement = {name: _improvement(compared, _generator(seed, "", name)) for name, compared in pairs.items()}
    done = {record["key"] for record in here if record["status"] != CRASHED}
    return Summary(tuple(rows), improvement, sweep.reference, len(wanted - done))


def _score(record: dict[str, Any]) -> float | None:
    """What a run counts with; ``None`` where there is no finite number."""
    score: float | None = record["score_before"] if record["status"] == DIVERGED else record["score"]
    return score


def _generator(seed: int, *names: str) -> np.random.Generator:
    """One of its own for every estimate, so that a further method does not move the others' intervals."""
    return np.random.default_rng([seed, zlib.crc32("\n".join(names).encode())])


def _row(
    problem: str, method: str, found: list[dict[str, Any]], counted: list[dict[str, Any]],
    generator: np.random.Generator,
) -> Row:
    scores = np.array([_score(record) for record in counted], dtype=np.float64)
    tunes = [record["tune"] for record in counted if record.get("tune") is not None]

    def mean(name: str) -> float:
        return float(np.mean([record[name] for record in counted])) if counted else float("nan")

    return Row(
        problem=problem, method=method, runs=len(counted),
        diverged=sum(record["status"] == DIVERGED for record in counted), crashed=len(found) - len(counted),
        score=bootstrap(scores, interquartile_mean, generator) if counted else None,
        tune=float(np.mean(tunes)) if tunes and len(tunes) == len(counted) else None,
        trained_parameters=mean("trained_parameters"),
        trained_parameters_end=mean("trained_parameters_end"), mean_rank=mean("mean_rank"),
    )


def interquartile_mean(scores: np.ndarray) -> np.ndarray:
    """Mean of the middle half along the last dimension: ⌊N/4⌋ runs are cut off at each end."""
    return np.asarray(trim_mean(scores, 0.25, axis=-1))


def bootstrap(
    scores: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], generator: np.random.Generator
) -> Interval:
    """A statistic of N scores, which it reduces along the last dimension, with its percentile interval."""
    drawn = scores[generator.integers(len(scores), size=(RESAMPLES, len(scores)))]  # (resamples, N)
    return _interval(float(statistic(scores)), statistic(drawn))


def _improvement(
    pairs: list[tuple[np.ndarray, np.ndarray]], generator: np.random.Generator
) -> Interval | None:
    """P(a run beats one of the reference), the mean over problems on which both have runs."""
    both = [(ours, theirs) for ours, theirs in pairs if len(ours) and len(theirs)]
    if not both:
        return None
    value = np.mean([probability_of_improvement(ours, theirs) for ours, theirs in both])
    drawn = [
        probability_of_improvement(
            ours[generator.integers(len(ours), size=(RESAMPLES, len(ours)))],
            theirs[generator.integers(len(theirs), size=(RESAMPLES, len(theirs)))],
        )
        for ours, theirs in both
    ]
    return _interval(float(value), np.mean(drawn, axis=0))


def probability_of_improvement(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Share of all pairs of runs (..., N) and (..., K) in which ours is better; ties count half."""
    difference = ours[..., :, None] - theirs[..., None, :]
    return np.asarray(((difference > 0) + 0.5 * (difference == 0)).mean((-1, -2)))


def _interval(value: float, drawn: np.ndarray) -> Interval:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))
