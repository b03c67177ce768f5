r"""Raw rows, from the Hugging Face hub or from local files, through one code path.

Everything goes through ``datasets.load_dataset``, which cuts JSONL at ``\n`` only: texts that hold
other Unicode line breaks (U+2028, U+0085, ...) stay whole.
"""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lelora_env.errors import DataError
from lelora_env.tasks.hints import set_option

Table = dict[str, list[Any]]
"""Columns by name, all of one length."""

READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".json": ("json", {}),
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".parquet": ("parquet", {}),
}
"""Readable file types: suffix → the builder of ``datasets`` and its options.

Without ``keep_default_na=False`` the texts "None", "NA" and "null" would be read as missing."""

TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("validation", "valid", "val", "dev", "eval", "test")


@dataclass(frozen=True)
class RawData:
    """The rows of a data set as they were found.

    Attributes:
        train: The training rows.
        eval: The official held-out rows; ``None`` where there are none.
        eval_name: The name of the split that `eval` is, such as ``"validation"``.
        where: Where the rows come from, for messages.
    """

    train: Table
    eval: Table | None
    eval_name: str
    where: str


def read_raw(
    data: str | Path,
    *,
    subset: str | None = None,
    train_split: str = "train",
    eval_splits: Sequence[str] = EVAL_NAMES,
) -> RawData:
    """Read a data set from local files or from the hub.

    Args:
        data: A file (JSONL, JSON, CSV, TSV or Parquet), a folder that holds ``train.*`` and, where
            there is one, ``validation.*``; or the name of a data set on the hub. What exists on
            disk wins.
        subset: The configuration of a hub data set, such as ``"sst2"`` of ``"nyu-mll/glue"``.
        train_split: The name of the training split on the hub.
        eval_splits: Names of the held-out split, best first.

    Raises:
        DataError: Missing, unreadable or empty data, or a hub that cannot be reached.
    """
    path = Path(data).expanduser()
    if path.is_dir():
        return _read_folder(path, eval_splits)
    if path.is_file():
        return RawData(_read_files([path]), None, "eval", str(path))
    if _looks_like_a_path(str(data)):
        raise DataError(f"no file or folder {str(data)!r}; expected one of {_suffixes()}, or a folder with train.* in "
                        f"it. The current folder is {str(Path.cwd())!r}")
    return _read_hub(str(data), subset, train_split, eval_splits)


def require_columns(table: Table, names: Iterable[str], where: str, option: str = "") -> None:
    """Check that a table has the columns `names`.

    Args:
        table: The table.
        names: The columns that it must have.
        where: Where the table comes from, for messages.
        option: The task's option that names one of them, where there is one.

    Raises:
        DataError: One is missing; the message lists what is there and suggests the closest.
    """
    for name in names:
        if name not in table:
            close = difflib.get_close_matches(name, table, n=1, cutoff=0.5)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            way_out = f"Name the right one: {set_option(option, close[0] if close else 'name')}" if option else (
                "Rename the columns, or name the right ones in the task's options")
            raise DataError(f"{where} has no column {name!r}.{hint} Its columns: {', '.join(sorted(table))}. {way_out}")


def select_rows(table: Table, rows: Iterable[int]) -> Table:
    """The rows of a table at the given positions, in that order."""
    index = [int(i) for i in rows]
    return {name: [column[i] for i in index] for name, column in table.items()}


def table_length(table: Table) -> int:
    """Number of rows."""
    return len(next(iter(table.values()), []))


def _suffixes() -> str:
    return ", ".join(READERS)


def _looks_like_a_path(name: str) -> bool:
    """Hub names are ``name`` or ``owner/name``; everything else was meant to be a path."""
    return (Path(name).suffix in READERS or name.startswith((".", "/", "~", "\\")) or name.endswith("/")
            or name.count("/") > 1 or "\\" in name)


def _read_folder(folder: Path, eval_splits: Sequence[str]) -> RawData:
    files = sorted(path for path in folder.iterdir() if path.suffix in READERS and path.is_file())
    train = _first_split(files, TRAIN_NAMES)
    held_out = _first_split(files, tuple(dict.fromkeys((*eval_splits, *EVAL_NAMES))))
    if not train and len(files) == 1:
        train, held_out = files, []
    if not train:
        found = ", ".join(path.name for path in files) or "no data files"
        raise DataError(f"folder {str(folder)!r} has no train.* file (found: {found}); expected train.* and, if there "
                        f"is one, validation.*, each one of {_suffixes()}")
    name = held_out[0].name.split(".")[0].split("-")[0] if held_out else "eval"
    return RawData(_read_files(train), _read_files(held_out) if held_out else None, name, str(folder))


def _first_split(files: Sequence[Path], names: Sequence[str]) -> list[Path]:
    """The files of the first name that has any: ``train.csv``, or shards ``train-00000-of-00002.parquet``."""
    for name in names:
        found = [path for path in files if path.stem == name or path.stem.startswith(f"{name}-")]
        if len({path.suffix for path in found}) > 1:
            raise DataError(f"several file types for the split {name!r}: {', '.join(path.name for path in found)}; "
                            "keep one of them, or name the file instead of the folder")
        if found:
            return found
    return []


def _read_files(files: Sequence[Path]) -> Table:
    where = ", ".join(str(path) for path in files)
    suffix = files[0].suffix
    if suffix not in READERS:
        raise DataError(f"cannot read {where!r}: expected one of {_suffixes()}")
    if not any(path.stat().st_size for path in files):
        raise DataError(f"{where!r} is empty; expected at least one row")
    builder, options = READERS[suffix]
    try:
        table = _load(builder, split="train", data_files=[str(path) for path in files], **options)
    except Exception as error:
        if "corresponds to no data" in str(error):  # a header and nothing below it
            raise DataError(f"{where!r} has no rows below its header; expected at least one") from error
        raise DataError(f"cannot read {where!r} as {builder}: {_root_cause(error)}. Every row needs the same columns, "
                        "and every column one type") from error
    return _not_empty(table, where)


def _read_hub(name: str, subset: str | None, train_split: str, eval_splits: Sequence[str]) -> RawData:
    where = f"{name} ({subset})" if subset else name
    try:
        from datasets import get_dataset_split_names

        known = get_dataset_split_names(name, subset) if subset else get_dataset_split_names(name)
        held_out = next((split for split in eval_splits if split in known), None)
        train = _load(name, *((subset,) if subset else ()), split=train_split)
        held = _load(name, *((subset,) if subset else ()), split=held_out) if held_out else None
    except Exception as error:
        raise DataError(
            f"cannot load the data set {where!r} from the Hugging Face hub: {_root_cause(error)}. Check the name and "
            "the network (HF_HUB_OFFLINE is obeyed), or give a local folder with train.* and validation.* in it, "
            "e.g. task='sst2:path/to/folder'"
        ) from error
    return RawData(_not_empty(train, where), held, held_out or "eval", where)


def _load(*args: Any, **options: Any) -> Table:
    import datasets

    with _quiet():
        loaded: Table = dict(datasets.load_dataset(*args, **options)[:])
    return {name: list(column) for name, column in loaded.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, and no log lines beside our own messages; the user's settings come back afterwards."""
    import datasets

    silent, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not silent:
            datasets.enable_progress_bars()


def _not_empty(table: Table, where: str) -> Table:
    if table_length(table) == 0:
        raise DataError(f"{where!r} has no rows; expected at least one")
    return table


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
