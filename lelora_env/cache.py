"""Decompositions on disk: a model is decomposed once, whatever is trained on it afterwards.

An entry is a folder named by its key, with ``spectrum.safetensors`` and ``entry.json``. The key is a hash of the
weights' bytes, shape and type, of the wanted components, and of everything else that decides the last bits
(method, version of torch, kind of device); a run that finds an entry computes the same bits as the run that made it.
Entries appear whole or not at all (one rename), so several processes may use and fill one folder. A damaged entry
is thrown away and made anew. Without a folder that can be written to, everything works, only slower.

Set by the environment: ``LELORA_CACHE``, the folder, or ``off`` (default: ``lelora_env`` in the user's cache folder);
``LELORA_CACHE_GB``, how much it may hold (default 10): the entries that were not used for longest go first.

Shapes: G matrices of one shape · K components · O/I out/in dim.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lelora_env.errors import LeLoRAError
from lelora_env.spectra import Decomposition, decompose

logger = logging.getLogger(__name__)

FORMAT = 1
"""To be counted up whenever `decompose` gives other numbers or an entry looks different."""

SMALLEST_WORK = 1e8
"""Groups with less work than this, Σ O·I·min(O, I), take a fraction of a second: they are not kept."""

DEFAULT_GB = 10.0
ABANDONED_AFTER = 3600.0
"""Seconds after which a half-made entry counts as left behind by a process that was killed."""

_PIECE = 2**24
"""Bytes that come from a GPU at a time."""

_DATA, _ABOUT, _UNFINISHED = "spectrum.safetensors", "entry.json", ".unfinished-"


@dataclass(frozen=True)
class Entry:
    """One decomposition on disk.

    Attributes:
        path: Its folder.
        size: Bytes.
        used: When it was last read or written, seconds since the epoch.
        matrices: Names of the matrices, as in the model that made the entry.
        shape: (O, I) of each.
    """

    path: Path
    size: int
    used: float
    matrices: tuple[str, ...]
    shape: tuple[int, int]


def cache_folder() -> Path | None:
    """Where entries lie; ``None`` where the cache is off."""
    named = os.environ.get("LELORA_CACHE")
    if named is None or not named.strip():
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lelora_env"
    return None if named.strip().lower() == "off" else Path(named).expanduser()


def size_limit() -> int:
    """How many bytes the folder may hold.

    Raises:
        LeLoRAError: ``LELORA_CACHE_GB`` is not a number of at least 0.
    """
    text = os.environ.get("LELORA_CACHE_GB", "").strip() or str(DEFAULT_GB)
    try:
        return int(float(text) * 1e9) if float(text) >= 0 else _refuse(text)
    except (ValueError, OverflowError):
        return _refuse(text)


def _refuse(text: str) -> int:
    raise LeLoRAError(f"LELORA_CACHE_GB must be a number of gigabytes of at least 0 (got {text!r})") from None


def decompose_once(
    weights: Tensor, components: Sequence[int], *, names: Sequence[str], on_done: Callable[[int], object] | None = None
) -> Decomposition:
    """`lelora_env.spectra.decompose` through the cache; singular values float64, vectors float32.

    Args:
        weights: (G, O, I).
        components: (K,) wanted components, the same for all.
        names: Names of the matrices, for messages and listings.
        on_done: Called with the number of matrices that are done since the last call.

    Raises:
        ModelError: A weight holds NaN or infinity.
        LeLoRAError: ``LELORA_CACHE_GB`` is not a number.
    """
    folder, limit = cache_folder(), size_limit()
    count, out, into = weights.shape
    if folder is None or limit == 0 or float(count) * out * into * min(out, into) < SMALLEST_WORK:
        return _decompose(weights, components, names, on_done)
    path = folder / entry_key(weights, components)
    found = load(path, weights.device)
    if found is None:
        found = _decompose(weights, components, names, on_done)
        store(path, found, names, (out, into))
        prune(folder, limit, keep=path)
    elif on_done is not None:
        on_done(count)
    return found


def _decompose(
    weights: Tensor, components: Sequence[int], names: Sequence[str], on_done: Callable[[int], object] | None
) -> Decomposition:
    made = decompose(weights, components, names=names, dtype=torch.float64, on_done=on_done)
    return Decomposition(made.singular_values, made.U.float(), made.V.float(), made.components)


def entry_key(weights: Tensor, components: Sequence[int]) -> str:
    """The name of an entry: a hash of the weights (G, O, I) and of all that decides the result's bits."""
    settings = [FORMAT, torch.__version__, weights.device.type, str(weights.dtype), list(weights.shape),
                list(components)]
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing and copying let other threads run
        for part in pool.map(_hash, [weight.detach() for weight in weights]):
            digest.update(part)
    return digest.hexdigest()


