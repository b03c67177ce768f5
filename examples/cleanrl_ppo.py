"""PPO on LeLoRA-v0 in one file, in the manner of CleanRL: nothing of `agents` but what describes the environment.

Run it with ``python examples/cleanrl_ppo.py`` (offline, about a minute on a CPU). It trains on the built-in planted
task and prints how much of the planted signal a fine-tuning run learns when the policy chooses, and when choices are
uniformly random. The best allocation, which is known, learns 0.90 of it.

Three things differ from PPO for games. The network reads one matrix at a time, so its size does not depend on the
model. Every matrix has a ratio and a clip of its own, because one product of M ratios leaves the clip range at once.
And γ = 0: an action's reward comes in the same env step, without the part that was known before it (the loss before).

Shapes: L lanes · M matrices · F features · T env steps in a rollout · B env steps of lanes in a minibatch.
"""

import argparse
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor, nn
from torch.distributions import Categorical

import lelora_env  # registers LeLoRA-v0
from agents import AgentSpec


@dataclass
class Args:
    """Settings."""

    seed: int = 0
    lanes: int = 8
    env_steps: int = 480
    rollout: int = 16
    epochs: int = 10
    minibatches: int = 4
    learning_rate: float = 1e-3
    clip: float = 0.2
    entropy_weight: float = 0.0
    value_weight: float = 0.5
    horizon: int = 40


class Network(nn.Module):
    """Actor and critic, each an MLP on every matrix's row; the critic's output is the mean over matrices."""

    def __init__(self, spec: AgentSpec, hidden: int = 64) -> None:
        super().__init__()
        self.sizes = len(spec.rank_set), len(spec.locations)
        self.top = torch.ones(len(spec.feature_names))
        for name, (_, last) in spec.index_ranges.items():
            self.top[spec.feature_names.index(name)] = max(last, 1)
        self.legal = torch.from_numpy(np.concatenate([spec.rank_mask, spec.location_mask], axis=1))  # (M, R + S)
        self.types = spec.feature_names.index("type"), spec.index_ranges["type"][1] + 1
        inputs = len(spec.feature_names) + self.types[1]
        self.actor, self.critic = (
            nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                          nn.Linear(hidden, outputs))
            for outputs in (sum(self.sizes), 1))
        for head in (self.actor[-1], self.critic[-1]):
            assert isinstance(head, nn.Linear)
            nn.init.normal_(head.weight, std=0.001)  # every choice begins equally likely

    def rows(self, observation: Tensor) -> Tensor:
        """(..., M, F) -> (..., M, F + types): indices as fractions, the type as one-hot too."""
        column, types = self.types
        one_hot = nn.functional.one_hot(observation[..., column].long(), types)
        return torch.cat([observation / self.top, one_hot], dim=-1)

    def choices(self, observation: Tensor) -> tuple[Categorical, Categorical]:
        """Rank and location of every matrix."""
        logits = self.actor(self.rows(observation)).masked_fill(~self.legal, -1e9)
        rank, location = logits.split(self.sizes, dim=-1)
        return Categorical(logits=rank), Categorical(logits=location)

    def value(self, observation: Tensor) -> Tensor:
        """(..., M, F) -> (...)."""
        value: Tensor = self.critic(self.rows(observation)).mean(dim=(-2, -1))
        return value

    def evaluate(self, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of (..., M, 2) choices and entropy, each (..., M)."""
        rank, location = self.choices(observation)
        log_prob = rank.log_prob(action[..., 0]) + location.log_prob(action[..., 1])
        return log_prob, rank.entropy() + location.entropy()

    @torch.no_grad()
    def act(self, observation: np.ndarray) -> np.ndarray:
        """Sample actions: (L, M, F) -> (L, 2M) int64."""
        rank, location = self.choices(torch.from_numpy(observation))
        chosen = torch.stack([rank.sample(), location.sample()], dim=-1)
        action: np.ndarray = chosen.flatten(1).numpy()
        return action


def beyond_known(reward: np.ndarray, info: dict[str, Any], done: np.ndarray) -> np.ndarray:
    """Rewards (L,) without minus the loss before the env step, which no action could change."""
    ended = info.get("final_info", {})
    loss, change = (np.where(done, ended.get(name, 0.0), info.get(name, 0.0)) for name in ("L1", "L2"))
    gained: np.ndarray = reward + loss - change
    return gained


def update(network: Network, optimiser: torch.optim.Optimizer, args: Args, rollout: list[Tensor]) -> None:
    """PPO's epochs over one rollout of (T·L, ...) observations, actions and rewards."""
    observation, action, reward = rollout
    with torch.no_grad():
        old, _ = network.evaluate(observation, action)  # (T·L, M)
        advantage = reward - network.value(observation)
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    for _ in range(args.epochs):
        for batch in torch.randperm(len(reward)).chunk(args.minibatches):
            log_prob, entropy = network.evaluate(observation[batch], action[batch])
            ratio, gain = (log_prob - old[batch]).exp(), advantage[batch, None]  # (B, M), (B, 1)
            surrogate = torch.minimum(gain * ratio, gain * ratio.clamp(1 - args.clip, 1 + args.clip))
            value_loss = (network.value(observation[batch]) - reward[batch]).square().mean()
            loss = -surrogate.mean() - args.entropy_weight * entropy.mean() + args.value_weight * value_loss
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 0.5)
            optimiser.step()


