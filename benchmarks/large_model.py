"""A 7B model: our training step and our whole env step against PEFT LoRA's training step, time and memory.

The shape of LLaMA-2-7B with random weights in bf16, written to a folder and loaded by path; query, key, value, up and
down; ranks up to 32 against LoRA r = 32; rows of 512 tokens. First a batch of 8, without the reward forward pass; then
the paper's batch of 64 in 8 parts with everything included: reward rows (32), observation, REINFORCE.
PEFT twice: as it comes (fp32 adapters on a bf16 model), and with bf16 adapters. Needs a GPU with 80 GB.

    python -m benchmarks.large_model --folder /tmp/seven-b

The last line of the output is one JSON document.
"""

import argparse
import gc
import time
import types
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
import transformers

import lelora_env
from benchmarks.common import agents_part, in_turn, median, need_gpu, random_rows, report, with_shares
from benchmarks.decomposition import model_of
from benchmarks.peft_others import PeftCausalLoRA

LENGTH, PART, PARTS = 512, 8, 8


def fresh() -> None:
    """Let go of what the measurement before left behind."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def peak() -> dict[str, float]:
    """GiB: the most in use, and the most held from the device."""
    return {"allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
            "reserved_gib": torch.cuda.max_memory_reserved() / 2**30}


def measure_peft(folder: Path, bf16_adapters: bool, repeats: int) -> dict[str, float]:
    """Seconds of PEFT LoRA's training step with a batch of 8 and of 64, and peak memory."""
    fresh()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to("cuda")
    peft = PeftCausalLoRA(model, adapter_dtype_follows_model=bf16_adapters)
    ids = [torch.randint(5, 30000, (PART, LENGTH), device="cuda") for _ in range(PARTS)]
    small = median(lambda: peft.train_step(ids[:1]), repeats, 2)
    large = median(lambda: peft.train_step(ids), max(2, repeats // 4), 1)
    return {"batch_8": small, "batch_64": large, **peak()}


def our_env(folder: Path, batch: int, parts: int, **options: Any) -> lelora_env.LeLoRAVectorEnv:
    """The environment on the model in `folder`, one lane, reset."""
    env = gym.make_vec("LeLoRA-v0", num_envs=1, vectorization_mode="vector_entry_point", model=str(folder),
                       task=random_rows(512, LENGTH, causal=True), batch_size=batch, accumulate=parts, reward_size=32,
                       tune_size=0, horizon=1000, parametrisation="unit", rank_set=(0, 8, 16, 32), dtype="bfloat16",
                       target_modules="query,key,value,up,down", tokenizer=types.SimpleNamespace(), **options)
    env.reset(seed=0)
    return env  # type: ignore[return-value]


def measure_training(folder: Path, repeats: int, **options: Any) -> dict[str, float]:
    """Seconds of our training step with a batch of 8, and peak memory of loading and training together."""
    fresh()
    start = time.perf_counter()
    env = our_env(folder, PART, 1, **options)
    ready = time.perf_counter() - start
    load = peak()["reserved_gib"]
    fresh()
    env.step(env.action_space.sample())
    training_alone = median(lambda: env.tuner.train(1), repeats, 2)
    return {"batch_8": training_alone, **peak(), "ready": ready, "load_reserved_gib": load}


def measure_everything(folder: Path, repeats: int) -> dict[str, float]:
    """Seconds of env step, agent, observation and norm with a batch of 64."""
    fresh()
    env = our_env(folder, PART * PARTS, PARTS)
    calls = agents_part(env)
    step = calls.pop("env_step")
    with torch.no_grad():
        seconds = in_turn(calls, 5, 2)
    return {**with_shares({"env_step": median(step, max(2, repeats // 4), 1), **seconds}), **peak()}


def main() -> None:
    """Write the model, measure PEFT and ours."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the model is written; 14 GB")
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=8)
    arguments = parser.parse_args()
    need_gpu()
    if not (arguments.folder / "config.json").exists():
        model_of(arguments.blocks).save_pretrained(arguments.folder)
    results: dict[str, Any] = {}
    for name, bf16 in (("peft", False), ("peft_bf16_adapters", True)):
        results[name] = measure_peft(arguments.folder, bf16, arguments.repeats)
        print(name, results[name], flush=True)
    for name, options in (("ours", {}), ("ours_without_graphs", {"cuda_graphs": False}),
                          ("ours_checkpointing", {"activation_checkpointing": True})):
        results[name] = measure_training(arguments.folder, arguments.repeats, **options)
        print(name, results[name], flush=True)
    results["everything"] = measure_everything(arguments.folder, arguments.repeats)
    print("everything", results["everything"], flush=True)
    ours, everything = results["ours"], results["everything"]
    for name in ("peft", "peft_bf16_adapters"):
        peft = results[name]
        results[f"over_{name}"] = {
            "training_step": ours["batch_8"] / peft["batch_8"], "everything": everything["whole"] / peft["batch_64"],
            "allocated": ours["allocated_gib"] / peft["allocated_gib"],
            "reserved": ours["reserved_gib"] / peft["reserved_gib"],
        }
    report("large_model", {"blocks": arguments.blocks, "repeats": arguments.repeats}, results)


if __name__ == "__main__":
    main()
