"""Logs runs that keep one allocation from start to end; the data behind `LeLoRA-surrogate-v0`.

For each task and placement, rounds of lanes under common random numbers: every lane of a round sees the same rows in
the same order from the same head, so what differs is the allocation. One env step is the whole run.

    python -m benchmarks.surrogate_runs --data DATA --out allocations-1.parquet

DATA holds a folder for each task with train.jsonl and validation.jsonl: sst2, mrpc, agnews_sub. Every round is written
to PARTS as soon as it is done, and rounds that lie there are not made again: the same command goes on where it was
stopped. --minutes stops before the first round that would not end in time; the Parquet file then holds what there is.
The last line of the output is one JSON document.

On a CPU, in a minute: python -m benchmarks.surrogate_runs --tasks docstrings --placements query,value --runs 8
--lanes 4 --steps 5 --reward-size 64 --eval-rows 64 --out small.parquet
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

import lelora_env  # noqa: F401 - registers LeLoRA-v0
from benchmarks.common import report
from lelora_env.allocation import encode_action
from lelora_env.config import as_options
from lelora_env.export import write_atomically
from lelora_env.logged import Problem, write_allocations
from lelora_env.runs import environment_facts

DATA_TASKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sst2": ("sst2", "sst2", {"max_length": 64}),
    "mrpc": ("mrpc", "mrpc", {"max_length": 96}),
    "agnews": ("ag_news", "agnews_sub", {"max_length": 64, "text_columns": ["sentence"]}),
    "stsb": ("stsb", "stsb", {"max_length": 64}),
}
"""Name here → the task's name in the package, its folder in DATA, its options."""

OPTIONS: dict[str, Any] = {"parametrisation": "unit", "head_learning_rate": 1e-2,
                           "batch_size": 16, "tune_size": 0, "rank_set": (0, 2, 4, 8)}
REPLICATES = 2
"""The first lanes of every round hold the same allocations in all rounds: what chance alone does."""
SHARE = 0.4
"""Share of the parameters, of what the largest ranks train, up to which concentrated allocations are filled."""


@dataclass(frozen=True)
class Plan:
    """What is logged of one task and placement."""

    task: str
    placement: str
    rounds: int
    arguments: argparse.Namespace

    @property
    def name(self) -> str:
        """The beginning of its files' names."""
        return f"{self.task}_{self.placement.replace(',', '+')}"

    def part(self, number: int) -> Path:
        """The file of a round."""
        return Path(self.arguments.parts) / f"{self.name}_{number:03d}.jsonl"

    @property
    def about(self) -> Path:
        """The file of the problem."""
        return Path(self.arguments.parts) / f"{self.name}.json"

    @property
    def model(self) -> str | None:
        """The model; the planted task has its own."""
        return None if self.task == "planted" else str(self.arguments.model)

    def make_env(self) -> Any:
        """The environment: one env step is one run."""
        arguments = self.arguments
        return gym.make_vec(
            "LeLoRA-v0", num_envs=arguments.lanes, vectorization_mode="vector_entry_point", autoreset_mode="Disabled",
            model=self.model, task=self.task_spec(),
            target_modules=self.placement, horizon=1, steps_per_action=arguments.steps, common_random_numbers=True,
            reward_size=arguments.reward_size, dtype=arguments.dtype, learning_rate=arguments.learning_rate, **OPTIONS)

    def task_spec(self) -> Any:
        """The task as an environment takes it."""
        if self.task not in DATA_TASKS:
            return self.task if self.task == "planted" else {"name": self.task, "eval_rows": self.arguments.eval_rows}
        name, folder, options = DATA_TASKS[self.task]
        return {"name": name, "data": str(Path(self.arguments.data) / folder), "eval_rows": self.arguments.eval_rows,
                **options}


def draw(generator: np.random.Generator, runs: int, legal: np.ndarray, locations: int, varied: bool) -> np.ndarray:
    """Random allocations, (runs, 2M), of ranks that fit their matrix.

    Args:
        generator: Where numbers come from.
        runs: How many.
        legal: (M, R) bool; the first rank is 0.
        locations: S.
        varied: Every run first draws its own probability of rank 0; otherwise all choices are alike.
    """
    score = np.where(legal, generator.random((runs, *legal.shape)), -1.0)
    rank = score.argmax(-1)
    if varied:
        score[..., 0] = -2.0
        off = generator.random((runs, len(legal))) < generator.random((runs, 1))
        rank = np.where(off, 0, score.argmax(-1))
    return encode_action(rank, generator.integers(locations, size=rank.shape))


