"""The runs of a sweep on disk: ``runs.jsonl``, one JSON document a line, only ever added to.

Lines are written whole before the next runs begin, so a process that is killed loses what was running and nothing
else. A line that was cut off by a crash is left alone and not counted.
"""

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lelora_env.errors import LeLoRAError
from lelora_env.runs import to_json

logger = logging.getLogger(__name__)

FINISHED, DIVERGED, CRASHED = "finished", "diverged", "crashed"
FORMAT = 1


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("format"), int):
        return None
    named = all(isinstance(record.get(name), str) for name in ("key", "status"))
    return record if named or record["format"] > FORMAT else None


class RunStore:
    """The lines of one sweep. One process at a time: a second one would make the same runs again."""

    def __init__(self, folder: Path) -> None:
        """Use a folder; it is made by the first line."""
        self.folder = folder
        self.path = folder / "runs.jsonl"

    def records(self) -> list[dict[str, Any]]:
        """The last word on every run, in the order in which runs first appeared.

        Raises:
            LeLoRAError: The file was written by a newer version.
        """
        if not self.path.exists():
            return []
        found: dict[str, dict[str, Any]] = {}
        broken = 0
        try:
            raw = self.path.read_bytes()
        except OSError as error:
            raise LeLoRAError(f"cannot read {self.path}: {error.strerror or error}") from error
        for line in raw.split(b"\n"):
            if not line.strip():
                continue
            record = _parsed(line)
            if record is None:
                broken += 1
            elif record["format"] > FORMAT:
                raise LeLoRAError(f"{self.path} was written by a newer version of this package; update it")
            elif record["status"] != CRASHED or record["key"] not in found:
                found[record["key"]] = record  # a crash never takes the place of a result
        if broken:
            logger.warning("%s: %d broken lines are not counted", self.path, broken)
        return list(found.values())

    def done(self) -> set[str]:
        """Keys of the runs that need not be made again: crashed ones do."""
        return {record["key"] for record in self.records() if record["status"] != CRASHED}

    def _ends_whole(self) -> bool:
        """Whether the file is empty, or its last line was written to its end."""
        if not self.path.stat().st_size:
            return True
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records and see them to the disk.

        Raises:
            LeLoRAError: The folder cannot be written to.
        """
        text = "".join(to_json({"format": FORMAT, **record}) + "\n" for record in records)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write((text if self._ends_whole() else "\n" + text).encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise LeLoRAError(f"cannot write {self.path}: {error.strerror or error}") from error
