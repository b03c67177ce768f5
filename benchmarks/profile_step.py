"""Where the time of an env step goes on a GPU: kernels by kind, their number, and what the GPU waits.

    python -m benchmarks.profile_step --shape roberta-base --lanes 64

The last line of the output is one JSON document.
"""

import argparse
import collections
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import ENCODERS, median, need_gpu, report, sentence_model
from benchmarks.env_steps import ALL_TYPES, our_env, stepper

KINDS = (
    ("bank: products added in place", ("badd",)),
    ("bank: products with few columns", ("tst_24x", "tst_8x64", "tst_16x64", "_24_64", "splitK")),
    ("attention", ("sdpa", "cudnn", "fmha", "softmax")),
    ("fp32 products: norms and observation", ("gemm_f32",)),
    ("products of the frozen model", ("nvjet", "gemm", "cutlass")),
    ("layer norm", ("layer_norm",)),
    ("GELU", ("Gelu",)),
    ("residual additions and sums of gradients, bf16", ("CUDAFunctor_add<c10::BFloat16>",)),
    ("optimiser", ("_update_kernel",)),
)
"""Kinds of kernels, and what their names contain; the first that fits counts."""


def kind_of(name: str) -> str:
    """The kind of a kernel."""
    return next((kind for kind, parts in KINDS if any(part in name for part in parts)), "everything else")


def main() -> None:
    """Profile a few steps and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=list(ENCODERS), default="roberta-base")
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--all-matrices", action="store_true", help="all six matrices of a layer, not query and value")
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    need_gpu()
    targets = ALL_TYPES if arguments.all_matrices else "query,value"
    step = stepper(our_env(arguments.lanes, sentence_model(arguments.shape, "bfloat16", "cuda"), arguments,
                           target_modules=targets))
    wall = median(step, 8, 4)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(arguments.steps):
            step()
        torch.cuda.synchronize()
    times: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[kind_of(event.name)] += event.device_time_total / arguments.steps / 1e3
            counts[kind_of(event.name)] += 1
    results: dict[str, Any] = {"wall_ms": wall * 1e3, "kernels_ms": sum(times.values()),
                               "kernels": sum(counts.values()) / arguments.steps}
    results["by_kind_ms"] = {kind: round(ms, 3) for kind, ms in times.most_common()}
    for kind, ms in times.most_common():
        print(f"{ms:9.3f} ms  {counts[kind] / arguments.steps:7.1f} kernels  {kind}")
    report("profile_step", vars(arguments), results)


if __name__ == "__main__":
    main()
