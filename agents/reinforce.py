"""REINFORCE for allocations (Williams, 1992): the whole algorithm in one file.

After each env step, with the shared scalar reward r of a lane and a_m the choice of matrix m::

    advantage    = r - b
    loss         = - mean over lanes [ advantage · mean over matrices  log p(a_m | features_m) ]     (Eq. 9)
    one Adam step on the loss                                                                        (Eq. 10)

The paper minimises the loss R = L1 + α·L2 = -r, so the signs agree. Its 1/n is read as the mean over
the n matrices. The presets differ in the baseline b, in what the network sees and where it begins:

``paper``: b is a running mean of recent rewards, as it was before this one. On real runs it collapses to one choice for
all matrices within tens of steps: the loss falls while training goes on, so a lagging baseline praises whatever was
done. It is here because it is what the paper describes, and it does learn where rewards are stationary.

``practical`` (the default): L1 = L1_before + L2, so r = -L1_before - (1+α)·L2 - prices, and -L1_before is known before
the action: an exact part of the baseline. From what is left, the mean of the other lanes at the same env step is taken
off (leave-one-out; Kool et al., 2019); with one lane, its slow mean. The difference is divided by its slow root mean
square and clipped, so that neither the scale of a task nor one diverging lane decides the size of an update.

Shapes: L lanes · M matrices · F features.
"""

import contextlib
import copy
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from agents.agent import Array, Transition
from agents.baseline import RunningMean, expected, known_part, scaled
from agents.files import load_policy
from agents.options import annotations_of, check_options
from agents.policy import ActionDistribution, LayerAs, PerMatrixPolicy, gumbel, require_finite
from agents.spec import AgentSpec
from lelora_env.capture import Captured
from lelora_env.errors import LeLoRAError, UnknownNameError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReinforceConfig:
    """Settings of REINFORCE; the defaults here are the paper's (Appendix B), see `PRESETS`.

    Attributes:
        learning_rate: Adam's, above 0.
        baseline: ``"running_mean"`` of rewards, or ``"known"``: see the top of the file.
        baseline_decay: Decay of the running means, in [0, 1).
        scaled: Whether advantages are divided by their slow root mean square, and clipped (`agents.baseline.scaled`).
        entropy_bonus: Weight of the mean entropy (nats) in the loss, at least 0.
        network: Body of the network, see `agents.bodies`.
        embedding: Dimensions of the layer and the type embedding.
        layer_as: How the layer is read, see `PerMatrixPolicy`.
        hidden: Widths of the network's hidden layers.
        head_scale: Factor of the heads' initial weights, at least 0.
        columns: Continuous features to read; ``None`` = norm and singular values.
        rank_zero_rule: Whether a matrix with rank 0 counts no location (see `ActionDistribution`).
    """

    learning_rate: float = 1e-3
    baseline: Literal["running_mean", "known"] = "running_mean"
    baseline_decay: float = 0.9
    scaled: bool = False
    entropy_bonus: float = 0.0
    network: str = "mlp"
    embedding: int = 200
    layer_as: LayerAs = "embedding"
    hidden: tuple[int, ...] = (1024, 256, 64)
    head_scale: float = 1.0
    columns: tuple[str, ...] | None = None
    rank_zero_rule: bool = False

    def __post_init__(self) -> None:
        kinds = annotations_of(type(self))
        check_options("reinforce", {name: getattr(self, name) for name in kinds}, kinds)
        rules = {"learning_rate": (math.isfinite(self.learning_rate) and self.learning_rate > 0, "a positive number"),
                 "baseline_decay": (0 <= self.baseline_decay < 1, "in [0, 1)"),
                 "baseline": (self.baseline in ("running_mean", "known"), "'running_mean' or 'known'"),
                 "entropy_bonus": (math.isfinite(self.entropy_bonus) and self.entropy_bonus >= 0, "at least 0"),
                 "head_scale": (math.isfinite(self.head_scale) and self.head_scale >= 0, "at least 0"),
                 "embedding": (self.embedding >= 0, "an integer of at least 0"),
                 "hidden": (min(self.hidden, default=1) >= 1, "a list of integers of at least 1")}
        for name, (fits, rule) in rules.items():
            if not fits:
                raise LeLoRAError(f"{name} must be {rule} (got {getattr(self, name)!r})")


