"""Tokenisers made on the spot: one with special tokens, segments and a pad token, one with none of them."""

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ALPHABET = [chr(i) for i in range(33, 127)]


def bert_like() -> Any:
    """One token a character of a word: [CLS] a [SEP] b [SEP], token types, pad token."""
    words = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *ALPHABET])}
    inner = Tokenizer(models.WordPiece(words | {f"##{c}": len(words) + i for i, c in enumerate(ALPHABET)},
                                       unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
                                   sep_token="[SEP]",
                                   model_input_names=["input_ids", "token_type_ids", "attention_mask"])


def gpt_like(*, bos: bool = False) -> Any:
    """Byte-level BPE without a pad token; `bos` puts a beginning-of-text token before every text."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|start|>"]
    inner.train_from_iterator(
        ["the correct answer is answer1 answer2 true false"] * 4,
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<|start|> $A", special_tokens=[("<|start|>", inner.token_to_id("<|start|>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>", bos_token="<|start|>" if bos else None,
                                   model_input_names=["input_ids", "attention_mask"])
