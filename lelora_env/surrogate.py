"""``LeLoRA-surrogate-v0``: one step is one whole fine-tuning run, its loss predicted from logged runs.

The setting is *allocate once*: one allocation is chosen before a run and kept to its end, and is judged by the loss on
held-out training rows. `fit_loss` fits the logged losses; the environments draw from that fit.

Shapes: L lanes · N runs · M matrices · R ranks · S locations · P columns of the fit.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gymnasium.vector import AutoresetMode

from lelora_env.allocation import build_choice_table, decode_action
from lelora_env.budget import component_sizes
from lelora_env.config import ADAPTER_FIELDS, ENV_FIELDS, AdapterConfig, EnvConfig, split_options
from lelora_env.errors import DataError, LeLoRAError
from lelora_env.logged import PACKAGED, AllocationRuns, Problem, load_allocations
from lelora_env.synthetic import SyntheticEnv, SyntheticVectorEnv, chosen_options, keyed_normal, mixed

FORMS = ("total", "type+total", "additive", "additive+total")
"""The forms that are compared: what the total of trained parameters says alone; a weight for each type of matrix and
location, and the total; a weight for each matrix and location; the same and the total."""

PENALTIES = tuple(float(x) for x in np.logspace(-1, 3.5, 10))
"""Ridge penalties that are compared, for columns of unit variance."""

FOLDS = 10
_OPTIONS = ("alpha", "rank_cost", "parameter_budget", "common_random_numbers")


def problem_configs(problem: Problem) -> tuple[AdapterConfig, EnvConfig]:
    """The configs of a problem's runs, on the CPU."""
    known = {k: v for k, v in problem.settings.items() if k in (*ADAPTER_FIELDS, *ENV_FIELDS)}
    return split_options({**known, "device": "cpu"})


class Choices:
    """What each choice of each matrix amounts to in a fit."""

    def __init__(self, problem: Problem) -> None:
        """Read it from the matrices and settings of a problem."""
        adapter, _ = problem_configs(problem)
        matrices = problem.matrices
        self.table = build_choice_table([min(m.out_features, m.in_features) for m in matrices], adapter)
        self.ranks = self.table.ranks.numpy()  # (M, R)
        self.locations = len(adapter.locations)
        self.sizes = self.ranks * component_sizes(list(matrices), adapter).numpy()[:, None]  # (M, R)
        self.index = np.arange(len(matrices))
        types = sorted({m.type for m in matrices})
        self.type_of = np.array([types.index(m.type) for m in matrices])

    def owner(self, form: str) -> np.ndarray | None:
        """Which group of weights each matrix uses, (M,); ``None`` where matrices have none of their own."""
        if form.startswith("additive"):
            return self.index
        return self.type_of if form.startswith("type") else None

    def totals(self, rank_index: np.ndarray) -> np.ndarray:
        """The two columns of the total, (N, 2): share of the largest possible, and log2 of the number + 1."""
        total = self.sizes[self.index, rank_index].sum(1).astype(np.float64)
        return np.stack([total / self.sizes.max(1).sum(), np.log2(total + 1)], axis=1)

    def columns(self, form: str, rank_index: np.ndarray, location_index: np.ndarray) -> np.ndarray:
        """The columns of a form, (N, P): log2(r + 1) in the column of its group and location, then the totals."""
        owner, parts = self.owner(form), []
        if owner is not None:
            groups = int(owner.max()) + 1
            found = np.zeros((len(rank_index), groups, self.locations))
            run = np.arange(len(rank_index))[:, None]
            np.add.at(found, (run, owner, location_index), np.log2(self.ranks[self.index, rank_index] + 1))
            parts.append(found.reshape(len(found), -1))
        if form.endswith("total"):
            parts.append(self.totals(rank_index))
        return np.concatenate(parts, axis=1)


class Judgement(NamedTuple):
    """How well a form predicts runs of rounds that it has not seen.

    `r` is Pearson's correlation of predicted and measured loss, both less their round's mean; `rmse` is in the unit of
    the loss; `penalty` is the one that predicts best.
    """

    r: float
    rmse: float
    penalty: float


