"""Swap the algorithm: every agent on the built-in instance, one name apart.

Run it with ``python examples/swap_the_agent.py`` (offline, some ten seconds on a CPU). ``best`` is the
known best allocation of the planted task. Twenty env steps are far too few to learn an allocation:
what the rows show is how to plug an agent in, and what a random or a fixed choice is worth.
"""

import argparse

import gymnasium as gym
import numpy as np

import lelora_env  # registers LeLoRA-v0
from agents import AGENT_NAMES, Transition, make_agent, required_options, run


class AlwaysMinor:
    """Your own agent is two methods and its state; this one puts the smallest rank above 0 at the last location."""

    def __init__(self, num_matrices: int, rank_index: int, location_index: int) -> None:
        self.action = np.tile([rank_index, location_index], num_matrices)

    def act(self, observation: np.ndarray) -> np.ndarray:
        """(L, M, F) -> (L, 2M)."""
        return np.tile(self.action, (len(observation), 1))

    def update(self, transition: Transition) -> dict[str, float]:
        """Nothing to learn."""
        return {}

    def state_dict(self) -> dict[str, object]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Nothing to restore."""


def main() -> None:
    """Print one row an agent: loss on held-out rows after one fine-tuning run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--horizon", type=int, default=20, help="env steps in a run")
    parser.add_argument("--tiny", action="store_true", help="three env steps, to see that it runs")
    args = parser.parse_args()
    env = gym.make("LeLoRA-v0", horizon=3 if args.tiny else args.horizon, **required_options(*AGENT_NAMES))
    base = env.unwrapped
    assert isinstance(base, lelora_env.LeLoRAEnv)
    agents = {name: make_agent(name, env, seed=0) for name in AGENT_NAMES}
    agents["own"] = AlwaysMinor(base.num_matrices, rank_index=1, location_index=len(base.adapter_config.locations) - 1)
    print(f"{'agent':11s} {'return':>8s} {'eval loss':>10s}")
    for name, agent in agents.items():
        history = run(env, agent, episodes=1, seed=0)
        print(f"{name:11s} {history.episodes[0].total_reward:8.2f} {base.evaluate('eval')['loss']:10.4f}")
    env.close()


if __name__ == "__main__":
    main()
