"""Decompositions on disk: a model is decomposed once, whatever is trained on it afterwards.

An entry is a folder named by its key, with ``spectrum.safetensors`` and ``entry.json``. The key is a hash of the
weights' bytes, shape and type, of the wanted components, the method, the version of torch and the kind of device. What
is read has the bits that were written (a decomposition made anew on other hardware may differ in the last ones).
Entries appear whole or not at all (one rename), so several processes may use and fill one folder. A damaged entry
is thrown away and made anew. Without a folder that can be written to, everything works, only slower.

Set by the environment: ``LELORA_CACHE``, the folder, or ``off`` (default: ``lelora_env`` in the user's cache folder);
``LELORA_CACHE_GB``, how much it may hold (default 10): what was used last stays.

Shapes: G matrices of one shape · K components · O/I out/in dim.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Sequence
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

KEY_LENGTH = 32
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


OFF = ("off", "0", "none", "false", "no", "disabled")


def cache_folder() -> Path | None:
    """Where entries lie; ``None`` where the cache is off, or where no home folder can be found."""
    named = os.environ.get("LELORA_CACHE", "").strip()
    if named.lower() in OFF:
        return None
    try:
        if named:
            return Path(named).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lelora_env"
    except RuntimeError as error:  # no such user, no home
        logger.warning("decompositions are not kept: %s Set LELORA_CACHE to a folder, or to off.", error)
        return None


def size_limit() -> int:
    """How many bytes the folder may hold.

    Raises:
        LeLoRAError: ``LELORA_CACHE_GB`` is not a number of at least 0.
    """
    text = os.environ.get("LELORA_CACHE_GB", "").strip() or str(DEFAULT_GB)
    try:
        return to_bytes(float(text))
    except ValueError:
        raise LeLoRAError(f"LELORA_CACHE_GB must be a number of gigabytes of at least 0 (got {text!r})") from None


def to_bytes(gigabytes: float) -> int:
    """Gigabytes (10^9 bytes) as bytes.

    Raises:
        LeLoRAError: Not a finite number of at least 0.
    """
    if not 0 <= gigabytes < math.inf:
        raise LeLoRAError(f"a size must be a number of gigabytes of at least 0 (got {gigabytes!r})")
    return int(gigabytes * 1e9)


def decompose_once(
    weights: Tensor, components: Sequence[int], *, names: Sequence[str], on_done: Callable[[int], object] | None = None,
    used: set[Path] | None = None,
) -> Decomposition:
    """`lelora_env.spectra.decompose` through the cache; singular values float64, vectors float32.

    Args:
        weights: (G, O, I).
        components: (K,) wanted components, the same for all.
        names: Names of the matrices, for messages and listings.
        on_done: Called with the number of matrices that are done since the last call.
        used: Entries of the same model, which are not removed for this one; it joins them.

    Raises:
        ModelError: A weight holds NaN or infinity.
        LeLoRAError: ``LELORA_CACHE_GB`` is not a number.
    """
    count, out, into = weights.shape
    worth_keeping = float(count) * out * into * min(out, into) >= SMALLEST_WORK
    folder = cache_folder() if worth_keeping else None
    if folder is None:
        return _decompose(weights, components, names, on_done)
    path = folder / entry_key(weights, components)
    used = set() if used is None else used
    used.add(path)
    found = load(path, weights.device)
    if found is None:
        found, limit = _decompose(weights, components, names, on_done), size_limit()
        if limit:
            store(path, found, names, (out, into))
            prune(folder, limit, keep=used)
    elif on_done is not None:
        on_done(count)
    return found


def _decompose(
    weights: Tensor, components: Sequence[int], names: Sequence[str], on_done: Callable[[int], object] | None
) -> Decomposition:
    made = decompose(weights, components, names=names, dtype=torch.float64, on_done=on_done)
    return Decomposition(made.singular_values, made.U.float(), made.V.float(), made.components)


def entry_key(weights: Tensor, components: Sequence[int]) -> str:
    """The name of an entry: a hash of the weights (G, O, I), the components, the method and where it runs."""
    settings = [FORMAT, torch.__version__, weights.device.type, str(weights.dtype), list(weights.shape),
                list(components)]
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=KEY_LENGTH // 2)
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
    for _ in range(2):  # an entry that another process removes or renews in this moment is looked for once more
        if not path.is_dir():
            return None
        try:
            found = _read(path, device)
        except FileNotFoundError as error:
            reason: Exception = error
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = error
            break
        else:
            with contextlib.suppress(OSError):
                os.utime(path / _ABOUT)
            return found
    logger.warning("the cached decomposition %s cannot be used and is made anew: %s", path, reason)
    _remove(path)
    return None


def _read(path: Path, device: torch.device) -> Decomposition:
    from safetensors import SafetensorError
    from safetensors.torch import load as parse

    about = json.loads((path / _ABOUT).read_text(encoding="utf-8"))
    raw = (path / _DATA).read_bytes()
    if about["key"] != path.name or hashlib.sha256(raw).hexdigest() != about["sha256"]:
        raise ValueError("its numbers are not those that were written")
    try:
        tensors = parse(raw)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    return Decomposition(*(tensors[name].to(device) for name in ("singular_values", "U", "V", "components")))


def store(path: Path, made: Decomposition, names: Sequence[str], shape: tuple[int, int]) -> None:
    """Write an entry, whole or not at all. Where that fails, a log entry says why."""
    from safetensors.torch import save

    unfinished = path.parent / f"{_UNFINISHED}{uuid.uuid4().hex}"
    tensors = {"singular_values": made.singular_values, "U": made.U, "V": made.V, "components": made.components}
    raw = save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    about = {"format": FORMAT, "key": path.name, "torch": torch.__version__, "sha256": hashlib.sha256(raw).hexdigest(),
             "matrices": list(names), "shape": list(shape)}
    try:
        unfinished.mkdir(parents=True)
        (unfinished / _DATA).write_bytes(raw)
        (unfinished / _ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        unfinished.rename(path)
    except OSError as error:
        if not path.is_dir():  # otherwise another process was faster
            logger.warning("the decomposition is not kept in %s (see LELORA_CACHE): %s", path.parent, error)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def entries(folder: Path) -> list[Entry]:
    """All entries, most recently used first; of one whose description cannot be read, the matrices are not known."""
    found = []
    for path in folder.glob("[0-9a-f]" * KEY_LENGTH):
        with contextlib.suppress(OSError):
            size = sum(file.stat().st_size for file in path.iterdir())
            about = path / _ABOUT
            used = (about if about.exists() else path).stat().st_mtime
            found.append(Entry(path, size, used, *_described(about)))
    return sorted(found, key=lambda entry: -entry.used)


def _described(about: Path) -> tuple[tuple[str, ...], tuple[int, int]]:
    try:
        told: dict[str, Any] = json.loads(about.read_text(encoding="utf-8"))
        out, into = (int(number) for number in told["shape"])
        return tuple(str(name) for name in told["matrices"]), (out, into)
    except (OSError, ValueError, KeyError, TypeError):
        return (), (0, 0)


def prune(folder: Path, limit: int, keep: Collection[Path] = (), everything: bool = False) -> list[Entry]:
    """Keep what was used last and fits `limit` bytes; remove the rest, and what killed processes left half-made.

    Args:
        folder: The cache's folder.
        limit: Bytes that may stay.
        keep: Entries that stay in any case.
        everything: Half-made entries go however young they are.

    Returns:
        The entries that were removed.
    """
    for rest in folder.glob(f"{_UNFINISHED}*"):
        with contextlib.suppress(OSError):
            if everything or time.time() - rest.lstat().st_mtime > ABANDONED_AFTER:
                _delete(rest)
    total, removed, listed = 0, [], entries(folder)
    for entry in listed:
        total += entry.size
        if total > limit and entry.path not in keep:
            _remove(entry.path)
            removed.append(entry)
    kept = sum(entry.size for entry in listed if entry.path in keep)
    if kept > limit:
        logger.warning("the decompositions of this model take %.2f GB, more than LELORA_CACHE_GB allows: they will be "
                       "removed for the next model", kept / 1e9)
    return removed


def _remove(path: Path) -> None:
    """Take an entry out of sight in one rename, then delete it; where that is not allowed, it stays."""
    aside = path.parent / f"{_UNFINISHED}{uuid.uuid4().hex}"
    with contextlib.suppress(OSError):
        path.rename(aside)
        _delete(aside)


def _delete(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
