"""Where a model comes from: a name, a folder, or a module handed in.

A name or folder is described from its config alone (on the meta device) until its weights are
needed; a module handed in is never copied, changed or trained.
"""

import copy
import inspect
import logging
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lelora_env.allocation import build_choice_table
from lelora_env.config import AdapterConfig, EnvConfig
from lelora_env.errors import ModelError
from lelora_env.loading import loading, location, longest_row, reads_forwards, resolve_name, without_quantisation
from lelora_env.matrices import MatrixInfo, find_matrices, head_modules
from lelora_env.reference import ByReference
from lelora_env.spectrum import Spectrum, WeightSource, build_layout, build_spectrum
from lelora_env.tasks.base import Head

logger = logging.getLogger(__name__)

AUTO_CLASSES: dict[Head, str] = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "none": "AutoModel",
}


@dataclass(eq=False)
class Base:
    """A frozen model, decomposed: everything that lanes and environments share.

    Attributes:
        model: The module tree with the frozen weights.
        matrices: The adapted matrices, in model order.
        spectrum: Bank start and residuals.
        heads: Names of the task-head layers.
        fresh_heads: Those of them that the checkpoint has no weights for: each lane draws its own.
        forward_options: Fixed keyword arguments of the model's ``forward``.
    """

    model: nn.Module
    matrices: list[MatrixInfo]
    spectrum: Spectrum
    heads: tuple[str, ...] = ()
    fresh_heads: frozenset[str] = frozenset()
    forward_options: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the frozen weights live."""
        return self.spectrum.scale.device


_BASES: "weakref.WeakValueDictionary[tuple[Any, ...], Base]" = weakref.WeakValueDictionary()
_MODULE_BASES: "weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], weakref.ref[Base]]]" = (
    weakref.WeakKeyDictionary()
)


class ModelSource:
    """One model, by name, folder or module, with its tokenizer; loads as late as it can."""

    def __init__(self, model: str | Path | nn.Module | ByReference, tokenizer: Any = None) -> None:
        """Describe where the model comes from; nothing is loaded yet.

        Args:
            model: Local folder, ``.gguf`` file, hub id, short name (``"minilm"``), or a module.
            tokenizer: Tokenizer, or the name or folder of one; default: the model's own.
        """
        value = model.value if isinstance(model, ByReference) else model
        if not isinstance(value, str | Path | nn.Module):
            raise ModelError(
                f"model must be a local folder, a hub id or an nn.Module; got {type(value).__name__}."
            )
        self.module = value if isinstance(value, nn.Module) else None
        self.path = "" if self.module is not None else resolve_name(str(value))
        self._tokenizer = tokenizer.value if isinstance(tokenizer, ByReference) else tokenizer
        self._config: Any = None

    @property
    def config(self) -> Any:
        """The transformers config; ``None`` for a plain module."""
        if self.module is not None:
            return getattr(self.module, "config", None)
        if self._config is None:
            from transformers import AutoConfig

            args, options = location(self.path)
            self._config = loading(self.path, lambda: AutoConfig.from_pretrained(*args, **options))
        return self._config

    def tokenizer(self) -> Any:
        """The tokenizer, with a pad token; ``None`` for a module that has none."""
        given = self._tokenizer
        if given is None or isinstance(given, str | Path):
            name = str(given or self.path or getattr(self.module, "name_or_path", ""))
            if not name:
                return None
            from transformers import AutoTokenizer

            args, options = location(resolve_name(name))
            given = self._tokenizer = loading(name, lambda: AutoTokenizer.from_pretrained(*args, **options))
        if getattr(given, "pad_token", None) is None and getattr(given, "eos_token", None) is not None:
            given.pad_token = given.eos_token
        longest = longest_row(self.config)
        if longest is not None and getattr(given, "model_max_length", 0) > longest:
            given = copy.copy(given)
            given.model_max_length = longest
        return given

    def pad_token_id(self) -> int | None:
        """For models whose config names no pad token (decoders as classifiers need one)."""
        tokenizer = self.tokenizer() if self.config is not None else None
        return getattr(tokenizer, "pad_token_id", None)

    def device(self, env: EnvConfig) -> str:
        """Where the frozen model lies or will lie: the module's device, else the one asked for, else the GPU."""
        if self.module is not None:
            return str(next((p.device for p in self.module.parameters()), "cpu"))
        return env.device or ("cuda" if torch.cuda.is_available() else "cpu")

    def describe(self, head: Head, num_labels: int, adapter: AdapterConfig) -> list[MatrixInfo]:
        """The matrices that would be adapted, from the config alone where the model is a path.

        Raises:
            ModelError: No such model, or no module matches.
            UnknownNameError: A target that no module answers to.
        """
        model = self.module
        if model is None:
            import transformers

            config = copy.deepcopy(self.config)
            if head == "sequence-classification":
                config.num_labels = num_labels
            auto = getattr(transformers, AUTO_CLASSES[head])
            with torch.device("meta"):
                model = loading(self.path, lambda: auto.from_config(config))
        return find_matrices(model, adapter.target_modules)

    def base(self, head: Head, num_labels: int, adapter: AdapterConfig, env: EnvConfig) -> Base:
        """Load and decompose the model, or hand out what another environment already has.

        A module that is trained or edited by its owner while an environment on it is open gives wrong
        numbers there; environments made afterwards see the new weights.

        Raises:
            ModelError: The model cannot be loaded, holds numbers that are not finite, or lies on
                another device than asked for.
        """
        if head == "causal-lm" and self.config is not None and not reads_forwards(self.config):
            raise ModelError(f"a {self.config.model_type!r} model's attention sees the answer that it is to predict; "
                             "this task needs a decoder (GPT-2, Llama, Qwen, ...).")
        key: tuple[Any, ...] = (head, num_labels, adapter, env.dtype, env.device)
        if self.module is not None:
            bases = _MODULE_BASES.setdefault(self.module, {})
            for stale in [k for k, base in bases.items() if base() is None]:
                del bases[stale]
            key = (*key, *(_weight_state(p) for p in self.module.parameters()))
            found = bases[key]() if key in bases else None
            if found is None:
                found = self._decompose_module(self.module, adapter, env)
                bases[key] = weakref.ref(found)
            return found
        key = (self.path, *key)
        found = _BASES.get(key)
        if found is None:
            found = _BASES[key] = self._load(head, num_labels, adapter, env)
        return found

    def _decompose_module(self, module: nn.Module, adapter: AdapterConfig, env: EnvConfig) -> Base:
        devices = {p.device for p in module.parameters()}
        if len(devices) != 1:
            raise ModelError(f"the module's weights lie on {len(devices)} devices; move it to one with .to(device).")
        device = devices.pop()
        if env.device is not None and not _same_device(env.device, device):
            raise ModelError(
                f"the module lies on {str(device)!r} but device={env.device!r} was asked for: move it with "
                f".to({env.device!r}) first, or leave device out."
            )
        if env.dtype is not None and next(module.parameters()).dtype != getattr(torch, env.dtype):
            raise ModelError(
                f"the module holds {next(module.parameters()).dtype}, but dtype={env.dtype!r} was asked for: "
                "convert it first, or leave dtype out."
            )
        return _decompose(module, adapter, owned=False, fresh=frozenset())

    def _load(self, head: Head, num_labels: int, adapter: AdapterConfig, env: EnvConfig) -> Base:
        import transformers

        args, options = location(self.path)
        if head == "sequence-classification":
            options["num_labels"] = num_labels
        auto = getattr(transformers, AUTO_CLASSES[head])
        dtype = getattr(torch, env.dtype or "float32")
        model, report = loading(
            self.path, lambda: auto.from_pretrained(*args, dtype=dtype, output_loading_info=True, **options)
        )
        if "gguf_file" in options:
            model = without_quantisation(model, auto, dtype)
        model = moved(model, self.device(env))
        fresh = {name.rpartition(".")[0] for name in report["missing_keys"]}
        fresh |= {key[0].rpartition(".")[0] for key in report.get("mismatched_keys", ())}
        missing = sorted(fresh - set(head_modules(model)))
        if missing:
            logger.warning("%s has no weights for %s: they are frozen at a fixed random draw", self.path,
                           ", ".join(missing))
        return _decompose(model, adapter, owned=True, fresh=frozenset(fresh))


