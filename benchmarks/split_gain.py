"""How much better than uniform rank is the best allocation that a fit knows, by a fit that has not seen its data?

The eight rounds of logged runs of each problem are split in halves in all 35 ways. One half is fitted and asked for its
best allocation at half of the parameters; both halves then say how much lower its loss is than that of uniform rank 4
at the location that the first half likes best. *Promised*: by the fit that was searched; *other half*: by the other
one, which takes off what was read into noise, not what is wrong with the form of the fit: only real runs tell that.
With --allocations the best allocation of the fit of all rounds is left there, for `benchmarks.real_allocations score`.

    python -m benchmarks.split_gain --out benchmarks/results/split_gain.json
"""

import argparse
import json
from dataclasses import fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

import lelora_env  # noqa: F401 - registers the environments
from agents import AgentSpec
from agents.files import save_allocation
from agents.knapsack import best_choices
from lelora_env.allocation import encode_action
from lelora_env.export import write_atomically
from lelora_env.logged import AllocationRuns, load_allocations
from lelora_env.runs import environment_facts
from lelora_env.surrogate import LossModel, fit_loss

PROBLEMS = [(task, placement) for placement in ("all-linear", "query,value") for task in ("sst2", "mrpc", "agnews")]
BUDGET, UNIFORM = 0.5, 4


def part(runs: AllocationRuns, rounds: tuple[int, ...]) -> AllocationRuns:
    """The runs of some rounds."""
    keep = np.isin(runs.round, rounds)
    arrays = {f.name: getattr(runs, f.name)[keep] for f in fields(runs) if f.name != "problems"}
    return replace(runs, **arrays)


def best_of(model: LossModel, spec: AgentSpec) -> np.ndarray:
    """The allocation (2M,) of lowest predicted loss that spends the budget; the total's worth is taken linearly."""
    limit, sizes = spec.limit(BUDGET), spec.sizes()
    slope = model.total_weights @ [1 / sizes[:, -1].sum(), 1 / (np.log(2) * (limit + 1))]  # of the loss by the total
    slope = min(slope, -1e-9)  # more never counts as worse: the whole budget is spent
    return best_choices(-(model.effects + slope * sizes[:, :, None])[None], spec, limit)[0]


def gains(runs: AllocationRuns, spec: AgentSpec, rounds: tuple[int, ...]) -> tuple[float, float]:
    """Gain over uniform rank (nats), promised and by the other half, for one split."""
    others = tuple(sorted(set(runs.round.tolist()) - set(rounds)))
    ours, theirs = fit_loss(part(runs, rounds)), fit_loss(part(runs, others))
    rank = np.full(spec.num_matrices, spec.rank_set.index(UNIFORM))
    uniform = np.stack([encode_action(rank, np.full_like(rank, place)) for place in range(len(spec.locations))])
    uniform = uniform[ours.predict(uniform).argmin()]
    found = best_of(ours, spec)
    promised, other = (float(model.predict(uniform)[0] - model.predict(found)[0]) for model in (ours, theirs))
    return promised, other


def main() -> None:
    """All problems; one line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("split_gain.json"))
    parser.add_argument("--allocations", type=Path, default=None, help="folder that exists")
    arguments = parser.parse_args()
    records: list[dict[str, Any]] = []
    for task, placement in PROBLEMS:
        runs = load_allocations(task, placement)
        spec = AgentSpec.from_env(gym.make("LeLoRA-surrogate-v0", task=task, placement=placement))
        halves = [half for half in combinations(range(8), 4) if 0 in half]
        if arguments.allocations:
            name = f"{task}-{placement.replace(',', '-')}-fit-of-all-rounds.json"
            save_allocation(spec, best_of(fit_loss(runs), spec), arguments.allocations / name)
        found = np.array([gains(runs, spec, half) for half in halves])  # (35, 2)
        records.append({"task": task, "placement": placement, "promised": found[:, 0].tolist(),
                        "other_half": found[:, 1].tolist(), "residual": fit_loss(runs).residual_std})
        print(f"{task}, {placement}: promised {found[:, 0].mean():.4f} ± {found[:, 0].std():.4f}, other half "
              f"{found[:, 1].mean():.4f} ± {found[:, 1].std():.4f}; one run's spread {records[-1]['residual']:.4f}",
              flush=True)
    whole = {"about": environment_facts(), "records": records}
    write_atomically(arguments.out, lambda path: path.write_text(json.dumps(whole) + "\n", encoding="utf-8"))


if __name__ == "__main__":
    main()
