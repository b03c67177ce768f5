"""The per-matrix network as a policy of Stable-Baselines3.

Actor: `agents.policy.PerMatrixPolicy`, the network that REINFORCE trains too. Critic: a network of the same kind of
its own, pooled over the matrices. They share nothing, so the value loss cannot disturb the choices.

Import this module only where Stable-Baselines3 is wanted; importing it takes seconds.
Shapes: L lanes (or rows of a minibatch) · M matrices · F features · R ranks · S locations.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import MultiCategoricalDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn
from torch.distributions import Categorical

from agents.policy import ActionDistribution, PerMatrixPolicy, gumbel, require_finite
from agents.reinforce import NETWORK_OPTIONS, PRESETS
from agents.spec import AgentSpec
from lelora_env.errors import LeLoRAError

NETWORK: dict[str, Any] = {name: getattr(PRESETS["practical"], name) for name in NETWORK_OPTIONS}
"""Options of `PerMatrixPolicy` that the actor is made with unless others are given: those of our REINFORCE."""


class Rows(BaseFeaturesExtractor):
    """Hands the observation on as it is, (L, M, F); SB3's own extractor would flatten it."""

    def __init__(self, observation_space: spaces.Box) -> None:
        """Take the (M, F) space."""
        super().__init__(observation_space, features_dim=int(observation_space.shape[-1]))

    def forward(self, observation: Tensor) -> Tensor:
        """(L, M, F) -> (L, M, F)."""
        return observation


class ForBoth(nn.Module):
    """Hands the rows on to actor and critic, which share nothing."""

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The rows for the actor and for the critic."""
        return rows, rows

    def forward_actor(self, rows: Tensor) -> Tensor:
        """The rows."""
        return rows

    def forward_critic(self, rows: Tensor) -> Tensor:
        """The rows."""
        return rows


class Actor(nn.Module):
    """The network with the legal choices and the rank-0 rule: observation -> `ActionDistribution`."""

    rank_mask: Tensor
    location_mask: Tensor

    def __init__(self, spec: AgentSpec, network: PerMatrixPolicy) -> None:
        """Put a network between the spec's observations and choices."""
        super().__init__()
        self.network = network
        self.zero_rank = spec.rank_set.index(0) if 0 in spec.rank_set else None
        self.register_buffer("rank_mask", torch.as_tensor(spec.rank_mask), persistent=False)
        self.register_buffer("location_mask", torch.as_tensor(spec.location_mask), persistent=False)

    def forward(self, rows: Tensor) -> ActionDistribution:
        """Choice probabilities for observations (L, M, F)."""
        rank_logits, location_logits = self.network(rows)
        return ActionDistribution.from_logits(rank_logits, location_logits, rank_mask=self.rank_mask,
                                              location_mask=self.location_mask, zero_rank=self.zero_rank)


class Critic(nn.Module):
    """An MLP on every matrix's row, all columns of it, the mean over matrices, and a linear head that starts at 0."""

    low: Tensor
    span: Tensor

    def __init__(self, spec: AgentSpec, hidden: Sequence[int]) -> None:
        """Build it; weights come from the global generator, which SB3 seeds.

        Args:
            spec: Names and sizes of the environment.
            hidden: Widths of the hidden layers, at least one.

        Raises:
            LeLoRAError: `hidden` is empty.
        """
        super().__init__()
        if not hidden:
            raise LeLoRAError("critic_hidden must name at least one width (got none), such as (64, 64)")
        features = len(spec.feature_names)
        low, span = torch.zeros(features), torch.ones(features)
        for name, (first, last) in spec.index_ranges.items():  # indices become fractions, the rest is scaled already
            column = spec.feature_names.index(name)
            low[column], span[column] = first, max(last - first, 1)
        self.register_buffer("low", low, persistent=False)
        self.register_buffer("span", span, persistent=False)
        layers = [nn.Sequential(nn.Linear(i, o), nn.ReLU()) for i, o in pairwise([features, *hidden])]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(hidden[-1], 1)
        for parameter in self.body.parameters():
            if parameter.dim() > 1:
                nn.init.kaiming_uniform_(parameter, nonlinearity="relu")
            else:
                nn.init.zeros_(parameter)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, rows: Tensor) -> Tensor:
        """The value of observations (L, M, F), in units of the reward: (L, 1)."""
        hidden = self.body((rows - self.low) / self.span)  # (L, M, H)
        value: Tensor = self.head(hidden.mean(dim=1))
        return value


