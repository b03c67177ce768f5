"""All settings, in two frozen dataclasses that are complete and checked at birth.

``AdapterConfig`` says what may be adapted and in which parametrisation; ``EnvConfig`` says how
it is trained, rewarded and observed. A new knob goes here and nowhere else.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from lelora_env.errors import LeLoRAError, UnknownNameError

Parametrisation = Literal["usv", "sqrt", "unit"]
LocationSpec = str | float

NAMED_LOCATIONS: dict[str, float] = {"primary": 0.0, "medium": 0.5, "minor": 1.0}
"""The paper's three locations as fractions of the spectrum (0, m/2 and m)."""

EXTRA_FEATURES = ("relative_depth", "grad_norm", "update_norm")
"""Optional observation columns that ``EnvConfig.extra_features`` may name."""

COMPONENT_INFO = ("credit", "sensitivity")
"""Optional info about every component that ``EnvConfig.component_info`` may name."""


Bounds = tuple[str, Callable[[float], bool]]
_POSITIVE: Bounds = ("a positive number", lambda x: x > 0)
_AT_LEAST_0: Bounds = ("a number of at least 0", lambda x: x >= 0)
_SHARE: Bounds = ("in [0, 1)", lambda x: 0 <= x < 1)

_NUMBERS = {"learning_rate": _POSITIVE, "adam_eps": _POSITIVE, "weight_decay": _AT_LEAST_0, "alpha": _AT_LEAST_0,
            "rank_cost": _AT_LEAST_0, "warmup": _SHARE, "dropout": _SHARE}
_INTEGERS = {"horizon": 1, "steps_per_action": 1, "batch_size": 1, "accumulate": 1, "reward_size": 1, "tune_size": 0,
             "split_seed": 0}
"""The least value of every field that is an integer."""


def _require(ok: bool, field: str, value: object, rule: str) -> None:
    if not ok:
        raise LeLoRAError(f"{field} must be {rule} (got {value!r})")


