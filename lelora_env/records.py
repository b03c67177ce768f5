"""Run folders read back: what each lane did, also of a run that is still being written or was cut off.

Shapes: T env steps · M matrices · R ranks · S locations · N logged steps.
"""

import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np

from lelora_env.errors import LeLoRAError
from lelora_env.matrices import MatrixInfo
from lelora_env.runs import FORMAT, Status


class LaneTrace:
    """What one lane did over a run.

    Attributes:
        name: The lane's name.
        ranks: (T, M) int: the rank that each matrix trained at in each env step.
        locations: (T, M) int: its location, as an index into the run's ``locations``.
        metrics: Lines of metrics.jsonl, ascending in ``env_step``; step 0 is the start.
        probabilities: Env steps (N,) int, and the probability of every choice when their actions were drawn,
            (N, M, R, S); N = 0 where nothing was noted.
    """

    def __init__(self, name: str, ranks: np.ndarray, locations: np.ndarray, metrics: list[dict[str, Any]],
                 probabilities: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        self.name, self.ranks, self.locations, self.metrics = name, ranks, locations, metrics
        nothing = np.zeros(0, dtype=np.int64), np.zeros((0, ranks.shape[1], 0, 0))
        self.probabilities = nothing if probabilities is None else probabilities

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Env steps and values of one metric, both (N,), for the lines that have it (NaN for null)."""
        found = [(line["env_step"], line[key]) for line in self.metrics if key in line]
        steps = np.array([step for step, _ in found], dtype=np.int64)
        return steps, np.array([math.nan if v is None else v for _, v in found], dtype=np.float64)


class RunRecord:
    """A run folder read back: also one that is still being written or was cut off.

    Attributes:
        path: The folder.
        info: run.json.
        config: config.json.
        matrices: The M matrices.
        lanes: What each lane did, in the run's order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info: dict[str, Any] = _read_json(path, "run.json")
        if self.info.get("format") != FORMAT:
            raise LeLoRAError(f"{path} has run-folder format {self.info.get('format')!r}; this version reads {FORMAT}. "
                              "Read it with the version of lelora-env that run.json names.")
        self.config: dict[str, Any] = _read_json(path, "config.json")
        self.matrices = [MatrixInfo(**matrix) for matrix in _read_json(path, "matrices.json")]
        metrics, actions, policies = (_by_lane(path / f"{name}.jsonl") for name in ("metrics", "allocation", "policy"))
        self.lanes = [self._trace(name, metrics.get(name, []), actions.get(name, []), policies.get(name, []))
                      for name in self.info["lanes"]]

    @property
    def status(self) -> Status:
        """How the run ended, or ``running``; a run of this host whose process is gone was ``interrupted``."""
        status: Status = self.info["status"]
        here = self.info.get("host") == platform.node()
        return "interrupted" if status == "running" and here and not _is_alive(self.info["pid"]) else status

    def _trace(self, name: str, metrics: list[dict[str, Any]], actions: list[dict[str, Any]],
               policies: list[dict[str, Any]]) -> LaneTrace:
        pairs = np.array([line["action"] for line in actions], dtype=np.int64)
        pairs = pairs.reshape(len(actions), len(self.matrices), 2)  # (T, M, 2)
        limits = np.array([min(m.out_features, m.in_features) for m in self.matrices], dtype=np.int64)  # (M,)
        chosen = np.minimum(np.array(self.config["rank_set"], dtype=np.int64)[pairs[..., 0]], limits)
        trained = [line.get("executed_rank", own) for line, own in zip(actions, chosen, strict=True)]
        ranks = np.array(trained, dtype=np.int64).reshape(chosen.shape)
        return LaneTrace(name, ranks, pairs[..., 1], metrics, self._policy(policies))

    def _policy(self, lines: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        shape = len(lines), len(self.matrices), len(self.config["rank_set"]), len(self.config["locations"])
        noted = np.array([line["probabilities"] for line in lines], dtype=np.float64)
        return np.array([line["env_step"] for line in lines], dtype=np.int64), noted.reshape(shape)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's process
    return True


def _read_json(folder: Path, name: str) -> Any:
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LeLoRAError(f"{folder} is not a run folder: it has no {name}. Give a folder that `lelora train` "
                          "wrote.") from None
    except json.JSONDecodeError as error:
        raise LeLoRAError(f"{folder / name} is damaged ({error}). Take the folder from a copy.") from error


def _by_lane(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of a JSONL file by lane, less a last one that was cut off while being written."""
    found: dict[str, list[dict[str, Any]]] = {}
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for line in map(json.loads, filter(None, text.split("\n")[:-1])):
        found.setdefault(line["lane"], []).append(line)
    return found
