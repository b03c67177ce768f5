"""Does REINFORCE keep its entropy where there is nothing to learn? The drift environment, 500 updates.

The reward rises during the run whatever is chosen, with the noise of a real run on SST-2 (`lelora_env.drift`).
Reported: policy entropy after the run as a share of that at its start, over independent seeds, for one lane and eight.

    python -m benchmarks.drift_agents --out benchmarks/results/drift_agents.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

import lelora_env  # noqa: F401 - registers the environments
from agents import make_agent, run
from lelora_env.export import write_atomically
from lelora_env.runs import environment_facts

PRESETS = ("practical", "paper")
LANES = (1, 8)


def kept(preset: str, lanes: int, seed: int, steps: int) -> float:
    """Mean entropy of the last ten updates over that of the first."""
    env = gym.make_vec("LeLoRA-drift-v0", num_envs=lanes, vectorization_mode="vector_entry_point")
    agent = make_agent("reinforce", env, seed=seed, preset=preset, device="cpu")
    entropy: list[float] = []

    def note(transition: Any, scalars: dict[str, float], step: int) -> None:
        entropy.append(scalars["entropy"])

    run(env, agent, env_steps=steps, seed=100 * seed, on_step=note)
    env.close()
    return float(np.mean(entropy[-10:]) / entropy[0])


def main() -> None:
    """Run and print one line a preset and number of lanes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=Path("drift_agents.json"))
    arguments = parser.parse_args()
    records = []
    for preset in PRESETS:
        for lanes in LANES:
            values = [kept(preset, lanes, seed, arguments.steps) for seed in range(arguments.seeds)]
            records.append({"preset": preset, "lanes": lanes, "steps": arguments.steps, "kept": values})
            shown = f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
            print(f"| {preset} | {lanes} | {shown} |", flush=True)
    whole = {"about": environment_facts(), "records": records}
    write_atomically(arguments.out, lambda path: path.write_text(json.dumps(whole) + "\n", encoding="utf-8"))


if __name__ == "__main__":
    main()
