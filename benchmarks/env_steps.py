"""How long an env step takes, how it grows with the number of lanes, and what a plain PEFT environment takes.

Steps of a classification model with random weights (so that it needs no download): query and value, ranks up to 8,
training batch 16 rows, reward batch 32 rows, all of one length. Ours captured as CUDA graphs and plainly, for several
numbers of lanes, and in the same run the environment of benchmarks/peft_env.py (one LoRA training step, one reward
forward pass) and its training step alone. Median of several after warm-up, synchronised.

    python -m benchmarks.env_steps --shape roberta-base --lanes 1 8 64

The last line of the output is one JSON document.
"""

import argparse
import copy
import itertools
import json
import platform
import time
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch
import transformers

import lelora_env
from benchmarks.peft_env import PeftLoRAEnv
from lelora_env.tasks.dataset import DatasetTask

SHAPES: dict[str, dict[str, Any]] = {
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536,
               "vocab_size": 30522},
    "roberta-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                     "intermediate_size": 3072, "vocab_size": 50265},
}


def random_rows(count: int, length: int) -> DatasetTask:
    """Rows of random tokens, all of one length, with two labels."""
    rng = np.random.default_rng(0)
    rows = [{"ids": rng.integers(5, 30000, length).tolist(), "label": int(i % 2)} for i in range(count)]

    def collate(part: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["ids"] for row in part])
        labels = torch.tensor([row["label"] for row in part])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    return DatasetTask(rows, collate, eval=rows[:64], head="sequence-classification", num_labels=2)


def measure(lanes: int, captured: bool, arguments: argparse.Namespace, model: torch.nn.Module) -> dict[str, float]:
    """Median seconds of a step with `lanes` lanes."""
    env = gym.make_vec("LeLoRA-v0", num_envs=lanes, vectorization_mode="vector_entry_point", model=model,
                       task=random_rows(2048, arguments.length), batch_size=16, reward_size=32, tune_size=0,
                       horizon=10_000, parametrisation="unit", target_modules="query,value", cuda_graphs=captured)
    env.reset(seed=0)
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(4)]
    turn = itertools.cycle(actions)
    median = _median(lambda: env.step(next(turn)), arguments.repeats)
    return {"lanes": lanes, "captured": captured, "seconds": median, "lane_steps_per_second": lanes / median}


def measure_peft(arguments: argparse.Namespace, model: torch.nn.Module) -> dict[str, float]:
    """Median seconds of the plain PEFT environment's step, and of its training step alone."""
    device = next(model.parameters()).device
    rng = np.random.default_rng(0)

    def rows(count: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(rng.integers(5, 30000, (count, arguments.length))).to(device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}

    env = PeftLoRAEnv(copy.deepcopy(model), rows(2048), rows(32))
    env.reset(seed=0)
    action = env.action_space.sample()
    return {"env_step": _median(lambda: env.step(action), arguments.repeats),
            "train_step_alone": _median(env.train_step, arguments.repeats)}


def _median(call: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats + 6):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[6:]))


def main() -> None:
    """Measure every number of lanes, captured and plainly, and the PEFT environment."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="roberta-base")
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = transformers.BertConfig(**SHAPES[arguments.shape], num_labels=2)
    model = transformers.BertForSequenceClassification(config).to(device, getattr(torch, arguments.dtype))
    peft = measure_peft(arguments, model)
    print("peft", {key: round(value, 5) for key, value in peft.items()}, flush=True)
    results = []
    for lanes in arguments.lanes:
        for captured in ([True, False] if device == "cuda" else [False]):
            results.append(measure(lanes, captured, arguments, model))
            print({key: round(value, 5) for key, value in results[-1].items()}, flush=True)
    about = {
        "benchmark": "env_steps", "peft": peft, "lelora_env": lelora_env.__version__, "torch": torch.__version__,
        "transformers": transformers.__version__, "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
    }
    print(json.dumps({**about, **vars(arguments), "results": results}))


if __name__ == "__main__":
    main()
