"""All settings, in two frozen dataclasses that are complete and checked at birth.

``AdapterConfig`` says what may be adapted and in which parametrisation; ``EnvConfig`` says how
it is trained, rewarded and observed. A new knob goes here and nowhere else.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lelora_env.errors import LeLoRAError, UnknownNameError

Parametrisation = Literal["usv", "sqrt", "unit"]
LocationSpec = str | float

NAMED_LOCATIONS: dict[str, float] = {"primary": 0.0, "medium": 0.5, "minor": 1.0}
"""The paper's three locations as fractions of the spectrum (0, m/2 and m)."""

EXTRA_FEATURES = ("relative_depth", "grad_norm", "update_norm")
"""Optional observation columns that ``EnvConfig.extra_features`` may name."""


def _require(ok: bool, field: str, value: object, rule: str) -> None:
    if not ok:
        raise LeLoRAError(f"{field} must be {rule} (got {value!r})")


def _one_of(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UnknownNameError(field, str(value), known)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What may be adapted: which matrices, which components of their spectra, in which form.

    Attributes:
        target_modules: Name suffixes of the linear layers to adapt, as in PEFT, or a preset:
            ``"attention"``, ``"all-linear"``, ``"query,value"``, ``"query,key,value,up,down"``
            (a comma-separated list of matrix *types* works on every supported model family).
        rank_set: The ranks an action may choose from, ascending; 0 leaves a matrix untouched
            (paper, Tables 5-7).
        locations: Where in the spectrum the components may be taken: ``"primary"``, ``"medium"``,
            ``"minor"`` (paper: 0, m/2, m), or fractions of the spectrum in [0, 1].
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
        for field in ("target_modules", "rank_set", "locations"):
            if isinstance(getattr(self, field), list):
                object.__setattr__(self, field, tuple(getattr(self, field)))
        ranks = self.rank_set
        _require(bool(ranks) and all(isinstance(r, int) and not isinstance(r, bool) for r in ranks),
                 "rank_set", ranks, "a non-empty list of integers, such as (0, 2, 4, 8)")
        _require(list(ranks) == sorted(set(ranks)) and ranks[0] >= 0 and ranks[-1] >= 1,
                 "rank_set", ranks, "ascending, without repeats, from 0 up, with at least one rank above 0")
        _require(bool(self.locations), "locations", self.locations, "non-empty")
        fractions = [self._fraction(location) for location in self.locations]
        _require(len(set(fractions)) == len(fractions), "locations", self.locations, "without repeats")
        _one_of("parametrisation", self.parametrisation, ("usv", "sqrt", "unit"))
        scale = self.unit_scale
        _require(scale is None or (math.isfinite(scale) and scale > 0), "unit_scale", scale, "positive")

    @staticmethod
    def _fraction(location: LocationSpec) -> float:
        if isinstance(location, str):
            if location not in NAMED_LOCATIONS:
                raise UnknownNameError("location", location, NAMED_LOCATIONS,
                                       "A number in [0, 1], a fraction of the spectrum, works too.")
            return NAMED_LOCATIONS[location]
        _require(isinstance(location, int | float) and 0 <= location <= 1, "locations", location,
                 "a name or a fraction of the spectrum in [0, 1]")
        return float(location)

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
        weight_decay: AdamW decay towards the *pretrained* components (never towards 0).
        betas: AdamW's (β1, β2), each in [0, 1).
        adam_eps: AdamW's ε.
        max_grad_norm: Per-lane gradient clipping over active components and head; ``None`` = off.
        dropout: Dropout rate inside the backbone's hidden layers (never on the bank branch).
        alpha: α of reward = -(L1 + α·L2) (Eq. 2 and 3).
        rank_cost: λ of the optional price -λ·(trained fraction of the adaptable weights).
        reward_size: Rows of the fixed reward batch, taken out of the training rows.
        tune_size: Rows of the ``tune`` split, taken out of the training rows.
        split_seed: Seed of the train / reward / tune split and of the shared length schedule.
        spectrum: Singular values per matrix in the observation: a number of points of the
            resampled spectrum, or ``"full"``.
        raw_observation: ``True`` gives plain norms and singular values instead of scaled ones.
        extra_features: Optional observation columns, any of ``EXTRA_FEATURES``.
        common_random_numbers: ``True`` keys data order, dropout and head start without the lane.
        dtype: Type of the frozen model, ``"float32"`` or ``"bfloat16"``; the bank is always fp32.
            ``None`` takes a module's own type, and fp32 for a model loaded by path.
        device: Torch device name. ``None`` takes a module's own device, and the GPU when there is
            one for a model loaded by path.
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
    common_random_numbers: bool = False
    dtype: Literal["float32", "bfloat16"] | None = None
    device: str | None = None
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        for field in ("betas", "extra_features"):
            if isinstance(getattr(self, field), list):
                object.__setattr__(self, field, tuple(getattr(self, field)))
        for field in ("horizon", "steps_per_action", "batch_size", "accumulate", "reward_size"):
            value = getattr(self, field)
            _require(isinstance(value, int) and value >= 1, field, value, "an integer of at least 1")
        _require(isinstance(self.tune_size, int) and self.tune_size >= 0, "tune_size", self.tune_size,
                 "an integer of at least 0")
        _require(self.batch_size % self.accumulate == 0, "accumulate", self.accumulate,
                 f"a divisor of batch_size ({self.batch_size})")
        for field in ("learning_rate", "adam_eps"):
            value = getattr(self, field)
            _require(math.isfinite(value) and value > 0, field, value, "a positive number")
        head = self.head_learning_rate
        _require(head is None or (math.isfinite(head) and head > 0), "head_learning_rate", head,
                 "a positive number or None")
        for field in ("weight_decay", "alpha", "rank_cost"):
            value = getattr(self, field)
            _require(math.isfinite(value) and value >= 0, field, value, "a number of at least 0")
        for field in ("warmup", "dropout"):
            value = getattr(self, field)
            _require(0 <= value < 1, field, value, "in [0, 1)")
        _require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", self.betas,
                 "two numbers in [0, 1)")
        clip = self.max_grad_norm
        _require(clip is None or clip > 0, "max_grad_norm", clip, "positive, or None for no clipping")
        points = self.spectrum
        _require(points == "full" or (isinstance(points, int) and points >= 2), "spectrum", points,
                 "'full' or a number of points of at least 2")
        for name in self.extra_features:
            _one_of("extra feature", name, EXTRA_FEATURES)
        if self.dtype is not None:
            _one_of("dtype", self.dtype, ("float32", "bfloat16"))

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