@dataclass(frozen=True, eq=False)
class LossModel:
    """L1 after a run as a function of its allocation: constant + Σ over matrices of an effect + that of the total.

    Attributes:
        form: The form of `FORMS` that predicts best.
        judgements: Of every form, its cross-validation over rounds. The penalty was chosen on the same folds.
        effects: (M, R, S) what each choice adds to the loss.
        total_weights: (2,) weights of the columns of `Choices.totals`.
        constant: The loss that is left.
        residual_std: Spread of a run about its prediction within a round, from the best form's `rmse`. It holds what
            the form cannot say as well as chance.
        round_std: Spread of the mean loss over rounds: chance that lanes share.
        replicate_std: Spread of one allocation from round to round, beside the other runs of the round: chance alone.
            ``None`` where no allocation was repeated.
        loss_before: Mean L1 before a run.
    """

    form: str
    judgements: dict[str, Judgement]
    effects: np.ndarray = field(repr=False)
    total_weights: np.ndarray = field(repr=False)
    constant: float
    residual_std: float
    round_std: float
    replicate_std: float | None
    loss_before: float
    choices: Choices = field(repr=False)

    def of(self, rank_index: np.ndarray, location_index: np.ndarray) -> np.ndarray:
        """Predicted loss, (N,), of allocations given as indices (N, M)."""
        loss: np.ndarray = self.effects[self.choices.index, rank_index, location_index].sum(1)
        return np.asarray(self.constant + loss + self.choices.totals(rank_index) @ self.total_weights)

    def predict(self, actions: np.ndarray) -> np.ndarray:
        """Predicted loss of flat actions.

        Args:
            actions: (N, 2M) or (2M,) integers.

        Returns:
            (N,) float64.

        Raises:
            ActionError: Wrong shape, type or range.
        """
        actions = np.atleast_2d(actions)
        allocation = decode_action(actions, len(actions), self.choices.table)
        return self.of(allocation.rank_index.numpy(), allocation.location_index.numpy())


# ---------------------------------------------------------------------- the fit


def less_round_mean(values: np.ndarray, rounds: np.ndarray) -> np.ndarray:
    """Values (N, ...) less the mean of their round."""
    _, place, count = np.unique(rounds, return_inverse=True, return_counts=True)
    sums = np.zeros((len(count), *values.shape[1:]))
    np.add.at(sums, place, values)
    return np.asarray(values - (sums.T / count).T[place])


def ridge(columns: np.ndarray, values: np.ndarray, penalty: float) -> np.ndarray:
    """Weights (P,) that minimise ‖values - columns·w‖² + penalty·‖w‖² with every column at unit variance."""
    scale = columns.std(axis=0)
    scale = np.where(scale > 1e-12, scale, 1.0)
    scaled = columns / scale
    weights: np.ndarray = np.linalg.solve(scaled.T @ scaled + penalty * np.eye(scaled.shape[1]), scaled.T @ values)
    return weights / scale


def judge(columns: np.ndarray, values: np.ndarray, rounds: np.ndarray) -> Judgement:
    """Cross-validate a form over whole rounds; columns and values are less their round's mean."""
    numbers = np.unique(rounds)
    fold = np.searchsorted(numbers, rounds) % min(FOLDS, len(numbers))
    best: Judgement | None = None
    for penalty in PENALTIES:
        predicted = np.zeros(len(values))
        for out in np.unique(fold):
            inside = fold != out
            predicted[~inside] = columns[~inside] @ ridge(columns[inside], values[inside], penalty)
        rmse = float(np.sqrt(np.mean((predicted - values) ** 2)))
        spread = predicted.std() * values.std()
        r = float((predicted * values).mean() / spread) if spread > 0 else 0.0
        if best is None or rmse < best.rmse:
            best = Judgement(r, rmse, penalty)
    assert best is not None
    return best


def fit_loss(runs: AllocationRuns) -> LossModel:
    """Fit the loss of one problem's runs: the best of `FORMS` by cross-validation over rounds.

    Losses and columns are taken less their round's mean, so that what lanes share drops out.

    Raises:
        DataError: Runs of several problems, or of fewer than two rounds of two runs.
    """
    choices = Choices(runs.problem)
    rounds, counts = np.unique(runs.round, return_counts=True)
    if len(rounds) < 2 or counts.min() < 2:
        raise DataError(f"a fit needs at least two rounds of two runs each (got rounds of {counts.tolist()} runs); "
                        "log more with benchmarks/surrogate_runs.py.")
    pairs = runs.action.astype(np.int64).reshape(len(runs), -1, 2)
    rank_index, location_index = pairs[..., 0], pairs[..., 1]
    values = less_round_mean(runs.loss, runs.round)
    columns = {form: choices.columns(form, rank_index, location_index) for form in FORMS}
    centred = {form: less_round_mean(found, runs.round) for form, found in columns.items()}
    judgements = {form: judge(found, values, runs.round) for form, found in centred.items()}
    form = min(FORMS, key=lambda name: judgements[name].rmse)
    weights = ridge(centred[form], values, judgements[form].penalty)
    effects, total_weights = _unfold(choices, form, weights)
    lanes = len(runs) / len(rounds)
    means = np.array([runs.loss[runs.round == one].mean() for one in rounds])
    return LossModel(
        form=form, judgements=judgements, effects=effects, total_weights=total_weights,
        constant=float(runs.loss.mean() - columns[form].mean(0) @ weights),
        residual_std=judgements[form].rmse * float(np.sqrt(lanes / (lanes - 1))),
        round_std=float(means.std(ddof=1)), replicate_std=replicate_std(runs, columns[form] @ weights),
        loss_before=float(runs.loss_before.mean()), choices=choices,
    )


