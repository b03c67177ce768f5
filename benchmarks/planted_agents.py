"""Do agents find what is planted? A table of agents x planted instances, one independent agent a seed.

Every agent trains on `--lanes` lanes for `--steps` env steps (8 x 2,500 = 20,000 env steps); all seeds of a method run
side by side. Then the agent stands still and acts for one further episode, from new seeds. Reported, over seeds:

improvement   of the loss on eval rows at that episode's end, as a share of what the oracle gains from the same seeds
found         share of the planted matrices in which the agent's probability of choices that cover what is planted
              (with a price on rank: of exactly the planted choice) is at least 80 %
left alone    with a price on rank: share of the other matrices with rank 0 at 80 % or more

    python -m benchmarks.planted_agents --jobs 14 --together 5 --out planted_agents.json

What is in --out already is not run again.
"""

import argparse
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

import lelora_env
from agents import AgentSpec, FixedAllocation, make_agent, required_options, run
from lelora_env.export import write_atomically
from lelora_env.runs import environment_facts
from lelora_env.training import LaneView, SideBySide

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("random", {}),
    "random, frozen": ("random", {"frozen": True}),
    "largest rank, primary": ("fixed", {"location": "primary"}),
    "largest rank, medium": ("fixed", {"location": "medium"}),
    "largest rank, minor": ("fixed", {"location": "minor"}),
    "REINFORCE, paper": ("reinforce", {"preset": "paper", "device": "cpu"}),
    "REINFORCE, practical": ("reinforce", {"preset": "practical", "device": "cpu"}),
    "PPO": ("ppo", {}),
    "A2C": ("a2c", {}),
    "bandit per matrix": ("bandit", {}),
    "additive model": ("additive", {"budget": None}),
    "credit": ("credit", {}),
    "sensitivity": ("sensitivity", {"budget": 1.0}),
}
LEARNERS = ("REINFORCE, paper", "REINFORCE, practical", "PPO", "A2C", "bandit per matrix", "additive model", "credit")
TABLE = tuple(METHODS)[:10]
"""The methods of the main table."""
INSTANCES = ("planted-free/test-0", "planted-charged/test-0", "planted-type/test-0")
SURE = 0.8
"""Probability from which on a choice counts as made."""


def make_env(instance: str, lanes: int, device: str | None, agent: str) -> Any:
    """Lanes of an instance, as an agent needs them; episodes are reset by the loop."""
    return gym.make_vec("LeLoRA-v0", num_envs=lanes, vectorization_mode="vector_entry_point", instance=instance,
                        autoreset_mode=gym.vector.AutoresetMode.DISABLED, device=device, **required_options(agent))


def make_agents(env: Any, name: str, options: dict[str, Any], seeds: list[int], lanes: int) -> SideBySide:
    """An agent a seed, each for `lanes` lanes."""
    view: Any = LaneView(env, lanes)
    return SideBySide([make_agent(name, view, seed=seed, **options) for seed in seeds], lanes)


class Still:
    """An agent that acts and no longer learns (a rule still hears what it goes by); keeps what it saw."""

    def __init__(self, agents: SideBySide, hears: bool) -> None:
        self.agents, self.hears, self.seen = agents, hears, []  # type: ignore[var-annotated]

    def act(self, observation: np.ndarray) -> np.ndarray:
        """As the agents act."""
        self.seen.append(observation)
        return self.agents.act(observation)

    def update(self, transition: Any) -> dict[str, float]:
        """Learn nothing, or go by what is reported."""
        return self.agents.update(transition) if self.hears else {}


def improvement(env: Any, agent: Any, seeds: list[int]) -> np.ndarray:
    """Improvement on eval after one episode of every lane, (L,)."""
    run(env, agent, env_steps=env.unwrapped.horizon, seed=seeds)  # type: ignore[arg-type]
    return np.array([score["improvement"] for score in env.unwrapped.evaluate("eval")])


