"""What was learnt in a run, as tables: where ranks went, from where in the spectrum, how much moved, how sure it was.

The paper's analysis (Fig. 3 and Section 4.2.1) as numbers, each by phase of the run. Ranks are those that were trained,
see `lelora_env.runs.LaneTrace`. A matrix with rank 0 has no location.

Shapes: T env steps · M matrices · R ranks · S locations · N env steps whose probabilities were noted.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lelora_env.config import AdapterConfig
from lelora_env.matrices import MATRIX_TYPES, MatrixInfo
from lelora_env.records import LaneTrace, RunRecord

PHASES = ("early", "middle", "late")
"""Thirds of a run."""

SEGMENTS = ("front", "middle", "back")
"""Thirds of the layers that have matrices, as in the paper's Fig. 3(a)."""

Row = dict[str, Any]


def phases(env_steps: int) -> dict[str, slice]:
    """The rows of each phase, and of the ``run``, among `env_steps` rows; a phase of a run below 3 may be empty."""
    edges = [env_steps * i // len(PHASES) for i in range(len(PHASES) + 1)]
    parts = {name: slice(edges[i], edges[i + 1]) for i, name in enumerate(PHASES)}
    return {**parts, "run": slice(0, env_steps)}


def mean_ranks(trace: LaneTrace, matrices: Sequence[MatrixInfo]) -> list[Row]:
    """Mean rank by layer and type: Fig. 3(c) and (d), of which it holds the means.

    Returns:
        A row for each (layer, type) that occurs, layers ascending: ``layer``, ``type``, and the mean rank in each of
        `PHASES` and in the ``run``; NaN in a phase without env steps.
    """
    pairs = sorted({(m.layer, MATRIX_TYPES.index(m.type)) for m in matrices})
    rows: list[Row] = []
    for layer, kind in pairs:
        own = [m.layer == layer and m.type == MATRIX_TYPES[kind] for m in matrices]
        means = {phase: _mean(trace.ranks[part][:, own]) for phase, part in phases(len(trace.ranks)).items()}
        rows.append({"layer": layer, "type": MATRIX_TYPES[kind], **means})
    return rows


def location_shares(trace: LaneTrace, matrices: Sequence[MatrixInfo], locations: Sequence[str]) -> list[Row]:
    """From where in the spectrum the trained components were taken: Fig. 3(a) and (b).

    Args:
        trace: What the lane did.
        matrices: The M matrices.
        locations: Names of the S locations.

    Returns:
        A row for each group of matrices and phase, the ``run`` included: ``matrices`` (``all``, ``layers <segment>``
        for each of `SEGMENTS`, or a matrix type), ``phase``, and ``shares``, one a location: in [0, 1] and 1 in all, or
        NaN where nothing trained.
    """
    here = trace.locations[:, :, None] == np.arange(len(locations))  # (T, M, S)
    at = trace.ranks[:, :, None] * here
    rows: list[Row] = []
    for group, own in _groups(matrices).items():
        for phase, part in phases(len(trace.ranks)).items():
            count = at[part][:, own].sum((0, 1))
            shares = count / count.sum() if count.any() else np.full(len(locations), np.nan)
            named = dict(zip(locations, shares.tolist(), strict=True))
            rows.append({"matrices": group, "phase": phase, "shares": named})
    return rows


def update_norms(trace: LaneTrace, locations: Sequence[str]) -> list[Row]:
    """Mean over env steps of ‖ΔW‖, the Frobenius norm over all matrices that chose a location in an env step.

    Returns:
        A row for each location: ``location``, and the mean in each of `PHASES` and in the ``run``. Env steps in which
        no matrix chose it count as 0; NaN without env steps, or where the run did not note it.
    """
    rows: list[Row] = []
    for name in locations:
        values = trace.series(f"update_norm_{name}")[1]
        means = {phase: _mean(values[part]) for phase, part in phases(len(values)).items()}
        rows.append({"location": name, **means})
    return rows


def entropy_curve(trace: LaneTrace, rank_set: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Entropy of the noted probabilities: env steps (N,) and nats (N,), mean over matrices.

    Rank 0 counts as one choice, whatever its location. 0 means that the choice is certain.
    """
    steps, noted = trace.probabilities  # (N, M, R, S)
    if not len(steps):
        return steps, np.zeros(0)
    zero = np.array(rank_set) == 0
    free = noted[:, :, ~zero].reshape(*noted.shape[:2], -1)
    choices = np.concatenate([free, noted[:, :, zero].sum(-1)], axis=2)  # (N, M, choices)
    share = choices / choices.sum(-1, keepdims=True)  # they were rounded
    nats = -share * np.log(np.where(share > 0, share, 1.0))
    return steps, np.asarray(nats.sum(-1).mean(-1)) + 0.0


def learnt(run: RunRecord) -> dict[str, Any]:
    """All tables of a run: what learnt.json holds.

    Returns:
        ``phases``: first and last env step of each phase. ``lanes``: by name ``mean_rank`` (`mean_ranks`),
        ``location_shares``, ``update_norms``, and ``entropy`` with ``env_step`` and ``nats`` (`entropy_curve`).
    """
    adapter = AdapterConfig(rank_set=tuple(run.config["rank_set"]), locations=tuple(run.config["locations"]))
    steps = max(len(trace.ranks) for trace in run.lanes)
    spans = {name: [part.start + 1, part.stop] for name, part in phases(steps).items() if part.start < part.stop}
    return {"phases": spans, "lanes": {trace.name: _lane(trace, run.matrices, adapter) for trace in run.lanes}}


def _lane(trace: LaneTrace, matrices: Sequence[MatrixInfo], adapter: AdapterConfig) -> dict[str, Any]:
    steps, nats = entropy_curve(trace, adapter.rank_set)
    return {
        "mean_rank": mean_ranks(trace, matrices),
        "location_shares": location_shares(trace, matrices, adapter.location_names),
        "update_norms": update_norms(trace, adapter.location_names),
        "entropy": {"env_step": steps, "nats": nats},
    }


def _groups(matrices: Sequence[MatrixInfo]) -> dict[str, list[bool]]:
    """Which matrices belong to each group of `location_shares`; groups without any are left out."""
    layers = sorted({m.layer for m in matrices})
    segment = {layer: SEGMENTS[i * len(SEGMENTS) // len(layers)] for i, layer in enumerate(layers)}
    groups = {"all": [True] * len(matrices)}
    groups |= {f"layers {name}": [segment[m.layer] == name for m in matrices] for name in SEGMENTS}
    groups |= {kind: [m.type == kind for m in matrices] for kind in MATRIX_TYPES}
    return {name: own for name, own in groups.items() if any(own)}


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
