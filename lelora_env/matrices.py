"""Find the weight matrices of a model that may be adapted, and say what each of them is.

Works on any ``nn.Module`` built from ``nn.Linear`` or from the ``Conv1D`` of transformers (which
stores its weight transposed), also on the meta device: only names and shapes are read.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from lelora_env.errors import ModelError

MATRIX_TYPES = ("query", "key", "value", "qkv", "output", "up", "gate", "gate_up", "down", "other")
"""The closed vocabulary of matrix types; the observation's type index counts in this order.

``query``, ``key``, ``value``: attention projections; ``qkv``: the three fused in one matrix;
``output``: the projection behind attention; ``up``: into the feed-forward layer; ``gate``: its
gating branch; ``gate_up``: both fused; ``down``: out of the feed-forward layer; ``other``: the rest.
"""

PRESETS = {
    "attention": ("query", "key", "value", "qkv", "output"),
    "all-linear": MATRIX_TYPES,
}
"""Presets of `find_matrices`, as the matrix types that each stands for (heads never belong)."""

_ATTENTION = r"(?:\w*attn|\w*attention)"
_TYPE_PATTERNS: tuple[tuple[str, str], ...] = (
    ("qkv", rf"query_key_value|(?:w?qkv|c_attn)(?:_proj)?|(?:self|{_ATTENTION})\.in_proj"),
    ("query", r"query|query_proj|q_proj|q_lin|q"),
    ("key", r"key|key_proj|k_proj|k_lin|k"),
    ("value", r"value|value_proj|v_proj|v_lin|v"),
    ("gate_up", r"gate_up_proj"),
    ("gate", r"gate_proj"),
    ("output", rf"{_ATTENTION}\.(?:output\.dense|dense|c_proj|o|out_proj|wo)|o_proj|out_lin"),
    ("up", r"intermediate\.dense|dense_h_to_4h|c_fc|up_proj|up|lin1|fc1|fc_in|ffn"),
    ("down", r"output\.dense|dense_4h_to_h|mlp\.c_proj|down_proj|down|lin2|fc2|fc_out|ffn_output"),
)
"""Patterns of the end of a module's path, in order of precedence."""

_TYPE_MATCHERS = tuple((kind, re.compile(rf"(?:.*\.)?(?:{pattern})", re.I)) for kind, pattern in _TYPE_PATTERNS)
_HEAD_NAMES = frozenset({"classifier", "pre_classifier", "score", "lm_head"})
_PLAIN_NAMES = re.compile(r"[\w.\-]+(?:\s*,\s*[\w.\-]+)*")
_FUSED = {"query": "qkv", "key": "qkv", "value": "qkv", "gate": "gate_up", "up": "gate_up"}