NETWORK_OPTIONS = ("network", "embedding", "layer_as", "hidden", "head_scale", "columns")
"""Fields of `ReinforceConfig` that `PerMatrixPolicy` takes."""

PRESETS: dict[str, ReinforceConfig] = {
    "practical": ReinforceConfig(
        learning_rate=5e-4, baseline="known", baseline_decay=0.99, scaled=True, entropy_bonus=0.05, embedding=8,
        layer_as="depth", hidden=(64, 64), head_scale=0.01, rank_zero_rule=True,
    ),
    "paper": ReinforceConfig(),
}
"""Named settings; keyword options of `Reinforce` change single ones."""


class Reinforce:
    """A policy network trained by REINFORCE, one update per env step over all lanes (an `Agent`)."""

    def __init__(self, spec: AgentSpec, *, preset: str = "practical", seed: int = 0, device: str | None = None,
                 cuda_graphs: bool = True, policy: nn.Module | None = None,
                 policy_file: str | Path | None = None, **options: Any) -> None:
        """Build network, optimiser and a noise generator of its own.

        Args:
            spec: What is observed and chosen.
            preset: A name in `PRESETS`.
            seed: Seed of the initial weights and of the sampling noise.
            device: Torch device of the network; ``None`` = the environment's.
            cuda_graphs: On CUDA, record acting and learning once and replay them. A `policy` of your own must then
                be made of tensor operations alone: what Python decides in it is decided once.
            policy: A network to train instead of the preset's `PerMatrixPolicy`: (L, M, F) ->
                rank logits (L, M, R) and location logits (L, M, S).
            policy_file: A policy to start from (`agents.files.save_policy`); brings its own network options.
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
        self.spec, self.preset, self.device = spec, preset, _device(device or spec.device)
        self.config = replace(PRESETS[preset], **options)
        if policy is not None and policy_file is not None:
            raise LeLoRAError("policy and policy_file exclude each other: give one of them")
        if policy is None:
            policy = self._network(seed, policy_file, options)
        self.policy = policy.to(self.device)
        self.parameters = [p for p in self.policy.parameters() if p.requires_grad]
        on_gpu = self.device.type == "cuda"
        self.optimiser = torch.optim.Adam(self.parameters, lr=self.config.learning_rate, capturable=on_gpu,
                                          fused=on_gpu or None)
        self.baseline = RunningMean(self.config.baseline_decay)
        self.square = RunningMean(self.config.baseline_decay)
        self.generator = torch.Generator().manual_seed(seed)
        self._rank_mask = torch.as_tensor(spec.rank_mask, device=self.device)
        self._location_mask = torch.as_tensor(spec.location_mask, device=self.device)
        self._captures = cuda_graphs and on_gpu
        self._record()

    def _network(self, seed: int, policy_file: str | Path | None, options: dict[str, Any]) -> PerMatrixPolicy:
        if policy_file is None:
            wanted = {name: getattr(self.config, name) for name in NETWORK_OPTIONS}
            return PerMatrixPolicy(self.spec, seed=seed, **wanted)
        for name in NETWORK_OPTIONS:
            if name in options:
                raise LeLoRAError(f"the policy file brings its own {name}: leave {name} out")
        policy = load_policy(policy_file, self.spec)
        given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in policy.settings.items()}
        self.config = replace(self.config, **given)
        return policy

    @property
    def network(self) -> PerMatrixPolicy | None:
        """The network, where it is one that a policy file can hold."""
        return self.policy if isinstance(self.policy, PerMatrixPolicy) else None

    def _own_kernels(self, state: dict[str, Any]) -> dict[str, Any]:
        """A state of Adam with this device's way of computing, whatever device it was saved on."""
        for group in state["param_groups"]:
            group |= {key: self.optimiser.defaults[key] for key in ("capturable", "fused")}
        return state

    def _record(self) -> None:
        """Forget recorded graphs and their inputs: they hold the addresses of tensors that have been replaced."""
        captures = self._captures
        self._inputs: dict[str, Tensor] = {}
        self._choose = Captured("agent's choice", self._draw, captures)
        self._follow = Captured("agent's gradient", self._differentiate, captures)
        self._move = Captured("agent's update", self._apply, captures, self._unmoved)

    def distribution(self, observation: Array) -> ActionDistribution:
        """The policy's choice probabilities for observations of shape (L, M, F).

        Raises:
            LeLoRAError: They are not finite, or the observation names a layer that the policy does not know.
        """
        self._check(observation)
        found = self._distribution(torch.as_tensor(observation, device=self.device))
        require_finite(bool(found.finite))
        return found

    def probabilities(self, observation: Array) -> Array:
        """The probability of every choice: (L, M, F) -> (L, M, R, S) float32; see `ActionDistribution.joint`."""
        with torch.no_grad():
            found: Array = self.distribution(observation).joint().cpu().numpy()
        return found

    def _check(self, observation: Array) -> None:
        if isinstance(self.policy, PerMatrixPolicy):
            self.policy.check(observation)

    def _distribution(self, observation: Tensor) -> ActionDistribution:
        rank_logits, location_logits = self.policy(observation)
        zero = self.spec.rank_set.index(0) if self.config.rank_zero_rule and 0 in self.spec.rank_set else None
        return ActionDistribution.from_logits(rank_logits, location_logits, rank_mask=self._rank_mask,
                                              location_mask=self._location_mask, zero_rank=zero)

    def _put(self, **values: Tensor) -> None:
        """Copy values into the tensors that the recorded functions read; new shapes mean new recordings."""
        if any(name in self._inputs and self._inputs[name].shape != value.shape for name, value in values.items()):
            self._record()
        for name, value in values.items():
            if name not in self._inputs:
                with torch.inference_mode(False):
                    self._inputs[name] = value.to(self.device, copy=True)
            else:
                self._inputs[name].copy_(value, non_blocking=True)

    def act(self, observation: Array) -> Array:
        """Sample an allocation for every lane: (L, M, F) -> (L, 2M) int64.

        Raises:
            LeLoRAError: The policy's probabilities are not finite, or it does not know a layer.
        """
        self._check(observation)
        lanes, matrices, _ = observation.shape
        ranks, locations = self._rank_mask.shape[1], self._location_mask.shape[1]
        noise = [gumbel((lanes, matrices, choices), self.generator) for choices in (ranks, locations)]
        self._put(observation=torch.from_numpy(observation), rank_noise=noise[0], location_noise=noise[1])
        drawn = self._choose().cpu().numpy()  # (L·2M + 1,)
        require_finite(bool(drawn[-1]))
        action: Array = drawn[:-1].reshape(lanes, -1).copy()
        return action

    @torch.no_grad()
    def _draw(self) -> Tensor:
        """The choices of the noise in place, flat, and behind them whether all is finite."""
        distribution = self._distribution(self._inputs["observation"])
        choice = distribution.choose(self._inputs["rank_noise"], self._inputs["location_noise"])
        return torch.cat([choice.flatten(), distribution.finite.long().view(1)])

    def update(self, transition: Transition) -> dict[str, float]:
        """One Adam step. Lanes whose reward is not finite are left out, with a log entry.

        Returns:
            ``loss``, ``baseline``, ``advantage`` (mean over lanes), ``entropy`` and ``log_prob``
            (nats, mean over matrices), ``gradient_norm``, ``skipped_lanes``; only the last if no
            lane is left.

        Raises:
            LeLoRAError: The gradient is not finite; nothing has been changed then.
        """
        reward = np.asarray(transition.reward, dtype=np.float64)
        usable = np.isfinite(reward)  # (L,)
        skipped = float((~usable).sum())
        if skipped:
            logger.warning("REINFORCE leaves %d of %d lanes out of this update: their reward is not finite",
                           int(skipped), len(reward))
        if not usable.any():
            return {"skipped_lanes": skipped}
        slow, alone = self.baseline.value, self.config.baseline == "running_mean"
        known = np.zeros(len(reward)) if alone else known_part(transition)
        surprise = np.where(usable, reward - known, 0.0)
        baseline = known + (slow if alone else expected(surprise, usable, slow))
        advantage = np.where(usable, reward - baseline, 0.0)
        advantage = scaled(advantage, usable, self.square) if self.config.scaled else advantage
        scalars = self._step(transition, advantage, usable / usable.sum())
        self.baseline.add(float(surprise[usable].mean()))
        return {**scalars, "baseline": float(baseline[usable].mean()), "skipped_lanes": skipped}

    def _step(self, transition: Transition, advantage: Array, weight: Array) -> dict[str, float]:
        """Follow the policy gradient once; `advantage` and `weight` (of a lane in the mean) are (L,) float64."""
        lanes = np.arange(len(advantage))
        rows = np.where(weight > 0, lanes, lanes[weight > 0][0])  # a lane that does not count repeats one that does
        observation, action = transition.observation[rows], transition.action[rows]
        self._check(observation)
        self._put(observation=torch.from_numpy(observation),
                  choice=torch.from_numpy(action).reshape(len(lanes), -1, 2),
                  advantage=torch.from_numpy(advantage).float(), weight=torch.from_numpy(weight).float())
        names = ("loss", "entropy", "log_prob", "gradient_norm")
        scalars = dict(zip(names, self._follow().tolist(), strict=True))
        if not math.isfinite(scalars["gradient_norm"]):
            raise LeLoRAError("the policy gradient is not finite; the policy was left as it was. Lower the agent's "
                              "learning_rate, or use scaled observations (raw_observation=False)")
        self._move()
        return {**scalars, "advantage": float((advantage * weight).sum())}

    @torch.enable_grad()
    def _differentiate(self) -> Tensor:
        """Put the gradient of the loss into place; returns loss, entropy, log-probability and gradient norm, (4,)."""
        distribution, weight = self._distribution(self._inputs["observation"]), self._inputs["weight"]
        log_prob = distribution.log_prob(self._inputs["choice"]).mean(dim=1)  # (L,)
        entropy = (weight * distribution.entropy().mean(dim=1)).sum()
        loss = -(weight * self._inputs["advantage"] * log_prob).sum() - self.config.entropy_bonus * entropy
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is None or parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.copy_(gradient)
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients if g is not None]))
        return torch.stack([loss, entropy, (weight * log_prob).sum(), norm]).detach()

    def _apply(self) -> None:
        self.optimiser.step()

    @contextlib.contextmanager
    def _unmoved(self) -> Iterator[None]:
        """Whatever Adam does in here is taken back, in place."""
        weights = [parameter.detach().clone() for parameter in self.parameters]
        moments = [{k: v.clone() for k, v in self.optimiser.state[p].items()} for p in self.parameters]
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, weight, old in zip(self.parameters, weights, moments, strict=True):
                    parameter.copy_(weight)
                    for name, tensor in self.optimiser.state[parameter].items():
                        tensor.copy_(old[name]) if name in old else tensor.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Policy, optimiser, reward baseline, noise and settings; a snapshot, not a view."""
        state: dict[str, Any] = {
            "agent": "reinforce", "preset": self.preset, "config": _plain(asdict(self.config)),
            "spec": self.spec.fingerprint(),
            "policy": dict(self.policy.state_dict()), "optimiser": self.optimiser.state_dict(),
            "baseline": self.baseline.state(), "square": self.square.state(),
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
        self.optimiser.load_state_dict(self._own_kernels(copy.deepcopy(state["optimiser"])))
        self._record()
        self.baseline.set(state["baseline"])
        self.square.set(state["square"])
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
