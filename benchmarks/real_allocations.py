"""Allocations on real runs: search them, learn a policy for other models, and score frozen allocations from new seeds.

Four steps, each a sub-command; FOLDER collects what they leave (allocations and one policy):

    python -m benchmarks.real_allocations policy --out FOLDER
        PPO on the surrogates of two tasks (sst2 and agnews, all linear layers) leaves policy.safetensors and
        surrogate-ppo.json; the additive model, on the same, leaves surrogate-additive.json. CPU, minutes.
    python -m benchmarks.real_allocations search --data DATA --out FOLDER
        Agents side by side on real runs of SST-2, 16 lanes each: one allocation an agent. GPU.
    python -m benchmarks.real_allocations predict --task sst2 --allocations FOLDER --out FILE
        Beside the losses that `score` left in FILE, what the surrogate says of the same allocations.
    python -m benchmarks.real_allocations score --data DATA --task mrpc --model minilm --allocations FOLDER --out FILE
        Fine-tunes with every allocation of FOLDER, with the policy's, with uniform rank at as many parameters and with
        random ones, from `--seeds` new seeds each and on other held-out rows. GPU.

Shapes: L lanes · M matrices.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from scipy.stats import spearmanr

import lelora_env  # noqa: F401 - registers the environments
from agents import AgentSpec, make_agent, run
from agents.files import final_allocation, load_allocation, load_policy, save_allocation, save_policy
from benchmarks.surrogate_agents import AGENTS
from benchmarks.surrogate_agents import make_env as make_surrogate
from benchmarks.surrogate_runs import DATA_TASKS, OPTIONS
from lelora_env.export import write_atomically
from lelora_env.runs import environment_facts
from lelora_env.training import LaneView, SideBySide

SEARCHERS = ("bandit per matrix", "additive, Thompson", "additive, UCB", "REINFORCE, search", "PPO, search",
             "A2C, search")
BUDGET = 0.5
LEARNT_ON = ("sst2", "agnews")
TASKS = {**DATA_TASKS, "cola": ("cola", "cola", {"max_length": 64})}


def make_env(arguments: argparse.Namespace, lanes: int, **options: Any) -> Any:
    """Lanes whose env step is a whole run, with the settings of the logged runs."""
    name, folder, task_options = TASKS[arguments.task]
    task = {"name": name, "data": str(Path(arguments.data) / folder), "eval_rows": arguments.eval_rows, **task_options}
    return gym.make_vec(
        "LeLoRA-v0", num_envs=lanes, vectorization_mode="vector_entry_point", autoreset_mode="Disabled",
        model=arguments.model, task=task, target_modules=arguments.placement, horizon=1,
        steps_per_action=arguments.steps, reward_size=arguments.reward_size, learning_rate=5e-4, dtype=arguments.dtype,
        parameter_budget=BUDGET, **OPTIONS, **options)


def learn_policy(arguments: argparse.Namespace) -> None:
    """PPO and the additive model, each on both surrogates in turn."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    envs = [make_surrogate(task, "all-linear", 16, BUDGET) for task in LEARNT_ON]
    spec = AgentSpec.from_env(envs[0])
    for label in ("PPO, search", "additive, Thompson"):
        name, options = AGENTS[label]
        agent: Any = make_agent(name, envs[0], seed=0, **options)
        for block in range(arguments.blocks):
            for env in envs:
                run(env, agent, episodes=20, seed=1000 * block)
        observation, _ = envs[0].reset(seed=0)
        action = final_allocation(agent, observation, spec, BUDGET)
        about = {"found_by": label, "on": [f"surrogate {task}" for task in LEARNT_ON],
                 "runs": 2 * 20 * 16 * arguments.blocks}
        if label.startswith("PPO"):
            save_policy(agent.network, spec, arguments.out / "policy.safetensors", about)
        save_allocation(spec, action, arguments.out / f"surrogate-{name}.json", about)
        print(label, [round(float(env.unwrapped.predict(action)[0]), 4) for env in envs], flush=True)


def search(arguments: argparse.Namespace) -> None:
    """Every searcher on lanes of its own, all in one environment; one allocation each."""
    arguments.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    env = make_env(arguments, 16 * len(SEARCHERS), common_random_numbers=True)
    view: Any = LaneView(env, 16)
    agents = [make_agent(AGENTS[label][0], view, seed=7, **AGENTS[label][1]) for label in SEARCHERS]
    side: Any = SideBySide(agents, 16)
    losses: list[np.ndarray] = []
    run(env, side, episodes=arguments.rounds, seed=500,
        on_step=lambda transition, scalars, step: losses.append(transition.info["L1"].reshape(-1, 16).mean(1)))
    observation, _ = env.reset(seed=500)
    spec = AgentSpec.from_env(env)
    for index, label in enumerate(SEARCHERS):
        action = final_allocation(agents[index], observation[:1], spec, BUDGET)
        about = {"found_by": label, "on": f"{arguments.task}, {arguments.model}", "runs": 16 * arguments.rounds,
                 "losses": [round(float(loss[index]), 5) for loss in losses]}
        slug = label.replace(", ", "-").replace(" ", "-").lower()
        save_allocation(spec, action, arguments.out / f"searched-{slug}.json", about)
        print(label, about["losses"], flush=True)
    print(f"{time.monotonic() - started:.0f} s", flush=True)


