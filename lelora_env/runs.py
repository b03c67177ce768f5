"""The folder that a run leaves behind; `lelora_env.records` reads it back.

A run folder holds plain files that stay readable whatever happens to the process::

    run.json           status, seed, command, versions, commit, hardware, times; replaced atomically, or
                       on a full disk written over in the room that its first version keeps free
    config.json        every setting, resolved
    matrices.json      the matrices in the order of the allocation's columns
    metrics.jsonl      one line per env step and lane, flushed at once
    allocation.jsonl   one action per env step and lane: with the seed, enough to step the run again
    events/<lane>/     the same numbers as TensorBoard events
    result.json        the closing table
    allocation.png     the allocation over time;  adapter.safetensors + adapter.json: what was learnt

Shapes: T env steps · M matrices.
"""

import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TextIO

import numpy as np

from lelora_env.errors import LeLoRAError
from lelora_env.export import write_atomically
from lelora_env.matrices import MatrixInfo

Status = Literal["running", "finished", "interrupted", "failed"]

FORMAT = 1
"""Version of the folder's layout, in run.json."""

_SPARE = 4096
"""Bytes that run.json keeps free while the run goes on, so that a full disk does not hide how it ended."""

_ERROR_LENGTH = 500
"""Longest error message in run.json, in characters: at most 6 bytes each as JSON, which fits `_SPARE`."""

_PACKAGES = ("lelora-env", "torch", "gymnasium", "stable-baselines3", "transformers", "datasets", "numpy")


def to_json(value: object, *, indent: int | None = None) -> str:
    """JSON text of plain values, NumPy numbers and arrays; what is not finite becomes ``null``."""
    return json.dumps(_plain(value), indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(value: object) -> object:
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, str | bool | int) else str(value)


