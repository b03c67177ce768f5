"""REINFORCE for allocations (Williams, 1992), as the LeLoRA paper uses it: the whole algorithm in one file.

After each env step, with the shared scalar reward r of a lane and a_m the choice of matrix m::

    baseline b   = running mean of recent rewards, as it was before this reward
    loss         = - mean over lanes [ (r - b) · mean over matrices  log p(a_m | features_m) ]     (Eq. 9)
    one Adam step on the loss                                                                      (Eq. 10)

The paper minimises the loss R = L1 + α·L2 = -r, so the signs agree. Its 1/n is read as the mean over
the n matrices. Preset ``paper`` is known to collapse to one choice for all matrices within tens of
steps on real runs (the loss falls while training, so a lagging baseline praises whatever was done);
it is here because it is what the paper describes, and it does learn where rewards are stationary.

Shapes: L lanes · M matrices · F features.
"""

import copy
import logging
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from agents.agent import Array, Transition
from agents.options import annotations_of, check_options
from agents.policy import ActionDistribution, PerMatrixPolicy
from agents.spec import AgentSpec
from lelora_env.errors import LeLoRAError, UnknownNameError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReinforceConfig:
    """Settings of REINFORCE; the defaults are the paper's (Appendix B).

    Attributes:
        learning_rate: Adam's, above 0.
        baseline_decay: Decay of the running mean of rewards, in [0, 1).
        embedding: Dimensions of the layer and the type embedding.
        hidden: Widths of the network's hidden layers.
        columns: Continuous features to read; ``None`` = norm and singular values.
        rank_zero_rule: Whether a matrix with rank 0 counts no location (see `ActionDistribution`).
    """

    learning_rate: float = 1e-3
    baseline_decay: float = 0.9
    embedding: int = 200
    hidden: tuple[int, ...] = (1024, 256, 64)
    columns: tuple[str, ...] | None = None
    rank_zero_rule: bool = False

    def __post_init__(self) -> None:
        kinds = annotations_of(type(self))
        check_options("reinforce", {name: getattr(self, name) for name in kinds}, kinds)
        rules = {"learning_rate": (math.isfinite(self.learning_rate) and self.learning_rate > 0, "a positive number"),
                 "baseline_decay": (0 <= self.baseline_decay < 1, "in [0, 1)"),
                 "embedding": (self.embedding >= 0, "an integer of at least 0"),
                 "hidden": (min(self.hidden, default=1) >= 1, "a list of integers of at least 1")}
        for name, (fits, rule) in rules.items():
            if not fits:
                raise LeLoRAError(f"{name} must be {rule} (got {getattr(self, name)!r})")


PRESETS: dict[str, ReinforceConfig] = {"paper": ReinforceConfig()}
"""Named settings; keyword options of `Reinforce` change single ones."""