@dataclass(frozen=True)
class MatrixInfo:
    """One matrix that may be adapted.

    Attributes:
        name: Dotted module path in the model, as PEFT would name it.
        layer: Index of the layer, from 0: the first integer in the path. A path without one
            (BERT's pooler) takes the index of the linear layer before it in the model, or 0.
        type: One of `MATRIX_TYPES`.
        out_features: Rows O of the weight as used in ``y = W x``.
        in_features: Columns I of the weight.
        transposed: The module stores Wᵀ (``Conv1D`` of transformers, as in GPT-2).
        bias: The module has a bias.
    """

    name: str
    layer: int
    type: str
    out_features: int
    in_features: int
    transposed: bool
    bias: bool


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is the ``Conv1D`` of transformers: a linear layer with a transposed weight."""
    return any(
        c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__
    )


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear layer that can carry an adapter.

    ``nn.MultiheadAttention``'s ``out_proj`` is not one: PyTorch reads its weight without calling it.
    """
    return (isinstance(module, nn.Linear)
            and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)) or is_conv1d(module)


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer as a view of shape (O, I), transposed for ``Conv1D``.

    Args:
        module: A layer for which `is_linear` holds.

    Returns:
        A view of the module's own weight: writing to it changes the module.

    Raises:
        ModelError: ``module`` is no linear layer, or its weight is packed (quantised).
    """
    weight = getattr(module, "weight", None)
    if not is_linear(module) or not isinstance(weight, Tensor):
        raise ModelError(f"expected nn.Linear or transformers' Conv1D, got {type(module).__name__}; "
                         "name other target_modules")
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ModelError(f"the weight of {type(module).__name__} is packed ({tuple(weight.shape)}, {weight.dtype}); "
                         "load the model without quantisation")
    return weight.t() if is_conv1d(module) else weight


def matrix_type(name: str) -> str:
    """The type of the matrix at a module path, by the path's end.

    Args:
        name: Dotted module path, such as ``"encoder.layer.0.attention.self.query"``.

    Returns:
        One of `MATRIX_TYPES`; ``"other"`` for every path that no known model family uses.
    """
    return next((kind for kind, matcher in _TYPE_MATCHERS if matcher.fullmatch(name)), "other")


def backbone_of(model: nn.Module) -> nn.Module:
    """The model without its head: ``base_model`` of a transformers model, else ``model`` itself."""
    inner = getattr(model, getattr(model, "base_model_prefix", "") or "", None)
    return inner if isinstance(inner, nn.Module) else model


def _output_embedding(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    module = getter() if callable(getter) else None
    return module if isinstance(module, nn.Module) else None


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer once, by its first path, in the model's order."""
    return {name: module for name, module in model.named_modules() if is_linear(module)}


def _outside_backbone(model: nn.Module) -> set[str]:
    """Names of the linear layers that belong to a head or to the output embedding."""
    backbone, embedding = backbone_of(model), _output_embedding(model)
    inside = {id(module) for module in backbone.modules()}
    return {
        name for name, module in _linears(model).items()
        if id(module) not in inside or module is embedding or name.split(".")[0] in _HEAD_NAMES
    }


def head_modules(model: nn.Module) -> list[str]:
    """Names of the linear layers of a task head, in the model's order.

    These lie outside the backbone of a sequence-classification model (BERT: ``classifier``;
    RoBERTa: ``classifier.dense``, ``classifier.out_proj``; Llama: ``score``). A language model's
    output embedding is not a task head: for a causal model the list is empty.
    """
    if _output_embedding(model) is not None:
        return []
    outside = _outside_backbone(model)
    return [name for name in _linears(model) if name in outside and name.split(".")[0] != "lm_head"]


def _layer_indices(names: Iterable[str]) -> dict[str, int]:
    indices: dict[str, int] = {}
    last = 0
    for name in names:
        numbers = [int(part) for part in name.split(".") if part.isdecimal()]
        last = numbers[0] if numbers else last
        indices[name] = last
    return indices


def find_matrices(model: nn.Module, target_modules: str | tuple[str, ...]) -> list[MatrixInfo]:
    """The matrices of ``model`` that ``target_modules`` names, in the model's order.

    Args:
        model: Any module with ``nn.Linear`` or transformers' ``Conv1D`` layers.
        target_modules: What to adapt, one of

            - a preset: ``"attention"`` (all attention projections) or ``"all-linear"`` (every linear
              layer of the backbone);
            - names, as a tuple or separated by commas. A name out of `MATRIX_TYPES` stands for the
              matrices of that type in every model family (``"query,key,value,up,down"``); any other
              name is a suffix of the module path, as in PEFT (``"q_proj"``, ``"output.dense"``);
            - one string that is none of these: a regular expression for the whole path, as in PEFT.

            Presets, types and suffixes never reach into a task head; the output embedding of a
            language model can be named by suffix if it is not tied.

    Returns:
        One entry per matrix. A layer that is used several times (ALBERT) counts once.

    Raises:
        ModelError: Nothing matches a name (closest names are suggested), the name asks for one part
            of a fused matrix, or a chosen weight is tied to another module.
    """
    linears = _linears(model)
    outside = _outside_backbone(model)
    names = _select(target_modules, list(linears), outside, set(head_modules(model)))
    chosen = {name: module for name, module in linears.items() if name in names}
    _refuse_tied(model, chosen)
    layers = _layer_indices(linears)
    return [_describe(name, module, layers[name]) for name, module in chosen.items()]