def environment_facts() -> dict[str, Any]:
    """Versions, commit and hardware: what one needs to know to judge or repeat a run."""
    import torch

    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    cuda = torch.cuda.is_available()
    hardware = {
        "machine": platform.machine(), "system": f"{platform.system()} {platform.release()}",
        "cpu_count": os.cpu_count(), "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }
    return {"versions": versions, "commit": _commit(), "hardware": hardware}


def _commit() -> str | None:
    """Commit of the checkout that this package runs from, with ``+changes`` if it was edited."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        call = ["git", "-C", str(root), *arguments]
        return subprocess.run(call, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def check_writable(path: Path) -> None:
    """Make sure, before any work, that a run folder can be made at ``path``; leave nothing behind.

    Raises:
        LeLoRAError: It exists and is not an empty folder, or cannot be written to.
    """
    missing: list[Path] = []
    try:
        if path.is_file():
            raise LeLoRAError(f"the run folder {path} is a file. Give another path with --out.")
        if path.is_dir() and any(path.iterdir()):
            raise LeLoRAError(f"the run folder {path} is not empty, and a run never overwrites another. "
                              "Give a new path with --out, or remove the folder first.")
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise LeLoRAError(f"the run folder {path} cannot be written to ({error.strerror or error}). "
                          "Give a path that you may write to with --out.") from error
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


def default_folder(task: str, agent: str, base: Path = Path("runs")) -> Path:
    """A new path such as ``runs/2026-03-01_12-30-05_docstrings_reinforce``."""
    slug = re.sub(r"[^\w.]+", "-", task)[-40:]
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{slug}_{agent}"
    path = base / name
    return next(p for p in (path, *(base / f"{name}_{i}" for i in range(2, 10_000))) if not p.exists())


class EventFile:
    """TensorBoard scalars of one lane, without the writer's thread.

    They repeat metrics.jsonl, so what cannot be written is left out without a word.
    """

    def __init__(self, folder: Path) -> None:
        """Open a new event file in `folder`, which is made when missing."""
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event: Any = event_pb2.Event
        self._records: Any = None
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{time.time():.0f}.{platform.node()}.{os.getpid()}"
            self._records = RecordWriter((folder / name).open("wb"))
        self._add(file_version="brain.Event:2")

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Write the finite ones of `values` for env step `step`."""
        finite = [{"tag": tag, "simple_value": value} for tag, value in values.items() if math.isfinite(value)]
        self._add(step=step, summary={"value": finite})

    def _add(self, **fields: Any) -> None:
        if self._records is None:
            return
        try:
            self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
            self._records.flush()
        except OSError:
            self.close()

    def close(self) -> None:
        """Write nothing more."""
        records, self._records = self._records, None
        with suppress(OSError):
            if records is not None:
                records.close()


class RunFolder:
    """Writes a run folder; a context manager that records how the run ended.

    Leaving the block normally says ``finished``, leaving it by Ctrl-C ``interrupted``, by any other
    exception ``failed`` with its message.

    Args:
        path: The folder; must not exist or be empty.
        config: Every setting, resolved, as plain values; must hold ``rank_set`` and ``locations``.
        matrices: The M matrices in the order of the actions.
        lanes: Names of the lanes that will be logged.
        seed: The run's seed.

    Raises:
        LeLoRAError: The folder is not empty or cannot be written to.
    """

    def __init__(self, path: Path, *, config: Mapping[str, Any], matrices: Sequence[MatrixInfo],
                 lanes: Sequence[str], seed: int) -> None:
        check_writable(path)
        facts = environment_facts()
        self.path = path
        self._started = time.monotonic()
        self._events: dict[str, EventFile] = {}
        self._streams: dict[str, TextIO] = {}
        self._run: dict[str, Any] = {
            "format": FORMAT, "status": "running", "seed": seed, "lanes": list(lanes), "command": sys.argv,
            "host": platform.node(), "pid": os.getpid(),
            "started": datetime.now(UTC).isoformat(timespec="seconds"), **facts,
        }
        try:
            self._set()
            self.write_json("config.json", config)
            self.write_json("matrices.json", [asdict(matrix) for matrix in matrices])
            for name in ("metrics.jsonl", "allocation.jsonl", "policy.jsonl"):
                self._streams[name] = (path / name).open("a", encoding="utf-8")
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise

    def write_json(self, name: str, value: object) -> None:
        """Write one JSON file of the folder, atomically."""
        text = to_json(value, indent=2) + "\n"
        write_atomically(self.path / name, lambda path: path.write_text(text, encoding="utf-8"))

    def log(self, lane: str, env_step: int, metrics: Mapping[str, float]) -> None:
        """Append one line of metrics and write the same numbers for TensorBoard.

        Raises:
            LeLoRAError: The line cannot be written, for instance because the disk is full.
        """
        self._append("metrics.jsonl", {"lane": lane, "env_step": env_step, **metrics})
        if lane not in self._events:
            self._events[lane] = EventFile(self.path / "events" / lane)
        self._events[lane].add(env_step, metrics)

    def log_action(self, lane: str, env_step: int, action: np.ndarray, executed_rank: np.ndarray | None = None) -> None:
        """Append one flat action (2M,): the one that led to ``env_step``.

        Args:
            lane: Who chose it.
            env_step: Number of the env step, from 1.
            action: Rank index and location index of each matrix, interleaved.
            executed_rank: (M,) ranks that were trained, where they may differ from the chosen ones.

        Raises:
            LeLoRAError: The line cannot be written.
        """
        executed = {} if executed_rank is None else {"executed_rank": executed_rank}
        self._append("allocation.jsonl", {"lane": lane, "env_step": env_step, "action": action, **executed})

    def log_policy(self, lane: str, env_step: int, probabilities: np.ndarray) -> None:
        """Append how likely every choice was, (M, R, S), when the action that led to ``env_step`` was drawn.

        Each matrix becomes one list of R·S numbers, the locations of a rank side by side, to 5 digits behind the point.

        Raises:
            LeLoRAError: The line cannot be written.
        """
        rows = np.round(probabilities.astype(np.float64), 5).reshape(len(probabilities), -1)
        self._append("policy.jsonl", {"lane": lane, "env_step": env_step, "probabilities": rows})

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        try:
            self._streams[name].write(to_json(line) + "\n")
            self._streams[name].flush()
        except OSError as error:
            raise LeLoRAError(f"cannot write {self.path / name}: {error.strerror or error}. What was reached stays "
                              "readable there; make space, and give a new path with --out.") from error

    def _set(self, **changes: Any) -> None:
        """Replace run.json; if there is no room for a second file, write over the first."""
        self._run.update(changes)
        data = to_json(self._run, indent=2).encode("utf-8", "backslashreplace")
        path, spare = self.path / "run.json", _SPARE if self._run["status"] == "running" else 0
        try:
            write_atomically(path, lambda new: new.write_bytes(data + b" " * spare + b"\n"))
        except LeLoRAError:
            if not path.exists() or len(data) >= path.stat().st_size:
                raise
            with path.open("r+b") as stream:
                stream.write(data.ljust(path.stat().st_size - 1) + b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        status: Status = "finished"
        if kind is not None:
            status = "interrupted" if issubclass(kind, KeyboardInterrupt) else "failed"
        message = f"{kind.__name__}: {error}"[:_ERROR_LENGTH] if kind is not None and status == "failed" else None
        ended = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            self._set(status=status, error=message, ended=ended, seconds=round(time.monotonic() - self._started, 3))
        except (LeLoRAError, OSError):
            if kind is None:
                raise
        finally:
            for events in self._events.values():
                events.close()
            for stream in self._streams.values():
                with suppress(OSError):
                    stream.close()
