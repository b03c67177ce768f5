"""Tiny random models of every supported family: two layers, 32 wide, built from a config, nothing downloaded."""

import logging
import warnings
from typing import Any, Literal

import torch
from torch import nn

Head = Literal["sequence-classification", "causal-lm", "base"]

_COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
           "intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER = {**_COMMON, "max_position_embeddings": 66}
_DECODER = {**_COMMON, "max_position_embeddings": 64, "num_key_value_heads": 2}
_GEMMA = {**_DECODER, "head_dim": 8}

FAMILY_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertConfig", _ENCODER),
    "roberta": ("RobertaConfig", _ENCODER),
    "mpnet": ("MPNetConfig", _ENCODER),
    "deberta": ("DebertaConfig", {**_ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "deberta-v2": ("DebertaV2Config", {**_ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"],
                                       "position_buckets": 16, "share_att_key": True}),
    "distilbert": ("DistilBertConfig", {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64,
                                        "max_position_embeddings": 64, "pad_token_id": 0}),
    "gpt2": ("GPT2Config", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
                            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt-neox": ("GPTNeoXConfig", {**_COMMON, "max_position_embeddings": 64}),
    "opt": ("OPTConfig", {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
                          "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "pad_token_id": 0,
                          "bos_token_id": 1, "eos_token_id": 2}),
    "llama": ("LlamaConfig", _DECODER),
    "mistral": ("MistralConfig", _DECODER),
    "qwen2": ("Qwen2Config", _DECODER),
    "qwen3": ("Qwen3Config", {**_DECODER, "head_dim": 8}),
    "gemma": ("GemmaConfig", _GEMMA),
    "gemma2": ("Gemma2Config", _GEMMA),
    "gemma3": ("Gemma3TextConfig", _GEMMA),
    "phi3": ("Phi3Config", _DECODER),
}
"""Config class and arguments of every family."""

FAMILIES = list(FAMILY_CONFIGS)
"""Names of all supported families."""

CAUSAL_FAMILIES = ["gpt2", "gpt-neox", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3",
                   "phi3"]
"""The families that have a language-model head."""

VOCAB_SIZE = 64
"""Token ids of every family lie in [0, 64); 0 is the pad token."""

_AUTO_CLASSES = {"sequence-classification": "AutoModelForSequenceClassification", "causal-lm": "AutoModelForCausalLM",
                 "base": "AutoModel"}


def tiny_model(family: str, head: Head = "sequence-classification", *, num_labels: int = 2, seed: int = 0,
               attention: str = "eager", **config: Any) -> Any:
    """A tiny random model in evaluation mode: float32, dropout as the family's config has it.

    Args:
        family: One of `FAMILIES`.
        head: Which head it carries; only `CAUSAL_FAMILIES` have ``"causal-lm"``.
        num_labels: Labels of a sequence-classification head.
        seed: Seed of the weights; the caller's random state is left alone.
        attention: ``attn_implementation``.
        config: Further arguments of the config, such as ``tie_word_embeddings=False``.
    """
    import transformers

    class_name, arguments = FAMILY_CONFIGS[family]
    arguments = {**arguments, **({"num_labels": num_labels} if head == "sequence-classification" else {}), **config}
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        built = getattr(transformers, class_name)(**arguments)
        auto = getattr(transformers, _AUTO_CLASSES[head])
        model: nn.Module = auto.from_config(built, attn_implementation=attention)
    return model.eval()