def concentrate(generator: np.random.Generator, runs: int, env: Any) -> np.ndarray:
    """Allocations (runs, 2M) that differ in *where* they train: about `SHARE` of the parameters, in few matrices.

    Each run draws a preference for every type of matrix and one for every matrix, and fills matrices in the order of
    their sum, with one of the two largest ranks, up to the share. Half of the runs have one location for all matrices.
    """
    legal, locations = env.table.legal, len(env.adapter_config.locations)
    sides = np.array([m.out_features + m.in_features for m in env.matrices])
    sizes = env.table.ranks.numpy() * sides[:, None]  # (M, R)
    types = sorted({m.type for m in env.matrices})
    kind = np.array([types.index(m.type) for m in env.matrices])
    preference = generator.standard_normal((runs, len(types)))[:, kind] + generator.standard_normal((runs, len(legal)))
    top = legal.shape[1] - 1 - generator.integers(2, size=(runs, 1))  # the largest rank or the one below
    rank = np.minimum(top, np.where(legal, np.arange(legal.shape[1]), 0).max(1))  # (runs, M)
    order = np.argsort(-preference, axis=1)
    cost = np.take_along_axis(sizes[np.arange(len(legal)), rank], order, axis=1).cumsum(1)
    kept = np.zeros(rank.shape, dtype=bool)
    np.put_along_axis(kept, order, cost <= SHARE * sizes.max(1).sum(), axis=1)
    place = generator.integers(locations, size=rank.shape)
    place = np.where(generator.random((runs, 1)) < 0.5, place[:, :1], place)
    return encode_action(np.where(kept, rank, 0), place)


