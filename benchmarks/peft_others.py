"""What else a user would do without this package, kept plain: a LoRA step of a causal model, PiSSA's decomposition.

Like `benchmarks.peft_env`, this is the opponent of the benchmarks and stays as it is.
"""

import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

SEVEN_B = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
           "vocab_size": 32000, "max_position_embeddings": 4096}
"""The shape of LLaMA-2-7B but for the number of blocks (32)."""

PAPER_TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
"""The paper's placement on LLaMA-2-7B: 160 matrices."""


class PeftCausalLoRA:
    """A causal language model with LoRA, and its training step, as a training script has it."""

    def __init__(self, model: Any, rank: int = 32, adapter_dtype_follows_model: bool = False) -> None:
        """Wrap `model`, which is changed in place.

        Args:
            model: A transformers causal language model, on its device.
            rank: LoRA's r.
            adapter_dtype_follows_model: ``False`` is PEFT's default: fp32 adapters on a bf16 model.
        """
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=PAPER_TARGETS)
        self.model = get_peft_model(model, config, autocast_adapter_dtype=not adapter_dtype_follows_model)
        self.model.train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=5e-4)

    def train_step(self, batches: list[torch.Tensor]) -> None:
        """One optimiser step on token ids, in as many parts as there are batches (B, T)."""
        self.optimiser.zero_grad()
        for ids in batches:
            loss = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, use_cache=False).loss
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()


def pissa_seconds(model: Any, initialisation: str = "pissa") -> float:
    """How long PEFT takes to initialise LoRA by PiSSA on every target of `model` (changed in place)."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    get_peft_model(model, LoraConfig(r=32, lora_alpha=32, target_modules=PAPER_TARGETS,
                                     init_lora_weights=initialisation))  # type: ignore[arg-type]
    torch.cuda.synchronize()
    return time.perf_counter() - start
