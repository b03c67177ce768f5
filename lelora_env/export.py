"""From a finished lane to weights: merge into a plain model, save and load the adapter.

Files are safetensors plus JSON, written atomically; reading them runs no code.
"""

import contextlib
import json
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lelora_env.adapter import share_tensors
from lelora_env.errors import LeLoRAError, ModelError
from lelora_env.finetune import FineTuner
from lelora_env.spectrum import factors

if TYPE_CHECKING:
    from lelora_env.vector_env import LeLoRAVectorEnv

FORMAT = "lelora-adapter"
FORMAT_VERSION = 1


@torch.no_grad()
def merged_weights(tuner: FineTuner, lane: int = 0) -> dict[str, Tensor]:
    """Everything that training changed, as plain weights by parameter name, in fp32.

    Args:
        tuner: The fine-tuning process.
        lane: Which lane.

    Returns:
        ``<matrix>.weight`` in the module's own orientation, and the heads' weights and biases.
    """
    base, weights = tuner.base, {}
    rows = {name: p.detach()[lane] for name, p in tuner.bank.rows.items()}
    for group, residual in zip(base.spectrum.layout.groups, base.spectrum.residual, strict=True):
        left, right = factors(rows, group, base.spectrum.scale)
        for i, index in enumerate(group.matrices):
            matrix = base.matrices[index]
            weight = residual[i].float() + left[i].T @ right[i]
            weights[f"{matrix.name}.weight"] = weight.T.contiguous() if matrix.transposed else weight
    for name, head in tuner.lane_model.heads.items():
        weights[f"{name}.weight"] = head.weight.detach()[lane].clone()
        if head.bias is not None:
            weights[f"{name}.bias"] = head.bias.detach()[lane].clone()
    return weights


def merged_model(tuner: FineTuner, lane: int = 0) -> nn.Module:
    """The lane's model with plain layers, ready for ``save_pretrained`` or ``generate``.

    Untouched weights are shared with the environment, merged ones are its own; in the frozen
    model's type.
    """
    model = share_tensors(tuner.base.model)
    for name, weight in merged_weights(tuner, lane).items():
        module, _, attribute = name.rpartition(".")
        owner = model.get_submodule(module)
        kind = tuner.base.spectrum.residual[0].dtype
        setattr(owner, attribute, nn.Parameter(weight.to(kind), requires_grad=False))
    return model


def write_atomically(path: Path, write: Any) -> None:
    """Let ``write(temporary path)`` make a file and move it into place whole.

    Raises:
        LeLoRAError: The folder cannot be written to, or the disk is full; nothing is left behind.
    """
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        raise LeLoRAError(f"cannot write {path}: {error.strerror or error}. Choose a folder with space that you may "
                          "write to.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_adapter(env: "LeLoRAVectorEnv", folder: str | Path, lane: int = 0) -> Path:
    """Save a lane's trained components and head: ``adapter.safetensors`` and ``adapter.json``.

    Args:
        env: The environment.
        folder: Where to write; made when missing.
        lane: Which lane.

    Raises:
        LeLoRAError: The folder cannot be written to.
    """
    from safetensors.torch import save

    tuner, folder = env.tuner, Path(folder)
    tensors = {f"rows.{n}": p.detach()[lane].cpu().contiguous() for n, p in tuner.bank.rows.items()}
    about = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "adapter": asdict(env.adapter_config),
        "matrices": [asdict(m) for m in env.matrices],
        "model": env.source.path or type(env.source.module).__name__,
        "task": env.task.name,
        "structure": tuner.base.spectrum.structure,
        "probe": tuner.base.spectrum.probe.cpu().tolist(),
    }
    write_atomically(folder / "adapter.safetensors", lambda path: path.write_bytes(save(tensors)))
    write_atomically(folder / "adapter.json", lambda path: path.write_text(json.dumps(about, indent=2) + "\n"))
    return folder / "adapter.safetensors"


def load_adapter(env: "LeLoRAVectorEnv", folder: str | Path, lane: int = 0) -> None:
    """Put saved components and head into a lane of an environment on the same model.

    Raises:
        LeLoRAError: No adapter there, a damaged file, a newer version, or another model or bank.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        about = json.loads((folder / "adapter.json").read_text())
        tensors = load_file(folder / "adapter.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise LeLoRAError(f"no readable adapter in {folder}: {error}. It needs adapter.json and adapter.safetensors as "
                          "save_adapter writes them.") from error
    try:
        rows = _checked_rows(about, tensors, env)
    except (AttributeError, KeyError, TypeError) as error:
        raise LeLoRAError(f"no readable adapter in {folder}: adapter.json lacks or garbles {error}.") from error
    env.put_rows(rows, lane)


def _checked_rows(about: Mapping[str, Any], tensors: dict[str, Tensor], env: "LeLoRAVectorEnv") -> dict[str, Tensor]:
    version = about.get("version")
    if about.get("format") != FORMAT or not isinstance(version, int) or version > FORMAT_VERSION:
        raise LeLoRAError(f"not an adapter this version reads (format {about.get('format')!r}, version {version!r}; "
                          f"expected {FORMAT!r} up to {FORMAT_VERSION}). Update the package.")
    rows = {}
    for name, parameter in env.tuner.bank.rows.items():
        found = tensors.get(f"rows.{name}")
        if found is None or found.shape != parameter.shape[1:]:
            raise ModelError("the adapter was trained with another model, rank_set, locations, parametrisation or "
                             "head.")
        if not found.isfinite().all():
            raise ModelError("the adapter holds numbers that are not finite.")
        rows[name] = found
    if not env.tuner.base.spectrum.same_as(about["structure"], torch.tensor(about["probe"])):
        raise ModelError("the adapter was trained with another model, locations or parametrisation, or on other "
                         "pretrained weights than this model has.")
    return rows