class PerMatrixDistribution(MultiCategoricalDistribution):
    """`ActionDistribution` in the form in which SB3 and sb3-contrib ask for it.

    One batched categorical for all ranks and one for all locations, instead of 2·M objects.

    **Log-probability and entropy of a lane are means over matrices, not sums.** PPO clips one ratio
    a lane; with sums it is the product of M ratios and leaves the clip range as soon as M is large,
    and ``ent_coef`` and ``target_kl`` would have to be set anew for every model. With means all
    three mean the same for any M: PPO's ratio is the geometric mean of the matrices' ratios, entropy
    and divergence are nats a matrix. The gradient at ratio 1 is that of the sum, divided by M.
    """

    choices: ActionDistribution

    def __init__(self, spec: AgentSpec) -> None:
        """Take the sizes."""
        super().__init__([len(spec.rank_set), len(spec.locations)])
        self.num_matrices = spec.num_matrices

    def proba_distribution(self, action_logits: Any) -> "PerMatrixDistribution":
        """Take the `Actor`'s `ActionDistribution`; SB3 calls the argument logits."""
        self.choices = action_logits
        log_probs = self.choices.rank_log_probs, self.choices.location_log_probs
        self.distribution = [Categorical(logits=values, validate_args=False) for values in log_probs]
        return self

    def apply_masking(self, masks: Any) -> None:
        """Rule out more choices than the spec does.

        Args:
            masks: The environment's ``action_masks()``, (L, M·(R+S)) or (M·(R+S),) bool; ``None`` = none.
        """
        if masks is None:
            return
        ranks = self.choices.rank_log_probs
        legal = torch.as_tensor(masks, device=ranks.device).bool().view(-1, self.num_matrices, sum(self.action_dims))
        rank_mask, location_mask = legal.split(self.action_dims, dim=-1)
        self.proba_distribution(ActionDistribution.from_logits(
            ranks, self.choices.location_log_probs, rank_mask=rank_mask, location_mask=location_mask,
            zero_rank=self.choices.zero_rank))

    def log_prob(self, actions: Tensor) -> Tensor:
        """Mean over matrices of the log-probability of actions (L, 2M), nats: (L,)."""
        return self.choices.log_prob(actions.long().view(len(actions), -1, 2)).mean(dim=1)

    def entropy(self) -> Tensor:
        """Mean over matrices of the entropy, nats: (L,)."""
        return self.choices.entropy().mean(dim=1)

    def sample(self) -> Tensor:
        """Draw actions (L, 2M) int64 from the global generator.

        Raises:
            LeLoRAError: The probabilities are not finite.
        """
        require_finite(bool(self.choices.finite))
        log_probs = self.choices.rank_log_probs, self.choices.location_log_probs
        noise = [gumbel(values.shape, torch.default_generator).to(values.device) for values in log_probs]
        return self.choices.choose(*noise).flatten(start_dim=1)

    def mode(self) -> Tensor:
        """The likeliest actions, (L, 2M) int64.

        Raises:
            LeLoRAError: The probabilities are not finite.
        """
        require_finite(bool(self.choices.finite))
        return self.choices.mode().flatten(start_dim=1)


