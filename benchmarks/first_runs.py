"""Does it train on real text? One short run on each of several tasks, score before and after.

Every run is `lelora train` with one agent and the random control: a task that reads local folders, a model, a few
dozen optimiser steps. Sentence tasks run on the sentence model, causal ones on the causal model.

    python benchmarks/first_runs.py --data DATA --causal-model MODEL --tasks sst2 mrpc stsb boolq gsm8k

DATA holds a folder for each task with train.jsonl and validation.jsonl. The last line of the output is one JSON
document.
"""

import argparse
import json
import os
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import lelora_env
from lelora_env.training import Training, TrainSettings

SENTENCE = {"parametrisation": "unit", "learning_rate": 2e-3, "head_learning_rate": 1e-2}
CAUSAL = {"parametrisation": "unit", "learning_rate": 1e-3, "batch_size": 4, "reward_size": 8, "tune_size": 8}
TASKS: dict[str, dict[str, Any]] = {
    "sst2": {"horizon": 120},
    "mrpc": {"horizon": 120, "task": {"max_length": 96}},
    "stsb": {"horizon": 120, "task": {"max_length": 64}},
    "boolq": {"horizon": 24, "task": {"max_length": 96, "train_rows": 800, "eval_rows": 100}},
    "gsm8k": {"horizon": 24, "task": {"max_length": 160, "train_rows": 800, "eval_rows": 48}},
}
"""Settings of each run; chosen on tune or by what fits a few minutes on two cores, never on eval."""


def run(name: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train on one task; returns the result of each lane."""
    settings = TASKS[name]
    causal = name in ("boolq", "gsm8k")
    options = {**(CAUSAL if causal else SENTENCE), "horizon": settings["horizon"]}
    task: Any = {"name": name, "data": str(Path(arguments.data) / name), **settings.get("task", {})}
    training = Training(TrainSettings(
        model=arguments.causal_model if causal else arguments.model, task=task, agent="fixed", controls=("random",),
        seed=arguments.seed, out=folder / name, options=options,
    ))
    results = [asdict(result) for result in training.run()]
    for result in results:
        print(f"{name:6} {result['lane']:7} {result['metric']} {result['eval_before']:.4f} -> "
              f"{result['eval_after']:.4f}, reward loss {result['loss_before']:.4f} -> {result['loss_after']:.4f}",
              flush=True)
    return {"task": task, "options": options, "lanes": results}


def main() -> None:
    """Run the tasks that were asked for and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder with one folder per task")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--causal-model", default="")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: run(name, arguments, Path(folder)) for name in arguments.tasks}
    for made in runs.values():
        made["task"]["data"] = Path(made["task"]["data"]).name
    about = {
        "benchmark": "first_runs", "lelora_env": lelora_env.__version__, "torch": torch.__version__,
        "python": platform.python_version(), "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "seed": arguments.seed,
    }
    print(json.dumps({**about, "runs": runs}))


if __name__ == "__main__":
    main()
