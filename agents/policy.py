"""One network, applied to every matrix, and the distribution of choices that it gives.

Shapes: L lanes · M matrices · F features · R ranks · S locations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from agents.agent import Array
from agents.bodies import initialise, make_body
from agents.spec import AgentSpec
from lelora_env.errors import LeLoRAError, UnknownNameError

LayerAs = Literal["embedding", "depth"]
HATS = 7
"""Points at which a policy tells relative depths apart."""

MASKED = -1e9
"""Logit of an illegal choice: its probability is exactly 0, and gradients stay finite."""


class PerMatrixPolicy(nn.Module):
    """Logits for the rank and the location of every matrix, from that matrix's features alone.

    The weights are shared by all matrices, so any number of matrices can be read. As in the paper
    (Appendix B): layer and type index each go through an embedding of their own, are joined to
    the continuous features, and an MLP with ReLU ends in two linear heads. Every weight, the
    embeddings' too, is Kaiming-uniform (He et al., 2015), biases are 0.

    The paper's network reads the Frobenius norm and the singular values, nothing else. The
    environment's ``progress`` column and the optional extras are therefore *not* read unless
    `columns` names them. The paper reads plain values: make the environment with
    ``raw_observation=True`` for that; the environment's default, scaled ones train better.

    With ``layer_as="depth"`` the layer is read as its relative depth, from 0 (first) to 1 (last), through `HATS`
    overlapping hat functions. Such a policy can be used on a model with more or fewer layers.
    """

    columns: Tensor

    def __init__(self, spec: AgentSpec, *, network: str = "mlp", embedding: int = 200, layer_as: LayerAs = "embedding",
                 hidden: Sequence[int] = (1024, 256, 64), columns: Sequence[str] | None = None,
                 head_scale: float = 1.0, seed: int = 0) -> None:
        """Build the network; neither reads nor moves the global random generator.

        Args:
            spec: Names and sizes of the environment.
            network: The body between features and heads: a name in `agents.bodies.BODIES`.
            embedding: Dimensions of the layer and of the type embedding; 0 leaves both out.
            layer_as: Whether the layer index goes through an embedding or is read as relative depth.
            hidden: Widths of the hidden layers.
            columns: Continuous features to read, by name; ``None`` = ``norm`` and all ``sv_*``.
            head_scale: Factor of the heads' initial weights; near 0 every choice begins equally likely.
            seed: Seed of the initial weights.

        Raises:
            UnknownNameError: `columns` names a feature that the environment does not have; or no such body.
        """
        super().__init__()
        names = spec.feature_names
        chosen = [n for n in names if n == "norm" or n.startswith("sv_")] if columns is None else list(columns)
        for name in chosen:
            if name not in names:
                raise UnknownNameError("feature", name, names)
        if layer_as not in get_args(LayerAs):
            raise UnknownNameError("layer_as", layer_as, get_args(LayerAs))
        self.settings: dict[str, Any] = {
            "network": network, "embedding": embedding, "layer_as": layer_as, "hidden": list(hidden),
            "columns": chosen, "head_scale": head_scale}
        self.register_buffer("columns", torch.tensor([names.index(name) for name in chosen]), persistent=False)
        embedded = [n for n in spec.index_ranges if embedding and not (n == "layer" and layer_as == "depth")]
        self.indices = {name: names.index(name) for name in embedded}
        self.ranges = dict(spec.index_ranges)
        self.depth = names.index("layer") if layer_as == "depth" and "layer" in self.ranges else None
        with torch.random.fork_rng(devices=[]):
            sizes = {name: high - low + 1 for name, (low, high) in self.ranges.items() if name in self.indices}
            self.embeddings = nn.ModuleDict({f"{n}_index": nn.Embedding(k, embedding) for n, k in sizes.items()})
            inputs = embedding * len(sizes) + len(chosen) + (0 if self.depth is None else HATS)
            self.body = make_body(network, inputs, hidden, torch.Generator())
            self.rank_head = nn.Linear(self.body.outputs, len(spec.rank_set))
            self.location_head = nn.Linear(self.body.outputs, len(spec.locations))
        initialise(self, torch.Generator().manual_seed(seed))
        for head in (self.rank_head, self.location_head):
            head.weight.data.mul_(head_scale)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of each matrix's choices.

        Args:
            observation: (L, M, F) float32.

        Returns:
            Rank logits (L, M, R) and location logits (L, M, S), not yet masked.
        """
        parts = [self._embed(name, observation[..., column]) for name, column in self.indices.items()]
        values = observation.index_select(-1, self.columns)
        if self.depth is not None:
            parts.append(self._hats(observation[..., self.depth]))
        hidden = self.body(torch.cat([*parts, values], dim=-1))  # (L, M, H)
        return self.rank_head(hidden), self.location_head(hidden)

    def check(self, observation: Array) -> None:
        """See that the network has an embedding for every layer and type index of an observation (L, M, F).

        Raises:
            LeLoRAError: It has not.
        """
        for name, column in self.indices.items():
            low, high = self.ranges[name]
            index = np.rint(observation[..., column])
            smallest, largest = index.min(), index.max()
            if not low <= smallest <= largest <= high:  # not so for NaN either
                raise LeLoRAError(f"the policy was made for {name} indices from {low} to {high}, the observation holds "
                                  f"{smallest:g} to {largest:g}; make a policy for this environment")

    def _hats(self, layer: Tensor) -> Tensor:
        """Relative depth as the weights of its two neighbours among `HATS` points: (L, M) -> (L, M, HATS)."""
        low, high = self.ranges["layer"]
        place = (layer - low) / max(1, high - low) * (HATS - 1)
        return (1 - (place.unsqueeze(-1) - torch.arange(HATS, device=layer.device)).abs()).clamp_min(0)

    def _embed(self, name: str, values: Tensor) -> Tensor:
        low, high = self.ranges[name]
        index = values.round().long().clamp(low, high) - low  # `check` has seen that nothing is clamped
        embedded: Tensor = self.embeddings[f"{name}_index"](index)  # (L, M, E)
        return embedded


