"""How long an env step takes, how it grows, and what else a user could have: everything in one run.

A sentence model with random weights, query and value, ranks up to 8, training batch 16 rows, reward batch 32 rows, all
of one length. Ours with one lane and with many; the plain environment of benchmarks/peft_env.py (one LoRA training
step and one reward forward pass), several of it in Gymnasium's SyncVectorEnv, and its training step alone.
Besides: the default agent's share, the norm's share, what a fork costs, and how time grows with lanes and matrices.

    python -m benchmarks.env_steps --shape roberta-base --lanes 1 8 64

On a CPU: python -m benchmarks.env_steps --shape minilm --lanes 1 --dtype float32 --repeats 10 --copies 0

Times are seconds; ``share_of_peak`` is the share of 790 TFLOP/s. The last line of the output is one JSON document.
"""

import argparse
import copy
import gc
import itertools
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import torch

import lelora_env
from benchmarks.common import (
    ENCODERS,
    PEAK,
    agents_part,
    flops_per_token,
    in_turn,
    median,
    random_rows,
    report,
    sentence_model,
    with_shares,
)
from benchmarks.peft_env import PeftLoRAEnv

ALL_TYPES = "query,key,value,output,up,down"
BATCH, REWARD = 16, 32


def our_env(lanes: int, model: Any, arguments: argparse.Namespace, **options: Any) -> lelora_env.LeLoRAVectorEnv:
    """The native environment, reset."""
    options = {"target_modules": "query,value", **options}
    env = gym.make_vec("LeLoRA-v0", num_envs=lanes, vectorization_mode="vector_entry_point", model=model,
                       task=random_rows(2048, arguments.length), batch_size=BATCH, reward_size=REWARD, tune_size=0,
                       horizon=100_000, parametrisation="unit", **options)
    env.reset(seed=0)
    env.action_space.seed(0)
    return env  # type: ignore[return-value]


def stepper(env: Any) -> Callable[[], Any]:
    """Steps `env` with actions drawn beforehand."""
    turn = itertools.cycle([env.action_space.sample() for _ in range(4)])
    return lambda: env.step(next(turn))


def plain_env(model: Any, arguments: argparse.Namespace) -> PeftLoRAEnv:
    """The plain PEFT environment over a copy of the model."""
    device = next(model.parameters()).device
    rng = np.random.default_rng(0)

    def rows(count: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(rng.integers(5, 30000, (count, arguments.length))).to(device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}

    env = PeftLoRAEnv(copy.deepcopy(model), rows(2048), rows(REWARD), batch=BATCH)
    env.reset(seed=0)
    return env


def against_peft(model: Any, arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of one step: ours as graphs and plainly, the plain environment, its training step; all in turn."""
    peft = plain_env(model, arguments)
    action = peft.action_space.sample()
    calls = {"ours": stepper(our_env(1, model, arguments)), "peft_env": lambda: peft.step(action),
             "peft_train_step": peft.train_step}
    if torch.cuda.is_available():
        calls["ours_without_graphs"] = stepper(our_env(1, model, arguments, cuda_graphs=False))
    seconds = in_turn(calls, arguments.repeats)
    return {**seconds, "peft_env_over_ours": seconds["peft_env"] / seconds["ours"],
            "peft_train_step_over_ours": seconds["peft_train_step"] / seconds["ours"]}


def copies_of_peft(model: Any, arguments: argparse.Namespace) -> dict[str, float]:
    """Several plain environments in SyncVectorEnv, each with a model of its own."""
    envs = gym.vector.SyncVectorEnv([lambda: plain_env(model, arguments) for _ in range(arguments.copies)])
    envs.reset(seed=0)
    actions = envs.action_space.sample()
    seconds = median(lambda: envs.step(actions), max(3, arguments.repeats // 3))
    envs.close()
    return {"copies": arguments.copies, "seconds": seconds, "lane_steps_per_second": arguments.copies / seconds}


def many_lanes(model: Any, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Ours with every number of lanes: seconds, lane-steps a second, share of the peak, memory."""
    results = []
    tokens = 2 * BATCH * arguments.length + REWARD * arguments.length  # forward and backward, forward
    for lanes in arguments.lanes:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step = stepper(our_env(lanes, model, arguments))
        seconds = median(step, max(5, arguments.repeats // (1 + lanes // 8)))
        rate = lanes / seconds
        results.append({
            "lanes": lanes, "seconds": seconds, "lane_steps_per_second": rate,
        })
        if torch.cuda.is_available():
            work = tokens * flops_per_token(arguments.shape, arguments.length)
            results[-1] |= {"share_of_peak": rate * work / PEAK, "peak_gib": torch.cuda.max_memory_reserved() / 2**30}
    return results


def agents_share(model: Any, arguments: argparse.Namespace) -> dict[str, float]:
    """REINFORCE (the paper's network) and the observation, beside the env step, one lane."""
    with torch.no_grad():
        return with_shares(in_turn(agents_part(our_env(1, model, arguments)), arguments.repeats))


def forks(model: Any, arguments: argparse.Namespace) -> dict[str, float]:
    """One lane's state into all others, beside a step."""
    env = our_env(arguments.fork_lanes, model, arguments)
    calls = {"step": stepper(env), "fork_into_all": lambda: env.set_state(env.get_state(0))}
    seconds = in_turn(calls, max(5, arguments.repeats // 3))
    return {"lanes": arguments.fork_lanes, **seconds, "fork_over_step": seconds["fork_into_all"] / seconds["step"]}


def more_matrices(model: Any, arguments: argparse.Namespace) -> dict[str, float]:
    """Query and value of every layer against all six matrices of every layer."""
    few, many = our_env(1, model, arguments), our_env(1, model, arguments, target_modules=ALL_TYPES)
    seconds = in_turn({"few": stepper(few), "many": stepper(many)}, arguments.repeats)
    return {"matrices_few": few.num_matrices, "matrices_many": many.num_matrices, **seconds,
            "growth": seconds["many"] / seconds["few"]}


def main() -> None:
    """Measure it all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=list(ENCODERS), default="roberta-base")
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--fork-lanes", type=int, default=8)
    parser.add_argument("--copies", type=int, default=4, help="plain environments in SyncVectorEnv; 0 leaves it out")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    arguments = parser.parse_args()
    model = sentence_model(arguments.shape, arguments.dtype, "cuda" if torch.cuda.is_available() else "cpu")
    parts = {"one_lane": against_peft, "agent": agents_share, "forks": forks, "matrices": more_matrices,
             "lanes": many_lanes}
    if arguments.copies:
        parts["sync_vector_env"] = copies_of_peft
    results: dict[str, Any] = {}
    for name, part in parts.items():
        results[name] = part(model, arguments)
        for line in results[name] if isinstance(results[name], list) else [results[name]]:
            print(f"{name:16}" + "  ".join(f"{key} {value:.4g}" for key, value in line.items()), flush=True)
        gc.collect()
    report("env_steps", vars(arguments), results)


if __name__ == "__main__":
    main()