def train(envs: VectorEnv, args: Args) -> Network:
    """Collect a rollout, learn from it, and so on."""
    torch.manual_seed(args.seed)
    network = Network(AgentSpec.from_env(envs))
    optimiser = torch.optim.Adam(network.parameters(), lr=args.learning_rate)
    observation, _ = envs.reset(seed=args.seed)
    seen: list[tuple[np.ndarray, ...]] = []
    gains: list[float] = []
    for step in range(1, args.env_steps + 1):
        action = network.act(observation)
        following, reward, terminated, truncated, info = envs.step(action)
        gained = beyond_known(reward, info, terminated | truncated).astype(np.float32)
        gains.append(float(gained.mean()))
        seen.append((observation, action.reshape(args.lanes, -1, 2), gained))
        observation = following
        if len(seen) == args.rollout:
            parts = [np.concatenate(part) for part in zip(*seen, strict=True)]
            update(network, optimiser, args, [torch.from_numpy(part) for part in parts])
            seen = []
        if step % max(1, args.env_steps // 6) == 0:
            print(f"env step {step:5d}   gained a step {np.mean(gains):.4f}")
            gains = []
    return network


def improvement(envs: VectorEnv, args: Args, network: Network | None) -> float:
    """Share of the planted signal that a run learns under a policy, mean over lanes; ``None`` = random choices."""
    observation, _ = envs.reset(seed=args.seed + 1000)
    for _ in range(args.horizon - 1):  # one short of the end, which would reset the lanes
        action = envs.action_space.sample() if network is None else network.act(observation)
        observation, *_ = envs.step(action)
    base = envs.unwrapped
    assert isinstance(base, lelora_env.LeLoRAVectorEnv)
    return float(np.mean([scores["improvement"] for scores in base.evaluate("eval")]))


def main() -> None:
    """Train, then compare with random choices."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in vars(Args()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--tiny", action="store_true", help="two small rollouts, to see that it runs")
    given = vars(parser.parse_args())
    tiny = {"lanes": 2, "env_steps": 8, "rollout": 4, "horizon": 3} if given.pop("tiny") else {}
    args = Args(**{**given, **tiny})
    envs = gym.make_vec("LeLoRA-v0", num_envs=args.lanes, vectorization_mode="vector_entry_point", horizon=args.horizon,
                        autoreset_mode=AutoresetMode.SAME_STEP)
    envs.action_space.seed(args.seed)
    network = train(envs, args)
    print(f"improvement   PPO {improvement(envs, args, network):.2f}   random {improvement(envs, args, None):.2f}")
    envs.close()


if __name__ == "__main__":
    main()