def candidates(env: Any, folder: Path, seeds: int) -> dict[str, np.ndarray]:
    """Name → actions (seeds, 2M): the same for every seed, but for random ones."""
    spec = AgentSpec.from_env(env)
    found: dict[str, np.ndarray] = {}
    for place in spec.locations:
        fixed = make_agent("fixed", env, rank=4, location=place)
        found[f"uniform rank 4, {place}"] = fixed.act(np.zeros((seeds, 1, 1)))
    found["random"] = make_agent("random", env, seed=99).act(np.zeros((seeds, 1, 1)))
    names = {matrix.name for matrix in spec.matrices}
    for path in sorted(folder.glob("*.json")):
        if {row["name"] for row in json.loads(path.read_text(encoding="utf-8"))["matrices"]} == names:
            pairs = [spec.choice(m, r, s) for m, (r, s) in enumerate(load_allocation(path, spec))]
            found[path.stem] = np.tile(np.array(pairs).reshape(-1), (seeds, 1))
    if (folder / "policy.safetensors").exists():
        load_policy(folder / "policy.safetensors", spec)  # an error here rather than in the middle
        policy = make_agent("reinforce", env, policy_file=folder / "policy.safetensors", device="cpu")
        observation, _ = env.reset(seed=0)
        found["policy"] = np.tile(final_allocation(policy, observation, spec, BUDGET), (seeds, 1))
    return found


def score(arguments: argparse.Namespace) -> None:
    """Fine-tune with every candidate from the same new seeds; one JSON line a candidate."""
    probe = make_env(arguments, 1, split_seed=arguments.split_seed)
    named = candidates(probe, arguments.allocations, arguments.seeds)
    probe.close()
    named = {name: actions for name, actions in named.items() if not arguments.only or name in arguments.only}
    env = make_env(arguments, arguments.seeds * len(named), split_seed=arguments.split_seed)
    base = env.unwrapped
    env.reset(seed=list(range(arguments.first_seed, arguments.first_seed + arguments.seeds)) * len(named))
    *_, infos = env.step(np.concatenate(list(named.values())))
    scores = [result[base.task.metric] for result in base.evaluate("eval")]
    facts, lines = environment_facts(), []
    for index, name in enumerate(named):
        here = slice(index * arguments.seeds, (index + 1) * arguments.seeds)
        record = {"task": arguments.task, "placement": arguments.placement, "model": arguments.model,
                  "allocation": name, "metric": base.task.metric,
                  "loss": infos["L1"][here].tolist(), "score": scores[here],
                  "trained_parameters": float(infos["trained_parameters"][here].mean()), "steps": arguments.steps,
                  "dtype": arguments.dtype, "split_seed": arguments.split_seed, "about": facts}
        lines.append(json.dumps(record))
        print(f"{arguments.task}, {name}: loss {np.mean(record['loss']):.4f} ± {np.std(record['loss']):.4f}, "
              f"{base.task.metric} {np.mean(record['score']):.4f} ± {np.std(record['score']):.4f}, "
              f"{record['trained_parameters']:,.0f} parameters", flush=True)
    write_atomically(arguments.out, lambda path: path.write_text("\n".join(lines) + "\n", encoding="utf-8"))


def predict(arguments: argparse.Namespace) -> None:
    """Print predicted and measured losses of the allocations that were scored, and their rank correlation."""
    env = make_surrogate(arguments.task, arguments.placement, 1, BUDGET)
    named = candidates(env, arguments.allocations, 1)
    lines = [json.loads(line) for line in arguments.out.read_text(encoding="utf-8").splitlines()]
    rows = [(line["allocation"], float(env.unwrapped.predict(named[line["allocation"]][0])[0]), np.mean(line["loss"]))
            for line in lines if line["allocation"] in named and line["allocation"] not in ("random", "policy")]
    for name, predicted, measured in rows:
        print(f"{name}: predicted {predicted:.4f}, measured {measured:.4f}")
    found = spearmanr([row[1] for row in rows], [row[2] for row in rows])
    print(f"rank correlation {found.statistic:.2f} over {len(rows)} allocations (p = {found.pvalue:.3f})")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    for name, function in (("policy", learn_policy), ("search", search), ("score", score), ("predict", predict)):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("--out", type=Path, required=True)
        if name == "policy":
            command.add_argument("--blocks", type=int, default=20)
            continue
        command.add_argument("--data", default="")
        command.add_argument("--task", default="sst2", choices=list(TASKS))
        command.add_argument("--model", default="minilm")
        command.add_argument("--placement", default="all-linear")
        command.add_argument("--dtype", default="bfloat16")
        command.add_argument("--steps", type=int, default=300)
        command.add_argument("--eval-rows", type=int, default=1000)
        command.add_argument("--reward-size", type=int, default=1024)
        command.add_argument("--rounds", type=int, default=10)
        command.add_argument("--seeds", type=int, default=12)
        command.add_argument("--first-seed", type=int, default=9000)
        command.add_argument("--split-seed", type=int, default=1)
        command.add_argument("--only", nargs="+", default=[], help="names of allocations to score; default: all")
        command.add_argument("--allocations", type=Path, default=Path())
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