def _one_of(field: str, value: object, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise UnknownNameError(field, str(value), known)


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _integer(field: str, value: Any, least: int) -> int:
    _require(_is_integer(value) and value >= least, field, value, f"an integer of at least {least}")
    return int(value)


def _number(field: str, value: Any, rule: str, fits: Callable[[float], bool]) -> float:
    _require(_is_integer(value) or isinstance(value, float | np.floating), field, value, rule)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    _require(math.isfinite(number) and fits(number), field, value, rule)
    return number


def _entries(field: str, value: Any, rule: str) -> tuple[Any, ...]:
    """The entries of a list, tuple, range, array or comma-separated string, as plain Python values."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    listed = value.ndim == 1 if isinstance(value, np.ndarray) else isinstance(value, list | tuple | range)
    _require(listed, field, value, rule)
    return tuple(x.item() if isinstance(x, np.generic) else x for x in value)


def _names(field: str, value: Any, what: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Names of `known` without repeats."""
    names = _entries(field, value, f"a list of names, such as ({known[0]!r},)")
    for name in names:
        _one_of(what, name, known)
    _require(len(set(names)) == len(names), field, value, "without repeats")
    return names


def _device(value: object) -> str:
    try:
        torch.device(str(value))
    except RuntimeError:
        rule = "a torch device or its name, such as 'cpu', 'cuda' or 'cuda:1'"
        raise LeLoRAError(f"device must be {rule} (got {value!r})") from None
    return str(value)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What may be adapted: which matrices, which components of their spectra, in which form.

    Attributes:
        target_modules: Name suffixes of the linear layers to adapt, as in PEFT, or a preset:
            ``"attention"``, ``"all-linear"``, ``"query,value"``, ``"query,key,value,up,down"``
            (a comma-separated list of matrix *types* works on every supported model family).
        rank_set: The ranks an action may choose from, ascending; 0 leaves a matrix untouched
            (paper, Tables 5-7). Any list, tuple, range or array of integers.
        locations: Where in the spectrum the components may be taken: ``"primary"``, ``"medium"``,
            ``"minor"`` (paper: 0, m/2, m), or fractions of the spectrum in [0, 1] that differ in
            their first six digits. One string may hold several names: ``"primary,minor"``.
        parametrisation: ``"usv"`` trains u, σ and v as the paper writes them; ``"sqrt"`` splits
            √σ over both vectors (as PiSSA); ``"unit"`` trains unit directions times one constant
            per matrix, so that equal steps mean equal changes everywhere in the spectrum.
        unit_scale: The constant of ``"unit"``; ``None`` takes each bank's mean singular value.
    """

    target_modules: str | tuple[str, ...] = "query,value"
    rank_set: tuple[int, ...] = (0, 2, 4, 8)
    locations: tuple[LocationSpec, ...] = ("primary", "medium", "minor")
    parametrisation: Parametrisation = "usv"
    unit_scale: float | None = None

    def __post_init__(self) -> None:
        put = partial(object.__setattr__, self)
        put("target_modules", self._targets(self.target_modules))
        rule = "a non-empty list of integers, such as (0, 2, 4, 8)"
        ranks = _entries("rank_set", self.rank_set, rule)
        _require(bool(ranks) and all(_is_integer(r) for r in ranks), "rank_set", self.rank_set, rule)
        _require(list(ranks) == sorted(set(ranks)) and ranks[0] >= 0 and ranks[-1] >= 1,
                 "rank_set", ranks, "ascending, without repeats, from 0 up, with at least one rank above 0")
        put("rank_set", ranks)
        locations = _entries("locations", self.locations, "a list of names and fractions, such as ('primary', 0.25)")
        _require(bool(locations), "locations", self.locations, "non-empty")
        put("locations", tuple(x if isinstance(x, str) else self._fraction(x) for x in locations))
        for told_apart in (self.location_fractions, self.location_names):
            _require(len(set(told_apart)) == len(locations), "locations", self.locations,
                     f"without repeats in where they lie and in what they are called {self.location_names}")
        _one_of("parametrisation", self.parametrisation, ("usv", "sqrt", "unit"))
        if self.unit_scale is not None:
            put("unit_scale", _number("unit_scale", self.unit_scale, *_POSITIVE))

    @staticmethod
    def _targets(value: Any) -> str | tuple[str, ...]:
        if isinstance(value, str):
            return value
        rule = "a string, or a list of strings, such as 'query,value'"
        names = _entries("target_modules", value, rule)
        _require(all(isinstance(name, str) for name in names), "target_modules", value, rule)
        return names

    @staticmethod
    def _fraction(location: LocationSpec) -> float:
        if isinstance(location, str):
            if location not in NAMED_LOCATIONS:
                raise UnknownNameError("location", location, NAMED_LOCATIONS,
                                       "A number in [0, 1], a fraction of the spectrum, works too.")
            return NAMED_LOCATIONS[location]
        rule = "a name or a fraction of the spectrum in [0, 1]"
        return _number("locations", location, rule, lambda x: 0 <= x <= 1) + 0.0  # turns -0.0 into 0.0

    @property
    def max_rank(self) -> int:
        """The largest rank an action may choose."""
        return self.rank_set[-1]

    @property
    def location_fractions(self) -> tuple[float, ...]:
        """Each location as a fraction of the spectrum, in [0, 1]."""
        return tuple(self._fraction(location) for location in self.locations)

    @property
    def location_names(self) -> tuple[str, ...]:
        """Each location's name: its own, or ``at_0.25`` for a fraction."""
        return tuple(x if isinstance(x, str) else f"at_{x:g}" for x in self.locations)


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """How a run is trained, rewarded and observed.

    Attributes:
        horizon: Env steps in an episode: one episode is one fine-tuning run.
        steps_per_action: Optimiser steps that follow each action (1 = the paper; with
            ``horizon=1`` the allocation is chosen once for the whole run).
        batch_size: Training rows per optimiser step and lane.
        accumulate: Micro-batches that a training batch is cut into; must divide ``batch_size``.
        learning_rate: Peak learning rate of the bank (AdamW).
        head_learning_rate: Peak learning rate of the task head; ``None`` = ``learning_rate``.
        warmup: Share of all optimiser steps with linear warm-up, in [0, 1); linear decay to 0 after.
        weight_decay: AdamW decay. It draws the bank towards the *pretrained* components (never
            towards 0), and the head towards 0, as in ordinary AdamW.
        betas: AdamW's (β1, β2), each in [0, 1).
        adam_eps: AdamW's ε.
        max_grad_norm: Per-lane gradient clipping over active components and head; ``None`` = off.
        dropout: Dropout rate inside the backbone's hidden layers (never on the bank branch).
        alpha: α of reward = -(L1 + α·L2) (Eq. 2 and 3).
        rank_cost: λ of the optional price -λ·(trained fraction of the adaptable weights).
        reward_size: Rows of the fixed reward batch, taken out of the training rows.
        tune_size: Rows of the ``tune`` split, taken out of the training rows.
        split_seed: Seed of the train / reward / tune split and of the shared length schedule, >= 0.
        spectrum: Singular values per matrix in the observation: a number of points of the
            resampled spectrum, or ``"full"``.
        raw_observation: ``True`` gives plain norms and singular values instead of scaled ones.
        extra_features: Optional observation columns, any of ``EXTRA_FEATURES``, each once. One
            string may hold several names: ``"grad_norm,update_norm"``.
        component_info: Optional info about every component, any of ``COMPONENT_INFO``, each once; see the data sheet
            of `lelora_env.LeLoRAEnv`. ``"credit"`` costs a backward pass over the reward rows in every env step;
            where they are too many for one such pass they are taken in smaller portions, and the reward loss may
            then differ in its last bits from what it is without.
        parameter_budget: Hard budget: the share of what the largest rank everywhere would train that an env step may
            train, in (0, 1]. Of an action that exceeds it, ranks are lowered before training, the highest first (see
            `lelora_env.budget`). ``None`` = no budget.
        common_random_numbers: ``True`` keys data order, dropout and head start without the lane.
        dtype: Type of the frozen model, ``"float32"`` or ``"bfloat16"``; the bank is always fp32.
            ``None`` takes a module's own type, and fp32 for a model loaded by path.
        device: Torch device, kept by its name. ``None`` takes a module's own device, and the GPU
            when there is one for a model loaded by path.
        activation_checkpointing: ``True`` keeps only the inputs of the model's blocks for the backward pass
            and computes the rest anew: much less memory, about a third more time, the same numbers.
        cuda_graphs: On CUDA, record a step's kernels once and replay them (same numbers, several
            times faster for small models); ``False`` launches them one by one.
    """

    horizon: int = 100
    steps_per_action: int = 1
    batch_size: int = 16
    accumulate: int = 1
    learning_rate: float = 5e-4
    head_learning_rate: float | None = None
    warmup: float = 0.06
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    adam_eps: float = 1e-8
    max_grad_norm: float | None = 1.0
    dropout: float = 0.0
    alpha: float = 0.8
    rank_cost: float = 0.0
    reward_size: int = 32
    tune_size: int = 256
    split_seed: int = 0
    spectrum: int | Literal["full"] = 32
    raw_observation: bool = False
    extra_features: tuple[str, ...] = ()
    component_info: tuple[str, ...] = ()
    parameter_budget: float | None = None
    common_random_numbers: bool = False
    dtype: Literal["float32", "bfloat16"] | None = None
    device: str | None = None
    activation_checkpointing: bool = False
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        put = partial(object.__setattr__, self)
        for field, least in _INTEGERS.items():
            put(field, _integer(field, getattr(self, field), least))
        _require(self.batch_size % self.accumulate == 0, "accumulate", self.accumulate,
                 f"a divisor of batch_size ({self.batch_size})")
        for field, bounds in _NUMBERS.items():
            put(field, _number(field, getattr(self, field), *bounds))
        for field in ("head_learning_rate", "max_grad_norm"):
            if getattr(self, field) is not None:
                put(field, _number(field, getattr(self, field), "a positive number or None", _POSITIVE[1]))
        if self.parameter_budget is not None:
            put("parameter_budget", _number("parameter_budget", self.parameter_budget, "in (0, 1], or None",
                                            lambda x: 0 < x <= 1))
        for field in ("raw_observation", "common_random_numbers", "activation_checkpointing", "cuda_graphs"):
            value = getattr(self, field)
            _require(isinstance(value, bool | np.bool_), field, value, "True or False")
            put(field, bool(value))
        betas = _entries("betas", self.betas, "two numbers in [0, 1)")
        _require(len(betas) == 2, "betas", self.betas, "two numbers in [0, 1)")
        put("betas", tuple(_number("betas", beta, "two numbers in [0, 1)", _SHARE[1]) for beta in betas))
        self._check_observation()
        if self.dtype is not None:
            _one_of("dtype", self.dtype, ("float32", "bfloat16"))
        if self.device is not None:
            put("device", _device(self.device))

    def _check_observation(self) -> None:
        points = self.spectrum
        if not isinstance(points, str):
            _require(_is_integer(points) and points >= 2, "spectrum", points, "'full' or a number of at least 2 points")
            object.__setattr__(self, "spectrum", int(points))
        else:
            _require(points == "full", "spectrum", points, "'full' or a number of at least 2 points")
        extras = _names("extra_features", self.extra_features, "extra feature", EXTRA_FEATURES)
        object.__setattr__(self, "extra_features", extras)
        components = _names("component_info", self.component_info, "component info", COMPONENT_INFO)
        object.__setattr__(self, "component_info", components)

    @property
    def total_steps(self) -> int:
        """Optimiser steps in an episode."""
        return self.horizon * self.steps_per_action


ADAPTER_FIELDS = tuple(AdapterConfig.__dataclass_fields__)
ENV_FIELDS = tuple(EnvConfig.__dataclass_fields__)


def split_options(options: dict[str, Any]) -> tuple[AdapterConfig, EnvConfig]:
    """Sort keyword options into the two configs.

    Raises:
        UnknownNameError: An option that neither config has.
    """
    for name in options:
        if name not in ADAPTER_FIELDS and name not in ENV_FIELDS:
            raise UnknownNameError("option", name, ADAPTER_FIELDS + ENV_FIELDS)
    adapter = {k: v for k, v in options.items() if k in ADAPTER_FIELDS}
    env = {k: v for k, v in options.items() if k in ENV_FIELDS}
    return AdapterConfig(**adapter), EnvConfig(**env)


def as_options(adapter: AdapterConfig, env: EnvConfig) -> dict[str, Any]:
    """Both configs as one flat dictionary of plain values; the inverse of `split_options`."""
    return {**asdict(adapter), **asdict(env)}
