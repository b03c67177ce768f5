"""A policy learnt on one planted model, unchanged on models it never saw: same size, and deeper and wider.

REINFORCE (practical) trains on ``planted-free/train-0`` (6 layers, width 32), is written to a file, and acts without
learning on test instances (``planted-deep``: 12 layers, width 64). Normalised scores of `agents.evaluate`.

    python -m benchmarks.transfer --out benchmarks/results/transfer.json
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym

import lelora_env  # noqa: F401 - registers the environments
from agents import AgentSpec, evaluate, make_agent, run
from agents.files import save_policy
from lelora_env.export import write_atomically
from lelora_env.runs import environment_facts

TESTED = ("planted-free/test-0", "planted-free/test-1", "planted-deep/test-0", "planted-deep/test-1")


def learn(seed: int, steps: int, path: Path) -> None:
    """Train on eight lanes of the small model and write the policy."""
    env = gym.make_vec("LeLoRA-v0", num_envs=8, vectorization_mode="vector_entry_point", autoreset_mode="Disabled",
                       instance="planted-free/train-0")
    agent: Any = make_agent("reinforce", env, seed=seed, device="cpu")
    run(env, agent, env_steps=steps, seed=1000 * seed)
    save_policy(agent.network, AgentSpec.from_env(env), path, {"env_steps": steps, "seed": seed})
    env.close()


def main() -> None:
    """Train, test, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500, help="env steps of each of eight lanes")
    parser.add_argument("--out", type=Path, default=Path("transfer.json"))
    arguments = parser.parse_args()
    records = []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "policy.safetensors"
            learn(seed, arguments.steps, path)
            make = partial(make_agent, "reinforce", seed=seed, policy_file=path, device="cpu")
            result = evaluate(make, TESTED, lanes=4)
        scores = {name: float(values.mean()) for name, values in result.scores.items()}
        records.append({"seed": seed, "steps": arguments.steps, "scores": scores})
        print(seed, {name: round(value, 3) for name, value in scores.items()}, flush=True)
    whole = {"about": environment_facts(), "records": records}
    write_atomically(arguments.out, lambda path: path.write_text(json.dumps(whole) + "\n", encoding="utf-8"))


if __name__ == "__main__":
    main()