def _describe(name: str, module: nn.Module, layer: int) -> MatrixInfo:
    out_features, in_features = linear_weight(module).shape
    return MatrixInfo(name=name, layer=layer, type=matrix_type(name), out_features=out_features,
                      in_features=in_features, transposed=is_conv1d(module),
                      bias=getattr(module, "bias", None) is not None)


def _select(target: str | tuple[str, ...], linears: list[str], outside: set[str], heads: set[str]) -> set[str]:
    inner = [name for name in linears if name not in outside]
    if isinstance(target, str) and target in PRESETS:
        wanted = {name for name in inner if matrix_type(name) in PRESETS[target]}
        return wanted or _no_match(target, inner, heads)
    if isinstance(target, str) and not _PLAIN_NAMES.fullmatch(target):
        return _match_pattern(target, linears, inner, heads)
    parts = re.split(r"\s*,\s*", target) if isinstance(target, str) else list(target)
    if not parts:
        raise ModelError("target_modules is empty; name at least one module, such as 'query,value'")
    return set().union(*(_match_name(part, linears, inner, heads) for part in parts))


def _match_pattern(pattern: str, linears: list[str], inner: list[str], heads: set[str]) -> set[str]:
    try:
        matcher = re.compile(pattern)
    except re.error as error:
        raise ModelError(f"target_modules {pattern!r} is not a valid regular expression ({error}); "
                         "use names such as 'query,value' or correct the pattern") from error
    found = {name for name in linears if matcher.fullmatch(name) and name not in heads}
    return found or _no_match(pattern, inner, heads)


def _match_name(target: str, linears: list[str], inner: list[str], heads: set[str]) -> set[str]:
    if target in MATRIX_TYPES:
        found = {name for name in inner if matrix_type(name) == target}
        if found:
            return found
    matching = {name for name in linears if name == target or name.endswith(f".{target}")}
    return (matching - heads) or _no_match(target, inner, heads)


def _no_match(target: str, inner: list[str], heads: set[str]) -> set[str]:
    """Raise the error that says why ``target`` matches nothing and what would."""
    types = {matrix_type(name) for name in inner}
    count = f"({len(inner)} linear layer{'s' * (len(inner) != 1)} found)"
    fused = _FUSED.get(target)
    if fused in types:
        raise ModelError(f"no target module matches {target!r}: this model keeps it inside one fused matrix; "
                         f"use {fused!r} instead {count}")
    if any(name == target or name.endswith(f".{target}") for name in heads):
        raise ModelError(f"{target!r} is part of the task head, which is trained whole in every step; "
                         f"name matrices of the backbone, such as 'attention' {count}")
    if not inner:
        raise ModelError(f"no target module matches {target!r}; the model needs nn.Linear or Conv1D layers {count}")
    tails = {".".join(name.split(".")[-parts:]) for name in inner for parts in (1, 2)}
    known = sorted(types - {"other"} | {name for name in PRESETS if name != target}
                   | {tail for tail in tails if tail and not tail[0].isdecimal()})
    close = difflib.get_close_matches(target, known, n=3, cutoff=0.6)
    hint = (f"did you mean {' or '.join(repr(name) for name in close)}?" if close
            else f"known: {', '.join(known[:20])}")
    raise ModelError(f"no target module matches {target!r}; {hint} {count}")


def _refuse_tied(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    """Refuse a weight that another module holds too: adapting one would not adapt the other."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(name)
    config = getattr(model, "config", None)
    embedding = _output_embedding(model) if getattr(config, "tie_word_embeddings", False) else None
    for name, module in chosen.items():
        others = [other for other in owners.get(id(module._parameters.get("weight")), []) if other != name]
        if others or module is embedding:
            raise ModelError(f"{name!r} shares its weight with {others[0] if others else 'the input embedding'!r} "
                             "(tied), so it cannot be adapted alone; leave it out of target_modules or untie it")
