"""What the benchmarks share: timing, models with random weights, rows of random tokens, and the report of a run."""

import json
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

import lelora_env
from agents import Transition, make_agent
from lelora_env.features import weight_norms
from lelora_env.runs import environment_facts
from lelora_env.tasks.dataset import DatasetTask

ENCODERS: dict[str, dict[str, Any]] = {
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536,
               "vocab_size": 30522},
    "roberta-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                     "intermediate_size": 3072, "vocab_size": 50265},
}
"""Shapes of sentence models (BERT's architecture)."""

PEAK = 790e12
"""bf16 FLOP/s that an H100 or H200 (SXM) reaches in a large matrix product of random numbers."""


def sentence_model(shape: str, dtype: str, device: str) -> Any:
    """A two-class sentence model with random weights."""
    torch.manual_seed(0)
    config = transformers.BertConfig(**ENCODERS[shape], num_labels=2)
    return transformers.BertForSequenceClassification(config).to(device, getattr(torch, dtype)).eval()


def flops_per_token(shape: str, length: int) -> float:
    """F: two for every weight of the blocks' linear layers, and the two products of attention."""
    sizes = ENCODERS[shape]
    width, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    linear = layers * (4 * width**2 + 2 * width * sizes["intermediate_size"])
    return float(2 * linear + layers * 4 * length * width)


def random_rows(count: int, length: int, causal: bool = False, vocabulary: int = 30000) -> DatasetTask:
    """Rows of random tokens, all of one length: two classes, or the next token to predict."""
    rng = np.random.default_rng(0)
    rows = [{"ids": rng.integers(5, vocabulary, length).tolist(), "label": int(i % 2)} for i in range(count)]

    def collate(part: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["ids"] for row in part])
        labels = ids if causal else torch.tensor([row["label"] for row in part])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    if causal:
        return DatasetTask(rows, collate, eval=rows[:8], head="causal-lm")
    return DatasetTask(rows, collate, eval=rows[:64], head="sequence-classification", num_labels=2)


def need_gpu() -> None:
    """Stop with one line where there is no GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU")


def synchronise() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median(call: Callable[[], Any], repeats: int, warm_up: int = 5) -> float:
    """Median seconds of `repeats` calls after a warm-up, synchronised before and after each."""
    return in_turn({"call": call}, repeats, warm_up)["call"]


def in_turn(calls: dict[str, Callable[[], Any]], repeats: int, warm_up: int = 5) -> dict[str, float]:
    """Median seconds of several calls, made in turn: whatever slows the machine for a while slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warm_up + repeats):
        for name, call in calls.items():
            synchronise()
            start = time.perf_counter()
            call()
            synchronise()
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(values[warm_up:])) for name, values in times.items()}


def recorded(call: Callable[[], Any]) -> Callable[[], Any]:
    """A function of static tensors as a CUDA graph, so that its kernels are timed and not their launches."""
    if not torch.cuda.is_available():
        return call
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def agents_part(env: Any) -> dict[str, Callable[[], Any]]:
    """One env step of a one-lane environment, and beside it what REINFORCE (the paper's network) and seeing cost."""
    agent = make_agent("reinforce", env, seed=0)
    observation = env.reset(seed=0)[0]
    action = agent.act(observation)
    after, reward, terminated, truncated, info = env.step(action)
    transition = Transition(observation, action, reward, terminated, truncated, info, after)
    measure, spectrum = env._measure, env.tuner.base.spectrum
    with torch.no_grad():
        products = measure.grams()  # needed without the norms too
        observe = recorded(lambda: measure.observer.observe(measure.grams(), measure.progress, measure.extras))
        norm = recorded(lambda: weight_norms(products, spectrum))
    return {"env_step": lambda: env.step(action), "act": lambda: agent.act(observation),
            "update": lambda: agent.update(transition), "observation": observe, "norm": norm}


def with_shares(seconds: dict[str, float]) -> dict[str, float]:
    """Times of `agents_part`, and the shares of agent and observation and of the norm in a whole step."""
    whole = seconds["env_step"] + seconds["act"] + seconds["update"]
    share = (seconds["act"] + seconds["update"] + seconds["observation"]) / whole
    return {**seconds, "whole": whole, "agent_and_observation_share": share, "norm_share": seconds["norm"] / whole}


def report(benchmark: str, settings: dict[str, Any], results: dict[str, Any]) -> None:
    """Print results with hardware, versions and commit: one JSON document on the last line."""
    gpu = torch.cuda.is_available()
    about = {
        "benchmark": benchmark,
        "hardware": torch.cuda.get_device_name() if gpu else f"CPU, {torch.get_num_threads()} threads of {_cores()}",
        "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
        "lelora_env": lelora_env.__version__, "commit": environment_facts()["commit"], "settings": settings,
    }
    print(json.dumps({**about, "results": results}, default=float))


def _cores() -> str:
    return f"{os.cpu_count()} cores ({platform.machine()})"