def moved(model: nn.Module, device: str) -> nn.Module:
    """The model on a device.

    Raises:
        ModelError: There is no such device here, or not enough memory on it.
    """
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"cannot move the model to device={device!r}: {error}") from error


def _decompose(model: nn.Module, adapter: AdapterConfig, *, owned: bool, fresh: frozenset[str]) -> Base:
    matrices = find_matrices(model, adapter.target_modules)
    table = build_choice_table([min(m.out_features, m.in_features) for m in matrices], adapter)
    modules = [model.get_submodule(m.name) for m in matrices]
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    consume = [owned and uses[id(m.weight)] == 1 for m in modules]
    config = getattr(model, "config", None)
    with torch.no_grad():
        weights = WeightSource(modules, consume)
        layout = build_layout(matrices, table, adapter, weights.device)
        spectrum = build_spectrum(weights, matrices, layout, adapter)
    heads = tuple(head_modules(model)) if config is not None else ()
    accepts = inspect.signature(model.forward).parameters
    return Base(
        model=model,
        matrices=matrices,
        spectrum=spectrum,
        heads=heads,
        fresh_heads=frozenset(heads) & fresh,
        forward_options={"use_cache": False} if "use_cache" in accepts else {},
    )


def _weight_state(parameter: nn.Parameter) -> tuple[Any, ...]:
    """Changes when the parameter is replaced, moved, or written to in place."""
    version = 0 if parameter.is_inference() else parameter._version
    return version, parameter.data_ptr(), parameter.dtype, str(parameter.device)


def _same_device(asked: str, actual: torch.device) -> bool:
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise ModelError(f"device must be a torch device such as 'cpu' or 'cuda:0' (got {asked!r})") from error
    return device.type == actual.type and device.index in (None, actual.index)
