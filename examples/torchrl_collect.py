"""TorchRL on LeLoRA-v0: its wrapper, its collector, and a few policy-gradient steps on what they gather.

Run it with ``python examples/torchrl_collect.py`` (offline, about half a minute on a CPU). TorchRL is no dependency of
this project: ``pip install torchrl``. The few steps show how the parts fit together; they are too few to learn much.

Shapes: M matrices · F features · T env steps.
"""

import argparse
import sys

import gymnasium as gym
import torch
from torch import Tensor

import lelora_env  # noqa: F401 - registers LeLoRA-v0
from agents import ActionDistribution, AgentSpec, PerMatrixPolicy

try:
    from tensordict.nn import TensorDictModule
    from torchrl.collectors import Collector
    from torchrl.envs import GymWrapper
except ImportError:
    print("this example needs TorchRL 0.14 or newer: pip install torchrl", file=sys.stderr)
    raise SystemExit(0) from None


def main() -> None:
    """Print the reward and how sure the policy is, once per fine-tuning run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10, help="fine-tuning runs to learn from")
    parser.add_argument("--horizon", type=int, default=40, help="env steps in a run")
    parser.add_argument("--tiny", action="store_true", help="two short runs, to see that it runs")
    args = parser.parse_args()
    runs, horizon = (2, 3) if args.tiny else (args.runs, args.horizon)
    torch.manual_seed(0)
    plain = gym.make("LeLoRA-v0", horizon=horizon)
    spec = AgentSpec.from_env(plain)
    network = PerMatrixPolicy(spec, embedding=8, layer_as="depth", hidden=(64, 64), head_scale=0.01)
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    rank_mask, location_mask = torch.from_numpy(spec.rank_mask), torch.from_numpy(spec.location_mask)
    generator = torch.Generator().manual_seed(0)

    def distribution(observation: Tensor) -> ActionDistribution:
        """The policy for observations (T, M, F)."""
        rank_logits, location_logits = network(observation)
        return ActionDistribution.from_logits(rank_logits, location_logits, rank_mask=rank_mask,
                                              location_mask=location_mask)

    def act(observation: Tensor) -> Tensor:
        """(M, F) -> (2M,): TorchRL's wrapper of a single environment has no lanes."""
        return distribution(observation[None]).sample(generator).flatten()

    env = GymWrapper(plain, categorical_action_encoding=True)  # without it actions would be one-hot
    env.set_seed(0)
    policy = TensorDictModule(act, in_keys=["observation"], out_keys=["action"])
    collector = Collector(env, policy, frames_per_batch=horizon, total_frames=runs * horizon,
                          auto_register_policy_transforms=False)
    for number, batch in enumerate(collector):
        choices = distribution(batch["observation"])  # (T, M, ...)
        log_prob = choices.log_prob(batch["action"].view(len(batch), -1, 2)).mean(1)  # (T,)
        reward = batch["next", "reward"].squeeze(-1).float()
        gain = reward[1:] - reward[:-1]  # the loss falls all through a run: a step counts against the one before
        loss = -(gain / (gain.std() + 1e-8) * log_prob[1:]).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        print(f"run {number}   return {reward.sum():8.2f}   entropy {choices.entropy().mean():.3f} nats a matrix")
    collector.shutdown()


if __name__ == "__main__":
    main()
