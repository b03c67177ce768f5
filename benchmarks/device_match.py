"""The same run on the CPU and on the GPU: do the losses agree, and how long does a step take?

Runs the same env steps (same seed, rows and actions) on the CPU in fp32, on the GPU in fp32 and on the GPU with a
bf16 model and an fp32 bank, and compares every reward loss with the CPU's. Example:

    python benchmarks/device_match.py --model minilm --task sst2:path/to/sst2 --steps 20

The last line of the output is one JSON document.
"""

import argparse
import json
import platform
import time
from typing import Any

import gymnasium as gym
import numpy as np
import torch

import lelora_env

RUNS = {"cpu fp32": ("cpu", "float32"), "gpu fp32": ("cuda", "float32"), "gpu bf16": ("cuda", "bfloat16")}


def losses(device: str, dtype: str, arguments: argparse.Namespace) -> tuple[list[float], float]:
    """L1 at the start and after every env step, and the median seconds of a step."""
    env = gym.make("LeLoRA-v0", model=arguments.model, task=arguments.task, horizon=arguments.steps, device=device,
                   dtype=dtype, parametrisation="unit", learning_rate=1e-3, tune_size=0, extra_features=("grad_norm",))
    rng = np.random.default_rng(0)
    _, info = env.reset(seed=0)
    result, times = [info["L1"]], []
    for _ in range(arguments.steps):
        action = rng.integers(0, env.action_space.nvec)  # type: ignore[attr-defined]
        start = time.perf_counter()
        info = env.step(action)[4]
        times.append(time.perf_counter() - start)
        result.append(info["L1"])
    return result, float(np.median(times))


def main() -> None:
    """Run the three and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    found: dict[str, Any] = {}
    for name, (device, dtype) in RUNS.items():
        if device == "cuda" and not torch.cuda.is_available():
            continue
        values, seconds = losses(device, dtype, arguments)
        reference = found["cpu fp32"]["losses"] if found else values
        worst = float(np.max(np.abs(np.array(values) - reference) / np.abs(reference)))
        first = abs(values[1] - reference[1]) / abs(reference[1])
        found[name] = {"losses": values, "worst_relative_difference": worst, "after_one_step": first,
                       "seconds": seconds}
        print(f"{name}: L1 {values[0]:.6f} -> {values[-1]:.6f}; relative difference from cpu fp32 {first:.1e} after "
              f"one step, {worst:.1e} at worst; {seconds * 1e3:.1f} ms a step")
    about = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "lelora_env": lelora_env.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    print(json.dumps({"benchmark": "device_match", **vars(arguments), **about, "runs": found}))


if __name__ == "__main__":
    main()
