"""What agents leave behind: a policy (one safetensors file) and a frozen allocation (JSON). No code in either.

Shapes: M matrices.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from agents.agent import Agent, Array
from agents.knapsack import best_choices
from agents.options import annotations_of
from agents.policy import PerMatrixPolicy
from agents.spec import AgentSpec, one_hot
from lelora_env.errors import LeLoRAError

FORMAT = 1
"""Version of both formats."""

_HEADER = "lelora_policy"
_NETWORK = tuple(name for name in annotations_of(PerMatrixPolicy) if name not in ("spec", "seed"))


def save_policy(
    policy: PerMatrixPolicy, spec: AgentSpec, path: str | Path, about: Mapping[str, Any] | None = None
) -> None:
    """Write a policy, atomically: weights as tensors, everything else as JSON in the file's header.

    Args:
        policy: The network.
        spec: What it was made for.
        path: Where to; replaced if it exists.
        about: Further plain values to keep, such as how it was trained.

    Raises:
        LeLoRAError: The file cannot be written.
    """
    from safetensors.torch import save_file

    header = {"format": FORMAT, "network": policy.settings, "made_for": _made_for(spec), "about": dict(about or {})}
    weights = {name: value.detach().cpu().contiguous() for name, value in policy.state_dict().items()}
    _replace(Path(path), lambda new: save_file(weights, new, {_HEADER: json.dumps(header)}))


def load_policy(path: str | Path, spec: AgentSpec) -> PerMatrixPolicy:
    """Read a policy for use in another environment: any number of matrices, any model with the same choices.

    Raises:
        LeLoRAError: Not a policy file, a damaged or newer one, or one for other choices or features.
    """
    header, weights = _read(Path(path))
    here = _made_for(spec)
    made, settings = _part(path, header, "made_for", here), _part(path, header, "network", _NETWORK)
    reads = [] if settings["columns"] is None else list(settings["columns"])
    spectrum = ["spectrum_points"] if any(str(name).startswith("sv_") for name in reads) else []
    for name in ("rank_set", "locations", "scaled", *spectrum):
        if made[name] != here[name]:
            raise LeLoRAError(f"{path} holds a policy for {name} = {made[name]!r}, the environment has {here[name]!r}: "
                              "make the environment with the same rank_set, locations and observation options")
    if settings["layer_as"] == "embedding" and settings["embedding"] and made["layers"] != here["layers"]:
        raise LeLoRAError(f"{path} holds a policy that knows layers by number, {made['layers']} of them; the model has "
                          f"{here['layers']}. Only policies trained with layer_as='depth' can be used on other depths")
    try:
        policy = PerMatrixPolicy(spec, **settings)
        policy.load_state_dict(weights)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise LeLoRAError(f"{path} is not whole: {' '.join(str(error).split())}") from None
    return policy


def _made_for(spec: AgentSpec) -> dict[str, Any]:
    low = spec.observation_space.low[0, spec.feature_names.index("norm")] if "norm" in spec.feature_names else 0.0
    first, last = spec.index_ranges.get("layer", (0, 0))
    return {"rank_set": list(spec.rank_set), "locations": list(spec.locations), "scaled": bool(low < 0),
            "spectrum_points": sum(name.startswith("sv_") for name in spec.feature_names), "layers": last - first + 1}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "null"))
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise LeLoRAError(f"there is no policy file {path}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise LeLoRAError(f"{path} is not a policy file, or damaged ({error})") from None
    if not isinstance(header, dict):
        raise LeLoRAError(f"{path} is a safetensors file, but not of a policy. `lelora train` writes "
                          "policy.safetensors")
    if header.get("format") != FORMAT:
        raise LeLoRAError(f"{path} has policy format {header.get('format')!r}; this version reads {FORMAT}")
    return header, weights


def _part(path: str | Path, header: Mapping[str, Any], name: str, keys: Iterable[str]) -> dict[str, Any]:
    """These keys of a part of the header.

    Raises:
        LeLoRAError: One is missing.
    """
    held = header.get(name)
    lacking = [key for key in keys if not isinstance(held, dict) or key not in held]
    if lacking:
        raise LeLoRAError(f"{path} is not whole: its header lacks {', '.join(lacking)} in {name!r}")
    return {key: header[name][key] for key in keys}


def save_allocation(spec: AgentSpec, action: Array, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
    """Write a frozen allocation, atomically: a rank and a location for every matrix by name.

    Args:
        spec: The environment's choices and matrices.
        action: (2M,) (rank index, location index) of each matrix.
        path: Where to; replaced if it exists.
        about: Further plain values to keep, such as how it was found and what that cost.

    Raises:
        LeLoRAError: The file cannot be written.
    """
    pairs = action.reshape(-1, 2)
    rows = [{"name": m.name, "type": m.type, "layer": m.layer, "rank": spec.rank_set[rank],
             "location": spec.locations[place]} for m, (rank, place) in zip(spec.matrices, pairs.tolist(), strict=True)]
    whole = {"format": FORMAT, "matrices": rows, "trained_parameters": spec.trained_parameters(action),
             **dict(about or {})}
    text = json.dumps(whole, indent=1)
    _replace(Path(path), lambda new: new.write_text(text + "\n", encoding="utf-8"))


def load_allocation(path: str | Path, spec: AgentSpec) -> list[tuple[int, str]]:
    """Read a frozen allocation as one (rank, location) a matrix, in the environment's order.

    Raises:
        LeLoRAError: Not an allocation file, a newer one, or one for other matrices.
    """
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8"))
        if held["format"] != FORMAT:
            raise LeLoRAError(f"{path} has allocation format {held['format']!r}; this version reads {FORMAT}")
        rows = {row["name"]: (row["rank"], row["location"]) for row in held["matrices"]}
    except LeLoRAError:
        raise
    except FileNotFoundError:
        raise LeLoRAError(f"there is no allocation file {path}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LeLoRAError(f"{path} is not an allocation file, or damaged ({type(error).__name__}: {error}). `lelora "
                          "search` writes allocation.json") from None
    names = [matrix.name for matrix in spec.matrices]
    missing = [name for name in names if name not in rows]
    if missing or len(rows) != len(names):
        raise LeLoRAError(f"{path} allots to {len(rows)} matrices, the environment has {len(names)}"
                          + (f", among them {missing[0]!r}, which is not in the file" if missing else "")
                          + ": use the model and the target_modules that it was found with")
    return [rows[name] for name in names]


def final_allocation(agent: Agent, observation: Array, spec: AgentSpec, budget: float | None = None) -> Array:
    """The one allocation that an agent stands for after learning, (2M,) int64.

    Its own ``allocation()`` where it has that; else the likeliest of all that keep to the budget, by its
    ``probabilities``.

    Args:
        agent: The agent.
        observation: What it sees at the start of a run, (L, M, F); the first lane counts.
        spec: What can be chosen.
        budget: Share of what the largest ranks train, in (0, 1]; ``None`` = no limit.

    Raises:
        LeLoRAError: It has neither.
    """
    limit = None if budget is None else spec.limit(budget)
    if hasattr(agent, "allocation"):
        own = np.asarray(agent.allocation(), dtype=np.int64)
        return own if limit is None else best_choices(one_hot(own[None], spec).astype(np.float64), spec, limit)[0]
    if not hasattr(agent, "probabilities"):
        raise LeLoRAError(f"{type(agent).__name__} has neither allocation() nor probabilities(observation), so no "
                          "single allocation can be read from it")
    likely = np.log(np.maximum(agent.probabilities(observation[:1]), 1e-9))  # (1, M, R, S)
    best: Array = best_choices(likely, spec, limit)[0]
    return best


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place, then move it there; nothing is left beside it, whatever happens."""
    from safetensors import SafetensorError

    new = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(new)
        new.chmod(0o644)  # safetensors makes files that only their owner may read
        new.replace(path)
    except (OSError, SafetensorError) as error:
        raise LeLoRAError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}. Choose a folder that "
                          "exists, has space, and that you may write to") from None
    finally:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)