class RunningMean:
    """Exponential running mean, corrected for its start at 0; 0 while nothing has been seen."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.total = 0.0
        self.count = 0

    @property
    def value(self) -> float:
        """The mean of what was added so far."""
        return self.total / (1 - self.decay**self.count) if self.count else 0.0

    def add(self, value: float) -> None:
        """Let one more value count."""
        self.total = self.decay * self.total + (1 - self.decay) * value
        self.count += 1


class Reinforce:
    """A policy network trained by REINFORCE, one update per env step over all lanes (an `Agent`)."""

    def __init__(self, spec: AgentSpec, *, preset: str = "paper", seed: int = 0, device: str = "cpu",
                 policy: nn.Module | None = None, **options: Any) -> None:
        """Build network, optimiser and a noise generator of its own.

        Args:
            spec: What is observed and chosen.
            preset: A name in `PRESETS`.
            seed: Seed of the initial weights and of the sampling noise.
            device: Torch device of the network.
            policy: A network to train instead of the preset's `PerMatrixPolicy`: (L, M, F) ->
                rank logits (L, M, R) and location logits (L, M, S).
            **options: Fields of `ReinforceConfig` that differ from the preset.

        Raises:
            UnknownNameError: No such preset or option.
            LeLoRAError: An option's value is of the wrong kind or out of range.
        """
        if preset not in PRESETS:
            raise UnknownNameError("REINFORCE preset", preset, PRESETS)
        for name in options:
            if name not in ReinforceConfig.__dataclass_fields__:
                raise UnknownNameError("REINFORCE option", name, ReinforceConfig.__dataclass_fields__)
        self.spec, self.preset, self.device = spec, preset, _device(device)
        self.config = replace(PRESETS[preset], **options)
        if policy is None:
            policy = PerMatrixPolicy(spec, embedding=self.config.embedding, hidden=self.config.hidden,
                                     columns=self.config.columns, seed=seed)
        self.policy = policy.to(self.device)
        self.optimiser = torch.optim.Adam(self.policy.parameters(), lr=self.config.learning_rate)
        self.baseline = RunningMean(self.config.baseline_decay)
        self.generator = torch.Generator().manual_seed(seed)
        self._rank_mask = torch.as_tensor(spec.rank_mask, device=self.device)
        self._location_mask = torch.as_tensor(spec.location_mask, device=self.device)

    def distribution(self, observation: Array) -> ActionDistribution:
        """The policy's choice probabilities for observations of shape (L, M, F)."""
        rank_logits, location_logits = self.policy(torch.as_tensor(observation, device=self.device))
        zero = self.spec.rank_set.index(0) if self.config.rank_zero_rule and 0 in self.spec.rank_set else None
        return ActionDistribution.from_logits(rank_logits, location_logits, rank_mask=self._rank_mask,
                                              location_mask=self._location_mask, zero_rank=zero)

    def act(self, observation: Array) -> Array:
        """Sample an allocation for every lane: (L, M, F) -> (L, 2M) int64."""
        with torch.no_grad():
            choice = self.distribution(observation).sample(self.generator)  # (L, M, 2)
        action: Array = choice.flatten(1).cpu().numpy()
        return action

    def update(self, transition: Transition) -> dict[str, float]:
        """One Adam step. Lanes whose reward is not finite are left out, with a log entry.

        Returns:
            ``loss``, ``baseline``, ``advantage`` (mean over lanes), ``entropy`` and ``log_prob``
            (nats, mean over matrices), ``gradient_norm``, ``skipped_lanes``; only the last if no
            lane is left.

        Raises:
            LeLoRAError: The gradient is not finite; nothing has been changed then.
        """
        reward = torch.as_tensor(transition.reward, dtype=torch.float64)
        usable = torch.isfinite(reward)  # (L,)
        skipped = float((~usable).sum())
        if skipped:
            logger.warning("REINFORCE leaves %d of %d lanes out of this update: their reward is not finite",
                           int(skipped), len(reward))
        if not bool(usable.any()):
            return {"skipped_lanes": skipped}
        reward, rows = reward[usable], usable.numpy()
        baseline = self.baseline.value
        scalars = self._step(transition.observation[rows], transition.action[rows], reward - baseline)
        self.baseline.add(float(reward.mean()))
        return {**scalars, "baseline": baseline, "skipped_lanes": skipped}

    def _step(self, observation: Array, action: Array, advantage: Tensor) -> dict[str, float]:
        """Follow the policy gradient once; `advantage` is (L,) float64."""
        distribution = self.distribution(observation)
        choice = torch.as_tensor(action, device=self.device).reshape(len(action), -1, 2)  # (L, M, 2)
        log_prob = distribution.log_prob(choice).mean(dim=1)  # (L,)
        loss = -(advantage.to(log_prob) * log_prob).mean()
        self.optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
        norm = float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients])))
        if not math.isfinite(norm):
            raise LeLoRAError("the policy gradient is not finite; the policy was left as it was. Lower the agent's "
                              "learning_rate, or use scaled observations (raw_observation=False)")
        self.optimiser.step()
        means = {"entropy": distribution.entropy(), "log_prob": log_prob, "advantage": advantage, "loss": loss}
        return {**{name: float(values.detach().mean()) for name, values in means.items()}, "gradient_norm": norm}

    def state_dict(self) -> dict[str, Any]:
        """Policy, optimiser, reward baseline, noise and settings; a snapshot, not a view."""
        state: dict[str, Any] = {
            "agent": "reinforce", "preset": self.preset, "config": _plain(asdict(self.config)),
            "spec": self.spec.fingerprint(),
            "policy": dict(self.policy.state_dict()), "optimiser": self.optimiser.state_dict(),
            "baseline": {"total": self.baseline.total, "count": self.baseline.count},
            "generator": self.generator.get_state()}
        return copy.deepcopy(state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            LeLoRAError: The state is of another agent, of other features, actions or network.
        """
        if state.get("agent") != "reinforce":
            raise LeLoRAError(f"expected the state of a REINFORCE agent (got one of {state.get('agent')!r})")
        self.spec.check_fingerprint(state["spec"])
        here = _plain(asdict(self.config))
        if here != state["config"]:
            other = {k: v for k, v in state["config"].items() if here.get(k) != v}
            raise LeLoRAError(f"this state was saved with other settings; build the agent with {other} to load it")
        try:
            self.policy.load_state_dict(state["policy"])
        except RuntimeError as error:
            text = " ".join(str(error).split())
            raise LeLoRAError(f"the saved policy does not fit this environment: {text}") from None
        self.optimiser.load_state_dict(copy.deepcopy(state["optimiser"]))
        self.baseline.total, self.baseline.count = state["baseline"]["total"], state["baseline"]["count"]
        self.generator.set_state(state["generator"].cpu())


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise LeLoRAError(f"device must be a torch device that this machine has, such as 'cpu' or 'cuda' (got "
                          f"{name!r}: {str(error).splitlines()[0]})") from None


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """Settings in the form in which they come back from JSON: lists for tuples."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}
