"""Write agents/reference.json: what uniform rank and the planted optimum earn on every planted instance.

    python -m benchmarks.reference_scores

Same seeds and lanes as `agents.evaluate`. Instances on real text are left out: their data are the docstrings of the
installed libraries, so their returns are those of one set of versions.
"""

import json
from typing import Any

from agents import AgentSpec, FixedAllocation
from agents.evaluate import FIRST_SEED, LANES, REFERENCE, mean_rewards
from lelora_env.instances import list_instances
from lelora_env.runs import environment_facts


def oracle(env: Any) -> FixedAllocation:
    """The planted allocation."""
    best = [(choice.rank, choice.location) for choice in env.unwrapped.task.best_allocation()]
    return FixedAllocation(AgentSpec.from_env(env), allocation=best)


def main() -> None:
    """Run both on every instance and write the file."""
    found = {}
    for name in [n for n in list_instances() if n.startswith("planted")]:
        uniform = mean_rewards(name, lambda env: FixedAllocation(AgentSpec.from_env(env)))
        best = mean_rewards(name, oracle)
        found[name] = {"uniform": float(uniform.mean()), "best": float(best.mean()), "best_is": "planted optimum",
                       "spread": [float(uniform.std()), float(best.std())]}
        print(name, found[name], flush=True)
    whole = {"environment": "LeLoRA-v0", "lanes": LANES, "first_seed": FIRST_SEED, "about": environment_facts(),
             "instances": found}
    REFERENCE.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
