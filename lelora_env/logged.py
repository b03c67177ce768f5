"""Logged fine-tuning runs: one row for each run that kept one allocation from start to end, in a Parquet file.

Shapes: N runs · M matrices · F features.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lelora_env.errors import DataError, UnknownNameError
from lelora_env.matrices import MatrixInfo

PACKAGED = Path(__file__).parent / "data" / "allocations-1.parquet"
"""The data set that comes with the package."""

FORMAT = "lelora-allocations"
VERSION = 1
_KEY = b"lelora"

COLUMNS = ("task", "placement", "round", "lane", "seed", "kind", "action", "loss_before", "loss", "score",
           "trained_parameters")
"""The columns of a file, in order; `AllocationRuns` says what they hold."""


@dataclass(frozen=True, eq=False)
class Problem:
    """What the runs of one task and placement have in common.

    Attributes:
        task: The task's name.
        placement: What was adapted: ``target_modules`` of `lelora_env.AdapterConfig`.
        settings: Every field of `AdapterConfig` and `EnvConfig`; besides ``model``, ``metric`` and the task's options.
        facts: Versions, commit and hardware of the runs.
        matrices: M matrices, in model order.
        feature_names: F names of the observation's columns.
        rows: (M, F) float32, the observation at the start.
    """

    task: str
    placement: str
    settings: dict[str, Any]
    facts: dict[str, Any]
    matrices: tuple[MatrixInfo, ...] = field(repr=False)
    feature_names: tuple[str, ...] = field(repr=False)
    rows: np.ndarray = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """Everything as plain values; the inverse of `from_json`."""
        return {
            "task": self.task, "placement": self.placement, "settings": self.settings, "facts": self.facts,
            "matrices": [vars(matrix) for matrix in self.matrices], "feature_names": list(self.feature_names),
            "rows": np.round(self.rows.astype(np.float64), 6).tolist(),
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> "Problem":
        """Read what `as_json` has made; rows are exact to six digits behind the point."""
        matrices = tuple(MatrixInfo(**matrix) for matrix in plain["matrices"])
        rows = np.array(plain["rows"], dtype=np.float32)
        return cls(plain["task"], plain["placement"], dict(plain["settings"]), dict(plain["facts"]), matrices,
                   tuple(plain["feature_names"]), rows)


@dataclass(frozen=True, eq=False)
class AllocationRuns:
    """N logged runs. Arrays are in the order of the file.

    Attributes:
        problems: Settings, matrices and observation of every (task, placement).
        task: (N,) str.
        placement: (N,) str.
        round: (N,) int64. The runs of a round share seed, data order and head start (common random numbers), so what
            differs within a round is the allocation.
        lane: (N,) int64, place in the round.
        seed: (N,) int64, the round's seed.
        kind: (N,) str, how the allocation was drawn: ``uniform`` over all choices, ``varied`` with a probability of
            rank 0 that the run drew first, ``concentrated`` on few matrices at one total, ``replicate`` the same
            allocation in every round.
        action: N arrays (2M,) int8, rank index and location index of each matrix, interleaved; (N, 2M) where all
            runs have the same placement.
        loss_before: (N,) L1 before the run, nats a row.
        loss: (N,) L1 after the run, on the same held-out training rows.
        score: (N,) the task's metric on eval rows, after the run.
        trained_parameters: (N,) int64, Σ r·(out + in [+1 in ``usv``]).
    """

    problems: dict[tuple[str, str], Problem]
    task: np.ndarray = field(repr=False)
    placement: np.ndarray = field(repr=False)
    round: np.ndarray = field(repr=False)
    lane: np.ndarray = field(repr=False)
    seed: np.ndarray = field(repr=False)
    kind: np.ndarray = field(repr=False)
    action: np.ndarray = field(repr=False)
    loss_before: np.ndarray = field(repr=False)
    loss: np.ndarray = field(repr=False)
    score: np.ndarray = field(repr=False)
    trained_parameters: np.ndarray = field(repr=False)

    def __len__(self) -> int:
        """N."""
        return len(self.loss)

    @property
    def problem(self) -> Problem:
        """The one problem of these runs.

        Raises:
            DataError: They have several.
        """
        if len(self.problems) != 1:
            raise DataError(f"these runs are of several problems, {sorted(self.problems)}; give task and placement to "
                            "load_allocations().")
        return next(iter(self.problems.values()))


def load_allocations(task: str | None = None, placement: str | None = None,
                     path: str | Path | None = None) -> AllocationRuns:
    """Read logged runs.

    Args:
        task: Only runs on this task; ``None`` = all.
        placement: Only runs with this ``target_modules``, such as ``"all-linear"``; ``None`` = all.
        path: A Parquet file that `write_allocations` has made; ``None`` = the one in the package.

    Raises:
        DataError: The file is missing or is not such a file.
        UnknownNameError: It has no run on that task, or none with that placement.
    """
    table, about = _read(Path(PACKAGED if path is None else path))
    problems = {(p.task, p.placement): p for p in map(Problem.from_json, about["problems"])}
    keep = np.ones(table.num_rows, dtype=bool)
    columns = {name: table.column(name) for name in COLUMNS}
    texts = {name: np.array(columns[name].to_pylist(), dtype=str) for name in ("task", "placement", "kind")}
    for name, wanted in (("task", task), ("placement", placement)):
        if wanted is not None:
            known = {getattr(problem, name) for problem in problems.values()}
            if wanted not in known:
                raise UnknownNameError(f"{name} of the logged runs", wanted, known)
            keep &= texts[name] == wanted
            problems = {key: problem for key, problem in problems.items() if getattr(problem, name) == wanted}
    numbers = {name: np.asarray(columns[name].to_numpy())[keep] for name in COLUMNS
               if name not in texts and name != "action"}
    action = _actions(columns["action"].to_pylist(), keep)
    return AllocationRuns(problems=problems, action=action, **{n: t[keep] for n, t in texts.items()}, **numbers)


def _actions(actions: list[list[int]], keep: np.ndarray) -> np.ndarray:
    """(N, 2M) int8 where all have one length, else N arrays."""
    arrays = [np.array(actions[i], dtype=np.int8) for i in np.flatnonzero(keep)]
    if len({len(a) for a in arrays}) == 1:
        return np.stack(arrays)
    ragged = np.empty(len(arrays), dtype=object)
    ragged[:] = arrays
    return ragged


def _read(path: Path) -> tuple[Any, dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    if not path.is_file():
        raise DataError(f"there is no file {str(path)!r}; benchmarks/surrogate_runs.py makes one.")
    try:
        table = pyarrow.parquet.read_table(path)
        about = json.loads((table.schema.metadata or {}).get(_KEY, b"{}"))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{str(path)!r} cannot be read as Parquet: {error}; make it with "
                        "benchmarks/surrogate_runs.py.") from error
    found = about.get("format"), about.get("version")
    if found != (FORMAT, VERSION) or any(name not in table.column_names for name in COLUMNS):
        raise DataError(f"{str(path)!r} is not a file of logged runs of version {VERSION} (format and version "
                        f"{found}, columns {table.column_names}); make it with benchmarks/surrogate_runs.py.")
    return table, about


def write_allocations(path: str | Path, runs: Sequence[Mapping[str, Any]], problems: Sequence[Problem]) -> None:
    """Write logged runs to one Parquet file; settings and matrices go into its schema's metadata as JSON.

    Args:
        path: Where to.
        runs: One mapping a run, with a value for each of `COLUMNS`.
        problems: The problem of every (task, placement) in `runs`.

    Raises:
        DataError: No runs, or runs of a problem that is not given.
    """
    import pyarrow
    import pyarrow.parquet

    known = {(problem.task, problem.placement): problem for problem in problems}
    missing = {(run["task"], run["placement"]) for run in runs} - set(known)
    if missing or not runs:
        raise DataError(f"there must be runs, and a problem for each of them (got {len(runs)} runs, without a problem: "
                        f"{sorted(missing)}).")
    lengths = {len(run["action"]) for run in runs}
    action = pyarrow.list_(pyarrow.int8(), *(lengths if len(lengths) == 1 else ()))
    kinds = {"task": pyarrow.string(), "placement": pyarrow.string(), "kind": pyarrow.string(), "action": action,
             "loss_before": pyarrow.float64(), "loss": pyarrow.float64(), "score": pyarrow.float64()}
    about = {"format": FORMAT, "version": VERSION, "problems": [problem.as_json() for problem in known.values()]}
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.int64())) for name in COLUMNS],
                            metadata={_KEY: json.dumps(about).encode()})
    columns = {name: [run[name] for run in runs] for name in COLUMNS}
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=schema), path, compression="zstd")