def _hash(weight: Tensor) -> bytes:
    """A digest of one matrix's bytes, which come to the host in pieces of pinned memory."""
    raw, digest = weight.contiguous().view(torch.uint8).flatten(), hashlib.blake2b(digest_size=16)
    if not raw.is_cuda:
        digest.update(raw.cpu().numpy().data)
        return digest.digest()
    piece = torch.empty(min(_PIECE, len(raw)), dtype=torch.uint8, pin_memory=True)
    for part in raw.split(_PIECE):
        digest.update(piece[: len(part)].copy_(part).numpy().data)
    return digest.digest()


def load(path: Path, device: torch.device) -> Decomposition | None:
    """Read an entry; ``None`` where there is none. A damaged one is removed, with a log entry."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if not path.is_dir():
            return None
        about = json.loads((path / _ABOUT).read_text(encoding="utf-8"))
        with (path / _DATA).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != about["sha256"]:
            raise ValueError("its numbers are not those that were written")
        tensors = load_file(path / _DATA, device=str(device))
        found = Decomposition(*(tensors[name] for name in ("singular_values", "U", "V", "components")))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        logger.warning("the cached decomposition %s cannot be used and is made anew: %s", path, error)
        _remove(path)
        return None
    with contextlib.suppress(OSError):
        os.utime(path / _ABOUT)
    return found


def store(path: Path, made: Decomposition, names: Sequence[str], shape: tuple[int, int]) -> None:
    """Write an entry, whole or not at all; where that fails, a log entry says why."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    unfinished = path.parent / f"{_UNFINISHED}{uuid.uuid4().hex}"
    try:
        unfinished.mkdir(parents=True)
        tensors = {"singular_values": made.singular_values, "U": made.U, "V": made.V, "components": made.components}
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, unfinished / _DATA)
        with (unfinished / _DATA).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        about = {"format": FORMAT, "torch": torch.__version__, "sha256": digest, "matrices": list(names),
                 "shape": list(shape)}
        (unfinished / _ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        unfinished.rename(path)
    except (OSError, SafetensorError) as error:
        if not path.is_dir():  # otherwise another process was faster
            logger.warning("the decomposition is not kept in %s (see LELORA_CACHE): %s", path.parent, error)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def entries(folder: Path) -> list[Entry]:
    """All whole entries, most recently used first."""
    found = []
    for about in folder.glob(f"[0-9a-f]*/{_ABOUT}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            told: dict[str, Any] = json.loads(about.read_text(encoding="utf-8"))
            size = sum(file.stat().st_size for file in about.parent.iterdir())
            out, into = told["shape"]
            found.append(Entry(about.parent, size, about.stat().st_mtime, tuple(told["matrices"]), (out, into)))
    return sorted(found, key=lambda entry: -entry.used)


def prune(folder: Path, limit: int, keep: Path | None = None) -> list[Entry]:
    """Remove what was not used for longest until the rest fits `limit` bytes, and what killed processes left.

    Args:
        folder: The cache's folder.
        limit: Bytes that may stay.
        keep: An entry that stays in any case.

    Returns:
        The entries that were removed.
    """
    for rest in folder.glob(f"{_UNFINISHED}*"):
        with contextlib.suppress(OSError):
            if time.time() - rest.stat().st_mtime > ABANDONED_AFTER:
                shutil.rmtree(rest, ignore_errors=True)
    total, removed = 0, []
    for entry in entries(folder):
        total += entry.size
        if total > limit and entry.path != keep:
            _remove(entry.path)
            removed.append(entry)
            total -= entry.size
    return removed


def _remove(path: Path) -> None:
    """Take an entry out of sight in one rename, then delete it; where that is not allowed, it stays."""
    aside = path.parent / f"{_UNFINISHED}{uuid.uuid4().hex}"
    with contextlib.suppress(OSError):
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
