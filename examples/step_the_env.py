"""Step the environment by hand: what an agent sees, what it chooses, and what comes of it.

Run it with ``python examples/step_the_env.py`` (offline, seconds on a CPU). The built-in instance has a
known best allocation; here it trains beside a uniform one and beside random choices.
"""

import argparse
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

import lelora_env  # noqa: F401  (registers LeLoRA-v0)


def known_best(base: Any) -> np.ndarray:
    """The planted task's best allocation as an action (2M,)."""
    ranks, locations = base.adapter_config.rank_set, base.adapter_config.location_names
    pairs = [(ranks.index(c.rank), locations.index(c.location)) for c in base.task.best_allocation()]
    return np.array(pairs).reshape(-1)


def main() -> None:
    """Look at the environment, then fine-tune three times from the same start."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--horizon", type=int, default=40, help="env steps in a run")
    parser.add_argument("--tiny", action="store_true", help="three env steps, to see that it runs")
    args = parser.parse_args()
    env = gym.make("LeLoRA-v0", horizon=3 if args.tiny else args.horizon)
    base: Any = env.unwrapped

    observation, info = env.reset(seed=0)
    print(f"{base.num_matrices} matrices x {len(base.feature_names)} features: {base.feature_names[:5]}, ...")
    print(f"first row: {np.round(observation[0][:5], 2)}  ({base.matrices[0].name})")
    print(f"ranks {base.adapter_config.rank_set}, locations {base.adapter_config.location_names}")
    print(f"loss on the reward batch before training: {info['L1']:.4f}\n")

    middle = np.tile([len(base.adapter_config.rank_set) // 2, 0], base.num_matrices)
    choices: dict[str, Callable[[], np.ndarray]] = {
        "known best": lambda: known_best(base), "one rank, primary": lambda: middle, "random": env.action_space.sample}
    env.action_space.seed(0)
    print(f"{'allocation':20s}{'return':>10s}{'loss':>10s}{'mean rank':>12s}")
    for name, choose in choices.items():
        env.reset(seed=0)
        total, done, ranks = 0.0, False, []
        while not done:
            observation, reward, terminated, truncated, info = env.step(choose())
            total, done = total + float(reward), terminated or truncated
            ranks.append(info["mean_rank"])
        print(f"{name:20s}{total:10.3f}{info['L1']:10.4f}{np.mean(ranks):12.2f}")
    env.close()


if __name__ == "__main__":
    main()