def allocations(seed: int, number: int, env: Any) -> tuple[np.ndarray, list[str]]:
    """The allocations (L, 2M) of a round, and how each was drawn."""
    lanes, legal, locations = env.num_envs, env.table.legal, len(env.adapter_config.locations)
    repeated = min(REPLICATES, lanes - 2)
    uniform, varied = max(1, (lanes - repeated) // 4), (lanes - repeated) // 8
    concentrated = lanes - repeated - uniform - varied
    fixed = draw(np.random.default_rng([seed, 0]), repeated, legal, locations, False)
    generator = np.random.default_rng([seed, 1, number])
    drawn = [draw(generator, uniform, legal, locations, False), draw(generator, varied, legal, locations, True),
             concentrate(generator, concentrated, env)]
    kinds = ["replicate"] * repeated + ["uniform"] * uniform + ["varied"] * varied + ["concentrated"] * concentrated
    return np.concatenate([fixed, *drawn]), kinds


def run_round(env: Any, plan: Plan, number: int) -> list[dict[str, Any]]:
    """Make one round; one mapping a run."""
    seed = plan.arguments.seed + number
    _, infos = env.reset(seed=seed)
    before = infos["L1"]
    actions, kinds = allocations(plan.arguments.seed, number, env)
    *_, infos = env.step(actions)
    if infos["diverged"].any():
        raise SystemExit(f"{plan.name}, round {number}: lanes diverged; lower the learning rate")
    scores = env.evaluate("eval")
    return [{"task": plan.task, "placement": plan.placement, "round": number, "lane": lane, "seed": seed,
             "kind": kinds[lane], "action": actions[lane].tolist(), "loss_before": float(before[lane]),
             "loss": float(infos["L1"][lane]), "score": float(scores[lane][env.task.metric]),
             "trained_parameters": int(infos["trained_parameters"][lane])} for lane in range(env.num_envs)]


def describe(env: Any, plan: Plan) -> Problem:
    """What the runs of a plan have in common; paths are left out."""
    observation, _ = env.reset(seed=plan.arguments.seed)
    spec = plan.task_spec()
    task = {k: v for k, v in spec.items() if k != "data"} if isinstance(spec, dict) else {"name": spec}
    settings = {**as_options(env.adapter_config, env.env_config), "model": plan.model, "task_options": task,
                "metric": env.task.metric, "lanes": env.num_envs}
    return Problem(plan.task, plan.placement, settings, environment_facts(), tuple(env.matrices), env.feature_names,
                   observation[0])


def check_settings(problem: Problem, plan: Plan) -> None:
    """Stop rather than mix rounds of different settings."""
    if plan.about.exists():
        before = json.loads(plan.about.read_text(encoding="utf-8"))["settings"]
        now = json.loads(json.dumps(problem.settings))
        differ = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        if differ:
            raise SystemExit(f"the rounds in {plan.about.parent} were made with other settings ({', '.join(differ)}); "
                             "give another --parts or --out, or the same settings")


def work(plan: Plan, deadline: float) -> tuple[int, float]:
    """Make the rounds of a plan that are missing; returns how many runs were made, in how many seconds."""
    missing = [number for number in range(plan.rounds) if not plan.part(number).exists()]
    if not missing or time.monotonic() > deadline:
        return 0, 0.0
    started = time.perf_counter()
    env = plan.make_env()
    problem = describe(env, plan)
    check_settings(problem, plan)
    write_atomically(plan.about, lambda path: path.write_text(json.dumps(problem.as_json()), encoding="utf-8"))
    print(f"{plan.name}: {len(env.matrices)} matrices, ready in {time.perf_counter() - started:.1f} s", flush=True)
    made, seconds, longest = 0, 0.0, 0.0
    for number in missing:
        if time.monotonic() + longest > deadline:
            break
        start = time.perf_counter()
        runs = run_round(env, plan, number)
        lines = "".join(json.dumps(run) + "\n" for run in runs)
        write_atomically(plan.part(number), lambda path, text=lines: path.write_text(text, encoding="utf-8"))
        took = time.perf_counter() - start
        made, seconds, longest = made + len(runs), seconds + took, max(longest, took)
        losses = [run["loss"] for run in runs]
        print(f"{plan.name} round {number}: loss {np.mean(losses):.4f} ± {np.std(losses):.4f}, {took:.1f} s, "
              f"{took / len(runs):.2f} s a run", flush=True)
    env.close()
    return made, seconds


def gather(plans: list[Plan], out: Path) -> int:
    """Write what the parts hold to one Parquet file; returns the number of runs."""
    runs, problems = [], []
    for plan in plans:
        lines = [line for number in range(plan.rounds) if plan.part(number).exists()
                 for line in plan.part(number).read_text(encoding="utf-8").splitlines()]
        if lines:
            runs += [json.loads(line) for line in lines]
            problems.append(Problem.from_json(json.loads(plan.about.read_text(encoding="utf-8"))))
    if runs:
        write_atomically(out, lambda path: write_allocations(path, runs, problems))
    return len(runs)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", default="", help="folder with one folder for each task")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "mrpc", "agnews"],
                        choices=[*DATA_TASKS, "docstrings", "planted"])
    parser.add_argument("--placements", nargs="+", default=["all-linear", "query,value"])
    parser.add_argument("--runs", type=int, default=480, help="for each task and placement")
    parser.add_argument("--lanes", type=int, default=48, help="runs in a round, at least 4")
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps in a run")
    parser.add_argument("--reward-size", type=int, default=1024, help="held-out training rows that judge a run")
    parser.add_argument("--eval-rows", type=int, default=500)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--dtype", default=None, help="of the frozen model: float32 or bfloat16")
    parser.add_argument("--seed", type=int, default=1000, help="of round 0; counted up by round")
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--parts", default="", help="folder of the rounds; default: OUT.parts")
    parser.add_argument("--out", type=Path, default=Path("allocations-1.parquet"))
    found = parser.parse_args(arguments)
    found.parts = found.parts or f"{found.out}.parts"
    if found.lanes < 4 or found.runs < found.lanes:
        raise SystemExit("--lanes must be at least 4, and --runs at least --lanes")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Make what is missing, gather, report."""
    options = parse(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    plans = [Plan(task, placement, options.runs // options.lanes, options)
             for task in options.tasks for placement in options.placements]
    made = {plan.name: work(plan, deadline) for plan in plans}
    total = gather(plans, options.out)
    results = {"runs_in_file": total, "file": options.out.name,
               "made": {name: {"runs": runs, "seconds": seconds, "seconds_a_run": seconds / runs if runs else None}
                        for name, (runs, seconds) in made.items()}}
    shown = {k: v for k, v in vars(options).items() if k not in ("data", "parts", "out") and v != float("inf")}
    report("surrogate_runs", {**shown, **OPTIONS}, results)


if __name__ == "__main__":
    main()
