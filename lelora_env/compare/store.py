"""The runs of a sweep on disk: ``runs.jsonl``, one JSON document a line, only ever added to.

A line is written whole before the next run begins, so a process that is killed loses what was running and nothing
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


class RunStore:
    """The lines of one sweep."""

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
        for line in self.path.read_bytes().split(b"\n"):
            try:
                record = json.loads(line) if line.strip() else None
            except ValueError:
                broken += 1
                continue
            if record is None:
                continue
            if record.get("format", 0) > FORMAT:
                raise LeLoRAError(f"{self.path} was written by a newer version of this package; update it")
            found[record["key"]] = record
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