def sure_of(env: Any, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per matrix the probability of what is right, and whether something is planted there.

    Right is, without a price, every choice that trains all planted components; with one, exactly the planted choice,
    and rank 0 where nothing is planted.

    Args:
        env: Its task knows what is planted.
        probabilities: (N, M, R, S) of N agents.

    Returns:
        Probabilities (N, M), and planted (M,) bool.
    """
    base = env.unwrapped
    ranks, names = list(base.adapter_config.rank_set), list(base.adapter_config.location_names)
    best = base.task.best_allocation()
    planted = np.array([choice.rank > 0 for choice in best])
    right = np.zeros(probabilities.shape[1:], dtype=bool)  # (M, R, S)
    mask = base.table.mask.numpy()  # (M, R, S, K)
    for m, choice in enumerate(best):
        wanted = ranks.index(choice.rank), names.index(choice.location)
        covers = (mask[m] | ~mask[m][wanted]).all(-1)
        if base.env_config.rank_cost:
            covers = np.zeros_like(covers)
            covers[wanted if choice.rank else ranks.index(0)] = True
        right[m] = covers
    return (probabilities * right).sum((-1, -2)), planted


def contest(instance: str, method: str, seeds: list[int], lanes: int, steps: int, device: str | None,
            options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train a method's agents side by side and measure them."""
    name, own = METHODS[method]
    started = time.monotonic()
    env = make_env(instance, len(seeds) * lanes, device, name)
    agents = make_agents(env, name, {**own, **(options or {})}, seeds, lanes)
    starts = [1000 * seed + lane for seed in seeds for lane in range(lanes)]
    if method in LEARNERS:
        run(env, agents, env_steps=steps, seed=starts)  # type: ignore[arg-type]
    trained = time.monotonic() - started
    new = [start + 500 for start in starts]
    still = Still(agents, hears=method == "sensitivity")
    ours = improvement(env, still, new).reshape(len(seeds), lanes).mean(1)
    best = [(choice.rank, choice.location) for choice in env.unwrapped.task.best_allocation()]
    oracle = improvement(env, FixedAllocation(AgentSpec.from_env(env), allocation=best), new)
    record: dict[str, Any] = {"instance": instance, "method": method, "seeds": seeds, "lanes": lanes, "steps": steps,
                              "options": {**own, **(options or {})}, "oracle": float(oracle.mean()),
                              "share": (ours / oracle.reshape(len(seeds), lanes).mean(1)).tolist(),
                              "seconds": trained}
    if not still.hears and all(hasattr(agent, "probabilities") for agent in agents.agents):
        seen = np.stack(still.seen)  # (T, L, M, F)
        found = np.stack([np.mean([agent.probabilities(part) for part in seen[:, agents.lanes(i)]], axis=(0, 1))
                          for i, agent in enumerate(agents.agents)])  # (N, M, R, S)
        sure, planted = sure_of(env, found)
        record["found"] = (sure[:, planted] >= SURE).mean(1).tolist()
        record["sure"] = sure[:, planted].mean(1).tolist()
        if env.unwrapped.env_config.rank_cost:
            record["left_alone"] = (sure[:, ~planted] >= SURE).mean(1).tolist()
    env.close()
    return record


def cell(values: list[float]) -> str:
    """Mean and range over seeds."""
    return f"{np.mean(values):.3f} ({min(values):.2f} to {max(values):.2f})" if values else "-"


def table(records: list[dict[str, Any]]) -> list[str]:
    """Markdown: one row a method and instance; mean and range over seeds."""
    lines = ["| instance | method | improvement / oracle's | found | left alone | seeds |", "|---|---|---|---|---|---|"]
    for instance, method in dict.fromkeys((r["instance"], r["method"]) for r in records):
        here = [r for r in records if (r["instance"], r["method"]) == (instance, method)]
        cells = [cell([x for r in here for x in r.get(name, [])]) for name in ("share", "found", "left_alone")]
        lines.append(f"| {instance} | {method} | {' | '.join(cells)} | {sum(len(r['seeds']) for r in here)} |")
    return lines


def in_own_process(*arguments: Any) -> dict[str, Any]:
    """`contest` on one core."""
    torch.set_num_threads(1)
    return contest(*arguments)


def planned(arguments: argparse.Namespace, done: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Arguments of `contest` for what is still to be run."""
    seeds = list(range(arguments.seeds))
    size = arguments.together or len(seeds)
    groups = [seeds[start : start + size] for start in range(0, len(seeds), size)]
    have = {(r["instance"], r["method"], tuple(r["seeds"]), r["lanes"], r["steps"]) for r in done}
    return [(instance, method, group, arguments.lanes, arguments.steps, arguments.device,
             arguments.options if method in LEARNERS else {})
            for instance in arguments.instances for method in arguments.methods for group in groups
            if (instance, method, tuple(group), arguments.lanes, arguments.steps) not in have]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--instances", nargs="+", default=list(INSTANCES))
    parser.add_argument("--methods", nargs="+", default=list(TABLE), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--lanes", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2500, help="env steps of each lane")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=0, help="processes; 0 = this one")
    parser.add_argument("--together", type=int, default=0, help="seeds that share a process; 0 = all of a method")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON: options for every learning agent")
    parser.add_argument("--out", type=Path, default=Path("planted_agents.json"))
    return parser.parse_args()


def main() -> None:
    """Run what was asked for, write it after every contest, and print the table."""
    arguments = parse()
    records = json.loads(arguments.out.read_text(encoding="utf-8"))["records"] if arguments.out.exists() else []

    def keep(record: dict[str, Any]) -> None:
        records.append(record)
        whole = {"version": lelora_env.__version__, "about": environment_facts(), "records": records}
        write_atomically(arguments.out, lambda path: path.write_text(json.dumps(whole) + "\n", encoding="utf-8"))
        print(table([record])[-1], f"{record['seconds']:.0f} s", flush=True)

    waiting = planned(arguments, records)
    if arguments.jobs:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
            for future in as_completed([pool.submit(in_own_process, *one) for one in waiting]):
                keep(future.result())
    else:
        for one in waiting:
            keep(contest(*one))
    print("\n".join(table(sorted(records, key=lambda r: (r["instance"], list(METHODS).index(r["method"]))))))


if __name__ == "__main__":
    main()