def _unfold(choices: Choices, form: str, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of a form as effects (M, R, S) and the two weights of the totals."""
    owner, locations = choices.owner(form), choices.locations
    effects = np.zeros((*choices.ranks.shape, locations))
    own = len(weights) - (2 if form.endswith("total") else 0)
    if owner is not None:
        effects = np.log2(choices.ranks + 1)[:, :, None] * weights[:own].reshape(-1, locations)[owner][:, None]
    return effects, weights[own:] if own < len(weights) else np.zeros(2)


def replicate_std(runs: AllocationRuns, predicted: np.ndarray) -> float | None:
    """Spread of one allocation's loss from round to round, beside the other runs of the round.

    Args:
        runs: The runs.
        predicted: (N,) predicted losses: what is known of the allocations of the other runs is taken off.

    Returns:
        Pooled over all allocations of the kind ``replicate`` that occur in two rounds or more; ``None`` without one.
    """
    repeated, rest = runs.kind == "replicate", runs.loss - predicted
    others = {one: rest[(runs.round == one) & ~repeated].mean() for one in np.unique(runs.round[~repeated])}
    found: dict[bytes, list[float]] = {}
    for i in np.flatnonzero(repeated):
        if runs.round[i] in others:
            found.setdefault(runs.action[i].tobytes(), []).append(float(rest[i] - others[runs.round[i]]))
    groups = [np.array(losses) for losses in found.values() if len(losses) > 1]
    if not groups:
        return None
    squares = sum(float(((losses - losses.mean()) ** 2).sum()) for losses in groups)
    return float(np.sqrt(squares / sum(len(losses) - 1 for losses in groups)))


# ---------------------------------------------------------------------- the environments


class BestKnown(NamedTuple):
    """The allocation with the lowest loss in the data.

    `action` is (2M,) int64; `predicted_loss` is what the fit says of it; `loss` is what was measured, less its round's
    mean and plus the mean of all runs (a best of many, so it flatters); `trained_parameters` is its size.
    """

    action: np.ndarray
    predicted_loss: float
    loss: float
    trained_parameters: int


@lru_cache(maxsize=8)
def _fitted(task: str, placement: str, path: str, changed: int) -> tuple[AllocationRuns, LossModel]:
    runs = load_allocations(task, placement, path)
    return runs, fit_loss(runs)


def _load(task: str, placement: str, path: str | Path | None) -> tuple[AllocationRuns, LossModel]:
    file = Path(PACKAGED if path is None else path)
    return _fitted(task, placement, str(file), file.stat().st_mtime_ns if file.is_file() else 0)


class SurrogateVectorEnv(SyntheticVectorEnv):
    """L runs at a time, each over after one step: L1 = predicted loss + noise. See `SurrogateEnv`.

    With ``common_random_numbers`` all lanes share a round's noise.
    """

    def __init__(self, num_envs: int = 1, task: str = "sst2", placement: str = "all-linear", *, noise: bool = True,
                 path: str | Path | None = None, max_episode_steps: int | None = None,
                 autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP, render_mode: str | None = None,
                 **options: Any) -> None:
        """Read and fit the logged runs.

        Args:
            num_envs: L, at least 1.
            task: Task of the logged runs.
            placement: Their ``target_modules``.
            noise: ``False`` gives the predicted loss itself.
            path: Another file of logged runs than the packaged one.
            max_episode_steps: Outside limit that truncates.
            autoreset_mode: What happens to finished lanes.
            render_mode: Must be ``None``.
            **options: ``alpha``, ``rank_cost``, ``parameter_budget`` or ``common_random_numbers``.

        Raises:
            LeLoRAError: Anything in the arguments that cannot work, named in the message.
        """
        if not isinstance(noise, bool):
            raise LeLoRAError(f"noise must be True or False (got {noise!r})")
        self.runs, self.model = _load(task, placement, path)
        self.noise = noise
        problem = self.runs.problem
        adapter, _ = problem_configs(problem)
        fixed = {k: v for k, v in problem.settings.items() if k in (*ADAPTER_FIELDS, *ENV_FIELDS)}
        _, config = chosen_options(options, _OPTIONS, {**fixed, "device": "cpu", "common_random_numbers": False})
        super().__init__(num_envs, problem.matrices, problem.rows, adapter, config,
                         max_episode_steps=max_episode_steps, autoreset_mode=autoreset_mode, render_mode=render_mode)
        matrix, rank, location = np.indices(self.model.effects.shape)
        trains = self.model.choices.ranks[..., None] > 0
        self._keys = np.where(trains, mixed(matrix, rank, location), mixed(matrix, 0, 0))  # rank 0: the same anywhere

    def start_losses(self, starting: np.ndarray) -> np.ndarray:
        """The mean loss before a run; it does not vary."""
        return np.full(self.num_envs, self.model.loss_before)

    def step_losses(self, rank_index: np.ndarray, location_index: np.ndarray, running: np.ndarray) -> np.ndarray:
        """Predicted loss, and noise of two kinds: by (seed, episode), and by (seed, episode, allocation).

        The same allocation with the same seed and episode therefore comes out the same, in whichever lane.
        """
        loss = self.model.of(rank_index, location_index)
        if not self.noise:
            return loss
        allocation = self._keys[self._index, rank_index, location_index].sum(1)  # one number an allocation
        where = np.stack([np.zeros_like(allocation), allocation])
        shared, own = keyed_normal(self.clocks.seeds, self.clocks.episodes, where)
        noisy: np.ndarray = loss + self.model.round_std * shared + self.model.residual_std * own
        return noisy

    def predict(self, actions: np.ndarray) -> np.ndarray:
        """Predicted loss of flat actions (N, 2M), without noise; (N,)."""
        return self.model.predict(actions)

    def best_known(self) -> BestKnown:
        """The allocation of the logged run with the lowest loss, less its round's mean."""
        losses = less_round_mean(self.runs.loss, self.runs.round) + self.runs.loss.mean()
        best = int(losses.argmin())
        action = self.runs.action[best].astype(np.int64)
        return BestKnown(action, float(self.predict(action)[0]), float(losses[best]),
                         int(self.runs.trained_parameters[best]))


class SurrogateEnv(SyntheticEnv):
    """Allocate once: choose a rank and a location for each matrix, and get the loss of the whole run.

    ``gym.make("LeLoRA-surrogate-v0", task="sst2", placement="all-linear")``. Episodes have one step. Observation,
    action and reward -(L1 + α·L2) are those of `lelora_env.LeLoRAEnv`, with L1 = prediction of a model fitted to logged
    runs (`fit_loss`), plus noise of the size that the runs show, and L2 = L1 less the mean loss before a run. The
    prediction is an additive model of real runs; it is no proof that a real run would come out so.
    ``env.unwrapped.predict(actions)`` is the prediction, ``env.unwrapped.best_known()`` the best of the logged runs,
    ``env.unwrapped.model`` the fit and what it is worth.

    Arguments: see `SurrogateVectorEnv`.
    """

    lanes: SurrogateVectorEnv

    def __init__(self, task: str = "sst2", placement: str = "all-linear", *, noise: bool = True,
                 path: str | Path | None = None, render_mode: str | None = None, **options: Any) -> None:
        """Read and fit the logged runs; see the class."""
        super().__init__(SurrogateVectorEnv(1, task, placement, noise=noise, path=path, render_mode=render_mode,
                                            autoreset_mode=AutoresetMode.DISABLED, **options))

    @property
    def model(self) -> LossModel:
        """The fit."""
        return self.lanes.model

    def predict(self, actions: np.ndarray) -> np.ndarray:
        """Predicted loss of flat actions (N, 2M) or (2M,), without noise; (N,)."""
        return self.lanes.predict(actions)

    def best_known(self) -> BestKnown:
        """The allocation of the logged run with the lowest loss, less its round's mean."""
        return self.lanes.best_known()
