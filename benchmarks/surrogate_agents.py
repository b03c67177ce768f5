"""Which agents find a good allocation on the surrogate, and with how many runs?

Each agent acts on `--lanes` lanes under common random numbers for so many rounds, within a budget of parameters; then
the one allocation that it stands for is judged by the surrogate without noise:

score = (mean of uniform random allocations - loss) / (mean of uniform random allocations - best in the data)

0 = as good as uniform random, 1 = as good as the best logged allocation that the budget admits, by the same prediction.
One independent agent a seed; mean and standard deviation over seeds.

    python -m benchmarks.surrogate_agents --out benchmarks/results/surrogate_agents.json
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

import lelora_env  # noqa: F401 - registers the environments
from agents import AgentSpec, make_agent, run
from agents.files import final_allocation
from lelora_env.export import write_atomically
from lelora_env.runs import environment_facts

AGENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform rank 4, primary": ("fixed", {"rank": 4, "location": "primary"}),
    "uniform rank 4, medium": ("fixed", {"rank": 4, "location": "medium"}),
    "uniform rank 4, minor": ("fixed", {"rank": 4, "location": "minor"}),
    "spectral energy": ("energy", {"budget": 0.5}),
    "bandit per matrix": ("bandit", {"memory": 1.0}),
    "additive, Thompson": ("additive", {"budget": 0.5}),
    "additive, UCB": ("additive", {"budget": 0.5, "exploration": "ucb"}),
    "REINFORCE": ("reinforce", {}),
    "REINFORCE, search": ("reinforce", {"learning_rate": 3e-3}),
    "PPO": ("ppo", {}),
    "PPO, search": ("ppo", {"n_steps": 4, "batch_size": 8, "ent_coef": 0.01, "learning_rate": 3e-3}),
    "A2C": ("a2c", {}),
    "A2C, search": ("a2c", {"n_steps": 4, "ent_coef": 0.01}),
}
"""Name → agent and options. ``search``: settings for tens of rounds, chosen on mrpc and agnews with three seeds."""

TASKS = ("sst2", "mrpc", "agnews")


def make_env(task: str, placement: str, lanes: int, budget: float, noise: bool = True) -> Any:
    """Lanes of the surrogate."""
    return gym.make_vec("LeLoRA-surrogate-v0", num_envs=lanes, vectorization_mode="vector_entry_point", task=task,
                        placement=placement, noise=noise, common_random_numbers=True, parameter_budget=budget,
                        autoreset_mode=gym.vector.AutoresetMode.DISABLED)


class Scale:
    """What 0 and 1 stand for."""

    def __init__(self, env: Any, budget: float) -> None:
        """Read the best of the data within the budget, and what uniform random allocations come to under it."""
        base = env.unwrapped
        self.base, self.limit = base, budget * AgentSpec.from_env(env).sizes()[:, -1].sum()
        logged = base.runs.action.astype(np.int64)
        self.best = float(base.predict(logged[base.runs.trained_parameters <= self.limit]).min())
        run_lane = make_agent("random", env, seed=12345)
        losses = []
        for episode in range(2000 // env.num_envs):
            observation, _ = env.reset(seed=episode)
            losses.append(env.step(run_lane.act(observation))[4]["L1"])
        self.random = float(np.mean(losses))

    def __call__(self, action: np.ndarray) -> float:
        """The score of one allocation (2M,)."""
        return (self.random - float(self.base.predict(action)[0])) / (self.random - self.best)


def learn(env: Any, name: str, options: dict[str, Any], seed: int, rounds: int, budget: float) -> np.ndarray:
    """The allocation (2M,) that an agent stands for after so many rounds."""
    agent = make_agent(name, env, seed=seed, **options)
    run(env, agent, episodes=rounds, seed=1000 * seed)
    observation, _ = env.reset(seed=1000 * seed)
    return final_allocation(agent, observation, AgentSpec.from_env(env), budget)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--placement", default="all-linear")
    parser.add_argument("--agents", nargs="+", default=list(AGENTS), choices=list(AGENTS))
    parser.add_argument("--rounds", nargs="+", type=int, default=[10, 30, 200])
    parser.add_argument("--lanes", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=Path("surrogate_agents.json"))
    return parser.parse_args()


def main() -> None:
    """Run what was asked for; a table a task, one line an agent."""
    arguments = parse()
    records = []
    for task in arguments.tasks:
        env = make_env(task, arguments.placement, arguments.lanes, arguments.budget)
        scale = Scale(make_env(task, arguments.placement, 100, arguments.budget, noise=False), arguments.budget)
        print(f"\n{task}, {arguments.placement}: uniform random {scale.random:.4f}, best in the data {scale.best:.4f}")
        for label in arguments.agents:
            name, options = AGENTS[label]
            cells = []
            for rounds in arguments.rounds:
                started = time.monotonic()
                scores = [scale(learn(env, name, options, seed, rounds, arguments.budget))
                          for seed in range(arguments.seeds)]
                records.append({"task": task, "agent": label, "options": options, "rounds": rounds, "scores": scores,
                                "runs": rounds * arguments.lanes, "seconds": time.monotonic() - started})
                cells.append(f"{np.mean(scores):.2f} ± {np.std(scores):.2f}")
            print(f"| {label} | {' | '.join(cells)} |", flush=True)
    settings = {k: v for k, v in vars(arguments).items() if k != "out"}
    whole = {"about": environment_facts(), "settings": settings,
             "records": records}
    write_atomically(arguments.out, lambda path: path.write_text(json.dumps(whole) + "\n", encoding="utf-8"))


if __name__ == "__main__":
    main()
