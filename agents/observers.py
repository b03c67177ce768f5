"""Observers of `run`: a progress bar, TensorBoard, and the numbers that say what was allocated.

Each is an `OnStep` and can be given as one: ``run(..., on_step=board)``. `run(progress=True, tensorboard=folder)`
makes and closes them itself.

Shapes: L lanes · M matrices · G groups of matrices · S locations.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from agents.agent import AnyEnv, Array, OnStep, Transition
from agents.spec import AgentSpec
from lelora_env.errors import LeLoRAError


class AllocationScalars:
    """What was trained in an env step, as scalars of each lane.

    Ranks are those that were *executed*: the info ``executed_rank`` where the environment has a hard budget, else the
    chosen ones, clipped to their matrix.
    """

    def __init__(self, spec: AgentSpec) -> None:
        """Read which matrices belong together; an environment that says nothing of its matrices has no groups."""
        self._ranks = np.array(spec.rank_set, dtype=np.int64)
        self._limits = np.array([min(m.out_features, m.in_features) for m in spec.matrices], dtype=np.int64)
        self._locations = spec.locations
        kinds = np.array([m.type for m in spec.matrices])
        layers = np.array([m.layer for m in spec.matrices], dtype=np.int64)
        members = {f"rank/{kind}": kinds == kind for kind in dict.fromkeys(kinds.tolist())}
        members |= {f"rank/layer_{layer}": layers == layer for layer in sorted(set(layers.tolist()))}
        self._groups = list(members)
        self._members = np.array(list(members.values()), dtype=np.int64)  # (G, M)

    def ranks(self, action: Array, info: Mapping[str, Any]) -> Array:
        """The rank that each matrix trained at: action (L, 2M) -> (L, M) int64."""
        if "executed_rank" in info:
            return np.asarray(info["executed_rank"])
        chosen: Array = self._ranks[action[:, ::2]]
        return np.minimum(chosen, self._limits) if len(self._limits) else chosen

    def __call__(self, transition: Transition) -> dict[str, Array]:
        """Scalars by name, each (L,) float64.

        ``mean_rank`` over all matrices; ``rank/<type>`` and ``rank/layer_<n>``: over the matrices of a type or layer;
        ``location/<name>``: share of the trained components that were taken there, in [0, 1] and 1 in all, or NaN where
        nothing was trained. A matrix with rank 0 has no location.
        """
        ranks = self.ranks(transition.action, transition.info)
        here = transition.action[:, 1::2, None] == np.arange(len(self._locations))  # (L, M, S)
        at = (ranks[:, :, None] * here).sum(1)  # (L, S)
        total = at.sum(1, keepdims=True)
        shares = np.where(total > 0, at / np.maximum(total, 1), np.nan)
        places = {f"location/{name}": shares[:, s] for s, name in enumerate(self._locations)}
        return {"mean_rank": ranks.mean(1), **self._group_means(ranks), **places}

    def _group_means(self, ranks: Array) -> dict[str, Array]:
        if not self._groups:
            return {}
        means = self._members @ ranks.T / self._members.sum(1, keepdims=True)  # (G, L)
        return dict(zip(self._groups, means, strict=True))


class ProgressBar:
    """A bar on stderr with the rewards' and the losses' mean over lanes; nothing at all when that is no terminal."""

    def __init__(self, total: int | None = None) -> None:
        """Count up to `total` env steps, or without an end."""
        from tqdm import tqdm

        self._bar: Any = tqdm(total=total, unit="step", dynamic_ncols=True, disable=None)

    def __call__(self, transition: Transition, scalars: dict[str, float], env_steps: int) -> None:
        """One env step more."""
        if self._bar.disable:
            return
        means = {name: _finite_mean(value) for name, value in _reward_and_loss(transition).items()}
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in means.items()}, refresh=False)
        self._bar.update(env_steps - self._bar.n)

    def close(self) -> None:
        """Leave the terminal as it is."""
        self._bar.close()


class TensorBoard:
    """Scalars of every env step as TensorBoard events; a context manager, or call `close` at the end.

    ``reward``, ``L1`` and the scalars of `AllocationScalars` as means over the lanes in which they are finite, and
    ``agent/<name>`` for everything that the agent reports; what is not finite is left out.
    """

    def __init__(self, folder: Path | str, env: AnyEnv) -> None:
        """Open an event file.

        Args:
            folder: Where to; made when missing.
            env: The environment that will be observed.

        Raises:
            LeLoRAError: Not a LeLoRA environment, or the folder cannot be written to.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import FileWriter

        self._describe, self._summary, self._folder = AllocationScalars(AgentSpec.from_env(env)), Summary, folder
        with self._understandable():
            self._writer: Any = FileWriter(str(folder))

    def __call__(self, transition: Transition, scalars: dict[str, float], env_steps: int) -> None:
        """Write the scalars of env step `env_steps`.

        Raises:
            LeLoRAError: They cannot be written.
        """
        lanes = {**_reward_and_loss(transition), **self._describe(transition)}
        values = {name: _finite_mean(value) for name, value in lanes.items()}
        values |= {f"agent/{name}": value for name, value in scalars.items()}
        finite = [{"tag": name, "simple_value": value} for name, value in values.items() if math.isfinite(value)]
        with self._understandable():
            self._writer.add_summary(self._summary(value=finite), env_steps)

    @contextlib.contextmanager
    def _understandable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise LeLoRAError(f"TensorBoard events cannot be written to {self._folder}: {error.strerror or error}. "
                              "Give a folder that you may write to.") from error

    def close(self) -> None:
        """Write what is still in memory."""
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()


@contextlib.contextmanager
def observers(env: AnyEnv, on_step: OnStep | None = None, *, progress: bool = False,
              tensorboard: Path | str | None = None, total: int | None = None) -> Iterator[OnStep]:
    """All the observers that are asked for as one, closed at the end; their meaning is that of `run`'s arguments.

    Args:
        env: The environment that will be observed.
        on_step: One of the caller's own; called last.
        progress: Whether to show a `ProgressBar`.
        tensorboard: Folder of a `TensorBoard`.
        total: Env steps that are to come, as far as known.

    Raises:
        LeLoRAError: See `TensorBoard`.
    """
    with contextlib.ExitStack() as stack:
        watching: list[OnStep] = []
        if tensorboard is not None:
            watching.append(stack.enter_context(TensorBoard(tensorboard, env)))
        if progress:
            watching.append(stack.enter_context(contextlib.closing(ProgressBar(total))))
        if on_step is not None:
            watching.append(on_step)

        def all_of_them(transition: Transition, scalars: dict[str, float], env_steps: int) -> None:
            for observer in watching:
                observer(transition, scalars, env_steps)

        yield all_of_them


def _reward_and_loss(transition: Transition) -> dict[str, Array]:
    """``reward``, and ``L1`` where the environment has it; each (L,)."""
    loss = {"L1": np.asarray(transition.info["L1"])} if "L1" in transition.info else {}
    return {"reward": transition.reward, **loss}


def _finite_mean(values: Array) -> float:
    """Mean of what is finite, NaN if nothing is."""
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else math.nan