class PerMatrix:
    """What SB3's and sb3-contrib's actor-critic policies have in common here; comes before one of them.

    Attributes:
        spec: What is observed and chosen.
        action_net: The `Actor`.
        value_net: The `Critic`. The name matters: TRPO knows the critic's parameters by it.
    """

    action_dist: Any
    mlp_extractor: Any
    action_net: Any
    value_net: Any

    def __init__(self, observation_space: spaces.Box, action_space: spaces.MultiDiscrete, lr_schedule: Any, *,
                 spec: AgentSpec | None = None, network_options: Mapping[str, Any] | None = None,
                 critic_hidden: Sequence[int] = (64, 64), use_sde: bool = False,
                 optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
                 optimizer_kwargs: dict[str, Any] | None = None) -> None:
        """Build actor, critic and optimiser; SB3 gives the first three arguments, ``policy_kwargs`` the others.

        Args:
            observation_space: (M, F).
            action_space: 2M choices.
            lr_schedule: Learning rate as a function of the remaining training progress.
            spec: ``AgentSpec.from_env(env)``; `agents.sb3.make_sb3` and `SB3Agent` fill it in.
            network_options: Keyword options of `PerMatrixPolicy`, over `NETWORK`.
            critic_hidden: Widths of the critic's hidden layers.
            use_sde: Must be false: it is for continuous actions.
            optimizer_class: Of torch.
            optimizer_kwargs: Its arguments beside the learning rate.

        Raises:
            LeLoRAError: No spec, or one for other spaces.
        """
        if spec is None:
            raise LeLoRAError(f"{type(self).__name__} needs to know the environment: pass policy_kwargs="
                              "{'spec': AgentSpec.from_env(env)} (agents.sb3.make_sb3 does)")
        if observation_space.shape != spec.observation_space.shape or action_space != spec.action_space or use_sde:
            raise LeLoRAError(f"the spec is for observations {spec.observation_space.shape} and {spec.action_space}, "
                              f"the model for {observation_space.shape} and {action_space} (use_sde={use_sde}, which "
                              "must be false); take AgentSpec.from_env of the model's environment")
        self.spec, self.critic_hidden = spec, tuple(critic_hidden)
        self.network_options = {**NETWORK, **(network_options or {})}
        super().__init__(observation_space, action_space, lr_schedule, net_arch=[],  # type: ignore[call-arg]
                         features_extractor_class=Rows, optimizer_class=optimizer_class,
                         optimizer_kwargs=optimizer_kwargs)

    def _build(self: Any, lr_schedule: Any) -> None:
        options = {"seed": int(torch.randint(2**31, ())), **self.network_options}
        self.mlp_extractor = ForBoth()
        self.action_net = Actor(self.spec, PerMatrixPolicy(self.spec, **options))
        self.value_net = Critic(self.spec, self.critic_hidden)
        self.action_dist = PerMatrixDistribution(self.spec)
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    def _get_constructor_parameters(self: Any) -> dict[str, Any]:
        return {"observation_space": self.observation_space, "action_space": self.action_space,
                "lr_schedule": self._dummy_schedule, "spec": self.spec, "network_options": self.network_options,
                "critic_hidden": self.critic_hidden, "optimizer_class": self.optimizer_class,
                "optimizer_kwargs": self.optimizer_kwargs}


class PerMatrixActorCriticPolicy(PerMatrix, ActorCriticPolicy):
    """The per-matrix network for SB3's PPO and A2C and for sb3-contrib's TRPO; see `PerMatrix` for its arguments.

    ``PPO(PerMatrixActorCriticPolicy, env, policy_kwargs={"spec": AgentSpec.from_env(env)})``; the
    settings that suit it are in `agents.sb3.sb3_defaults`.
    """


def __getattr__(name: str) -> Any:
    """`PerMatrixMaskablePolicy`, the same for sb3-contrib's ``MaskablePPO``, made when it is first asked for.

    Choices that a matrix can never take are masked in every policy here. This one also takes the
    masks that an environment gives from step to step.

    Raises:
        LeLoRAError: sb3-contrib is not installed.
    """
    if name != "PerMatrixMaskablePolicy":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
    except ImportError:
        raise LeLoRAError("PerMatrixMaskablePolicy needs sb3-contrib: pip install sb3-contrib") from None
    text = "The per-matrix network for sb3-contrib's ``MaskablePPO``; see `PerMatrix` for its arguments."
    policy = type(name, (PerMatrix, MaskableActorCriticPolicy), {"__module__": __name__, "__doc__": text})
    globals()[name] = policy
    return policy