@dataclass(frozen=True, eq=False)
class ActionDistribution:
    """Independent categorical choices of rank and location, for every lane and matrix.

    Attributes:
        rank_log_probs: (L, M, R), normalised.
        location_log_probs: (L, M, S), normalised.
        zero_rank: Index of rank 0, if the rank-0 rule is wanted: a matrix that gets rank 0 has no
            location, so the location counts neither in log-probability nor in entropy.
            ``None`` = the paper's plain product of the two.
    """

    rank_log_probs: Tensor
    location_log_probs: Tensor
    zero_rank: int | None = None

    @classmethod
    def from_logits(cls, rank_logits: Tensor, location_logits: Tensor, *, rank_mask: Tensor | None = None,
                    location_mask: Tensor | None = None, zero_rank: int | None = None) -> "ActionDistribution":
        """Mask out the illegal choices, and normalise.

        Args:
            rank_logits: (L, M, R).
            location_logits: (L, M, S).
            rank_mask: Legal ranks, (M, R) bool; ``None`` = all.
            location_mask: Legal locations, (M, S) bool; ``None`` = all.
            zero_rank: See the class.
        """
        log_probs = [
            (logits if mask is None else logits.masked_fill(~mask, MASKED)).log_softmax(dim=-1)
            for logits, mask in ((rank_logits, rank_mask), (location_logits, location_mask))
        ]
        return cls(log_probs[0], log_probs[1], zero_rank)

    @property
    def finite(self) -> Tensor:
        """Whether every probability is a number, () bool; see `require_finite`."""
        return torch.isfinite(self.rank_log_probs).all() & torch.isfinite(self.location_log_probs).all()

    def sample(self, generator: torch.Generator) -> Tensor:
        """Draw a (rank index, location index) for every lane and matrix: (L, M, 2) int64.

        Raises:
            LeLoRAError: The probabilities are not finite.
        """
        require_finite(bool(self.finite))
        shapes = self.rank_log_probs.shape, self.location_log_probs.shape
        return self.choose(*(gumbel(shape, generator).to(self.rank_log_probs.device) for shape in shapes))

    def choose(self, rank_noise: Tensor, location_noise: Tensor) -> Tensor:
        """The draw that given `gumbel` noise, (L, M, R) and (L, M, S), leads to: (L, M, 2) int64."""
        noisy = self.rank_log_probs + rank_noise, self.location_log_probs + location_noise
        return torch.stack([values.argmax(dim=-1) for values in noisy], dim=-1)

    def mode(self) -> Tensor:
        """The likeliest choices, (L, M, 2) int64."""
        return torch.stack([self.rank_log_probs.argmax(-1), self.location_log_probs.argmax(-1)], dim=-1)

    def joint(self) -> Tensor:
        """The probability of every pair of rank and location, (L, M, R, S); rank 0 is spread over all locations."""
        return self.rank_log_probs.exp().unsqueeze(-1) * self.location_log_probs.exp().unsqueeze(-2)

    def log_prob(self, choice: Tensor) -> Tensor:
        """Log-probability in nats of a (L, M, 2) choice, (L, M)."""
        rank = self.rank_log_probs.gather(-1, choice[..., :1]).squeeze(-1)
        location = self.location_log_probs.gather(-1, choice[..., 1:]).squeeze(-1)
        if self.zero_rank is not None:
            location = torch.where(choice[..., 0] == self.zero_rank, torch.zeros_like(location), location)
        return rank + location

    def entropy(self) -> Tensor:
        """Entropy in nats of each matrix's choice, (L, M)."""
        location = _entropy(self.location_log_probs)
        if self.zero_rank is not None:
            location = location * (1 - self.rank_log_probs[..., self.zero_rank].exp())
        return _entropy(self.rank_log_probs) + location


def require_finite(finite: bool) -> None:
    """Raise where a policy's probabilities are not finite.

    Raises:
        LeLoRAError: They are not.
    """
    if not finite:
        raise LeLoRAError("the policy's logits are not finite, so nothing can be sampled: the policy has diverged, or "
                          "the observation holds NaN. Lower the agent's learning_rate, or use scaled observations "
                          "(raw_observation=False)")


def gumbel(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard Gumbel noise, drawn on the CPU so that a seed means the same everywhere."""
    return -torch.empty(tuple(shape), dtype=torch.float32).exponential_(generator=generator).log()


def _entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs).sum(dim=-1)
