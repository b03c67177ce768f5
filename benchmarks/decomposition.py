"""Splitting the 160 matrices of a 7B model: cold, from the cache, and PEFT's PiSSA initialisation beside it.

The shapes of LLaMA-2-7B with random weights in bf16; query, key, value, up and down, windows of 32 components. PiSSA's
full SVD is timed on one block of the same shape and counted 32 times. Needs a GPU with 60 GB.

    python -m benchmarks.decomposition

The last line of the output is one JSON document.
"""

import argparse
import gc
import os
import tempfile
import time
from typing import Any

import torch
import transformers

from benchmarks.common import need_gpu, report
from benchmarks.peft_others import PAPER_TARGETS, SEVEN_B, pissa_seconds
from lelora_env.cache import cache_folder, entries, entry_key
from lelora_env.config import AdapterConfig, EnvConfig
from lelora_env.models import ModelSource

BLOCKS = 32


def model_of(blocks: int) -> Any:
    """A causal model of the 7B shape with random weights, on the GPU, in bf16."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SEVEN_B, num_hidden_layers=blocks)).eval()
    finally:
        torch.set_default_dtype(before)


def timed(model: Any, config: AdapterConfig) -> float:
    """Seconds until the model is decomposed: hash, decomposition or cache, residuals."""
    gc.collect()
    torch.cuda.synchronize()
    start = time.perf_counter()
    base = ModelSource(model).base("causal-lm", 0, config, EnvConfig(dtype="bfloat16"))
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    assert len(base.matrices) == len(PAPER_TARGETS) * model.config.num_hidden_layers
    return seconds


def hash_seconds(model: Any) -> float:
    """Seconds for the keys of all matrices alone."""
    names = [f"{target}.weight" for target in PAPER_TARGETS]
    found = {name: parameter for name, parameter in model.named_parameters() if name.endswith(tuple(names))}
    groups: dict[torch.Size, list[torch.Tensor]] = {}
    for parameter in found.values():
        groups.setdefault(parameter.shape, []).append(parameter.detach())
    torch.cuda.synchronize()
    start = time.perf_counter()
    for group in groups.values():
        entry_key(torch.stack(group), range(96))
    return time.perf_counter() - start


def main() -> None:
    """Measure cold, cached and PiSSA."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    arguments = parser.parse_args()
    need_gpu()
    config = AdapterConfig(target_modules="query,key,value,up,down", rank_set=(0, 8, 16, 32), parametrisation="unit")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LELORA_CACHE"] = folder
        timed(model_of(1), config)  # loads the libraries' kernels
        model = model_of(arguments.blocks)
        hashed = hash_seconds(model)
        cold, cached = timed(model, config), timed(model, config)
        size = sum(entry.size for entry in entries(cache_folder() or os.devnull))  # type: ignore[arg-type]
        os.environ["LELORA_CACHE"] = "off"
        uncached = timed(model, config)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    pissa = {name: pissa_seconds(model_of(1), name) * arguments.blocks for name in ("pissa", "pissa_niter_16")}
    report("decomposition", vars(arguments), {
        "matrices": 5 * arguments.blocks, "hash": hashed, "cold": cold, "cold_without_cache": uncached,
        "from_cache_with_hash": cached, "from_cache": cached - hashed, "cache_bytes": size, "peft": pissa,
        "pissa_over_cold": pissa["pissa"] / uncached,
    })


if __name__ == "__main__":
    main()
