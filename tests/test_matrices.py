"""Matrix discovery against hand-written tables of every family and against PEFT's own matching."""

from collections import Counter

import pytest
import torch
from torch import nn

from lelora_env.errors import ModelError
from lelora_env.matrices import MATRIX_TYPES, find_matrices, head_modules, linear_weight, matrix_type
from tests.families import CAUSAL_FAMILIES, FAMILIES, tiny_model

_BERT_BLOCK = {"attention.self.query": ("query", 32, 32), "attention.self.key": ("key", 32, 32),
               "attention.self.value": ("value", 32, 32), "attention.output.dense": ("output", 32, 32),
               "intermediate.dense": ("up", 64, 32), "output.dense": ("down", 32, 64)}
_LLAMA_BLOCK = {"self_attn.q_proj": ("query", 32, 32), "self_attn.k_proj": ("key", 16, 32),
                "self_attn.v_proj": ("value", 16, 32), "self_attn.o_proj": ("output", 32, 32),
                "mlp.gate_proj": ("gate", 64, 32), "mlp.up_proj": ("up", 64, 32), "mlp.down_proj": ("down", 32, 64)}
_FFN = {"intermediate.dense": ("up", 64, 32), "output.dense": ("down", 32, 64)}

# family: (path of the blocks, one block's matrices, matrices outside the blocks, task head, bias)
EXPECTED: dict[str, tuple[str, dict[str, tuple[str, int, int]], list[str], list[str]]] = {
    "bert": ("bert.encoder.layer", _BERT_BLOCK, ["bert.pooler.dense"], ["classifier"]),
    "roberta": ("roberta.encoder.layer", _BERT_BLOCK, [], ["classifier.dense", "classifier.out_proj"]),
    "mpnet": ("mpnet.encoder.layer",
              {"attention.attn.q": ("query", 32, 32), "attention.attn.k": ("key", 32, 32),
               "attention.attn.v": ("value", 32, 32), "attention.attn.o": ("output", 32, 32), **_FFN},
              [], ["classifier.dense", "classifier.out_proj"]),
    "deberta": ("deberta.encoder.layer",
                {"attention.self.in_proj": ("qkv", 96, 32), "attention.self.pos_proj": ("other", 32, 32),
                 "attention.self.pos_q_proj": ("other", 32, 32), "attention.output.dense": ("output", 32, 32), **_FFN},
                [], ["pooler.dense", "classifier"]),
    "deberta-v2": ("deberta.encoder.layer",
                   {"attention.self.query_proj": ("query", 32, 32), "attention.self.key_proj": ("key", 32, 32),
                    "attention.self.value_proj": ("value", 32, 32), "attention.output.dense": ("output", 32, 32),
                    **_FFN},
                   [], ["pooler.dense", "classifier"]),
    "distilbert": ("distilbert.transformer.layer",
                   {"attention.q_lin": ("query", 32, 32), "attention.k_lin": ("key", 32, 32),
                    "attention.v_lin": ("value", 32, 32), "attention.out_lin": ("output", 32, 32),
                    "ffn.lin1": ("up", 64, 32), "ffn.lin2": ("down", 32, 64)},
                   [], ["pre_classifier", "classifier"]),
    "gpt2": ("transformer.h",
             {"attn.c_attn": ("qkv", 96, 32), "attn.c_proj": ("output", 32, 32),
              "mlp.c_fc": ("up", 128, 32), "mlp.c_proj": ("down", 32, 128)}, [], ["score"]),
    "gpt-neox": ("gpt_neox.layers",
                 {"attention.query_key_value": ("qkv", 96, 32), "attention.dense": ("output", 32, 32),
                  "mlp.dense_h_to_4h": ("up", 64, 32), "mlp.dense_4h_to_h": ("down", 32, 64)}, [], ["score"]),
    "opt": ("model.decoder.layers",
            {"self_attn.q_proj": ("query", 32, 32), "self_attn.k_proj": ("key", 32, 32),
             "self_attn.v_proj": ("value", 32, 32), "self_attn.out_proj": ("output", 32, 32),
             "fc1": ("up", 64, 32), "fc2": ("down", 32, 64)}, [], ["score"]),
    **{family: ("model.layers", _LLAMA_BLOCK, [], ["score"])
       for family in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3")},
    "phi3": ("model.layers",
             {"self_attn.qkv_proj": ("qkv", 64, 32), "self_attn.o_proj": ("output", 32, 32),
              "mlp.gate_up_proj": ("gate_up", 128, 32), "mlp.down_proj": ("down", 32, 64)}, [], ["score"]),
}
_FUSED_QKV = ["deberta", "gpt2", "gpt-neox", "phi3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_every_family(family: str) -> None:
    path, block, outside, _ = EXPECTED[family]
    model = tiny_model(family)
    found = find_matrices(model, "all-linear")
    expected = {f"{path}.{layer}.{name}": (layer, *rest) for layer in (0, 1) for name, rest in block.items()}
    expected |= dict.fromkeys(outside, (1, "other", 32, 32))
    assert {x.name: (x.layer, x.type, x.out_features, x.in_features) for x in found} == expected
    order = [name for name, _ in model.named_modules()]
    assert [x.name for x in found] == sorted((x.name for x in found), key=order.index)
    state = model.state_dict()
    assert all(x.bias == (f"{x.name}.bias" in state) for x in found)
    assert all(x.transposed == (family == "gpt2") for x in found)
    assert {x.type for x in found} <= set(MATRIX_TYPES)


@pytest.mark.parametrize("family", FAMILIES)
def test_task_heads(family: str) -> None:
    assert head_modules(tiny_model(family)) == EXPECTED[family][3]
    assert head_modules(tiny_model(family, "base")) == []
    if family in CAUSAL_FAMILIES:
        assert head_modules(tiny_model(family, "causal-lm")) == []


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in _FUSED_QKV])
def test_type_lists_mean_the_same_on_every_family(family: str) -> None:
    model = tiny_model(family)
    assert Counter(x.type for x in find_matrices(model, "query,value")) == {"query": 2, "value": 2}
    assert Counter(x.type for x in find_matrices(model, ("query", "value"))) == {"query": 2, "value": 2}
    five = Counter(x.type for x in find_matrices(model, "query, key,value, up,down"))
    assert five == dict.fromkeys(("query", "key", "value", "up", "down"), 2)
    assert len(find_matrices(model, "attention")) == 8


@pytest.mark.parametrize("family", _FUSED_QKV)
def test_parts_of_a_fused_matrix_cannot_be_named(family: str) -> None:
    model = tiny_model(family)
    with pytest.raises(ModelError, match="use 'qkv' instead"):
        find_matrices(model, "query,value")
    assert Counter(x.type for x in find_matrices(model, "attention")) == {"qkv": 2, "output": 2}
    assert Counter(x.type for x in find_matrices(model, "qkv")) == {"qkv": 2}


def test_fused_gate_and_up() -> None:
    with pytest.raises(ModelError, match="use 'gate_up' instead"):
        find_matrices(tiny_model("phi3"), "up")


@pytest.mark.parametrize("family", CAUSAL_FAMILIES)
def test_all_linear_is_what_peft_takes(family: str) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    model = tiny_model(family, "causal-lm")
    config = _maybe_include_all_linear_layers(LoraConfig(target_modules="all-linear"), model)
    assert {x.name for x in find_matrices(model, "all-linear")} == set(config.target_modules)


@pytest.mark.parametrize(("family", "target"), [
    ("bert", ("query",)), ("bert", ("query", "value")), ("bert", ("output.dense",)), ("roberta", ("dense",)),
    ("bert", ("attention.output.dense", "intermediate.dense")), ("llama", ("q_proj", "down_proj")),
    ("llama", r".*\.1\.self_attn\.(q|k)_proj"), ("gpt2", ("c_proj",)), ("gpt2", r"transformer\.h\.0\.mlp\.c_\w+"),
    ("bert", ("bert.encoder.layer.0.output.dense",)), ("mpnet", ("q", "o")), ("gpt-neox", ("dense", "query_key_value")),
])
def test_names_and_patterns_match_as_in_peft(family: str, target: str | tuple[str, ...]) -> None:
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    model = tiny_model(family)
    heads = head_modules(model)
    config = LoraConfig(target_modules=target if isinstance(target, str) else list(target), modules_to_save=heads)
    hits = ((name, check_target_module_exists(config, name), module) for name, module in model.named_modules())
    expected = [name for name, hit, module in hits
                if hit and not isinstance(hit, _ExcludedModule) and type(module).__name__ in ("Linear", "Conv1D")]
    assert expected
    assert [x.name for x in find_matrices(model, target)] == expected


@pytest.mark.parametrize(("target", "message"), [
    ("qeury", r"no target module matches 'qeury'; did you mean 'query'\? \(13 linear layers found\)"),
    ("query,valeu", r"no target module matches 'valeu'; did you mean 'value'"),
    (("query", "q_proj"), r"no target module matches 'q_proj'"),
    ("output.dens", r"did you mean 'output.dense'"), ("all_linear", r"did you mean 'all-linear'"),
    ("gate", r"no target module matches 'gate'"),
    (r"nothing\..*", r"no target module matches 'nothing"), ("layer[", "not a valid regular expression"),
    ("classifier", "task head, which is trained whole"), (r"classi.*", "no target module matches"),
    ((), "target_modules is empty"), ("", "no target module matches ''"),
])
def test_errors_name_the_way_out(target: str | tuple[str, ...], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        find_matrices(tiny_model("bert"), target)


def test_model_without_linear_layers() -> None:
    with pytest.raises(ModelError, match=r"needs nn.Linear or Conv1D layers \(0 linear layers found\)"):
        find_matrices(nn.Sequential(nn.Conv1d(4, 4, 1)), "all-linear")


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma", "opt"])
def test_output_embedding_only_if_untied(family: str) -> None:
    tied = tiny_model(family, "causal-lm", tie_word_embeddings=True)
    with pytest.raises(ModelError, match="'lm_head' shares its weight with"):
        find_matrices(tied, "lm_head")
    untied = tiny_model(family, "causal-lm", tie_word_embeddings=False)
    [head] = find_matrices(untied, "lm_head")
    assert (head.type, head.layer, head.out_features, head.in_features) == ("other", 1, 64, 32)
    assert "lm_head" not in [x.name for x in find_matrices(untied, "all-linear")]


def test_shared_parameter_is_refused_and_shared_module_counts_once() -> None:
    shared = nn.Linear(4, 4)
    assert [x.name for x in find_matrices(nn.Sequential(shared, nn.ReLU(), shared), "all-linear")] == ["0"]
    pair = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    pair[1].weight = pair[0].weight
    with pytest.raises(ModelError, match="'0' shares its weight with '1'"):
        find_matrices(pair, "all-linear")


def test_albert_counts_each_shared_layer_once() -> None:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    model = AlbertForSequenceClassification(AlbertConfig(
        vocab_size=64, embedding_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=64))
    found = find_matrices(model, "query,key,value,output,up,down")
    assert Counter(x.type for x in found) == dict.fromkeys(("query", "key", "value", "output", "up", "down"), 1)
    assert {x.layer for x in found} == {0}


def test_plain_modules_and_their_names() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.blocks = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 16, bias=False), "down": nn.Linear(16, 8)})])
            self.mixer = nn.Linear(8, 8)
            self.classifier = nn.Linear(8, 2)

    found = find_matrices(Net(), "all-linear")
    assert [(x.name, x.layer, x.type, x.bias) for x in found] == [
        ("blocks.0.up", 0, "up", False), ("blocks.0.down", 0, "down", True), ("mixer", 0, "other", True)]
    assert [x.name for x in find_matrices(Net(), "mixer,up")] == ["blocks.0.up", "mixer"]
    assert head_modules(Net()) == ["classifier"]


def test_output_embedding_of_any_name_is_left_out() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(8, 8)
            self.readout = nn.Linear(8, 64)

        def get_output_embeddings(self) -> nn.Module:
            return self.readout

    assert [x.name for x in find_matrices(Net(), "all-linear")] == ["body"]
    assert head_modules(Net()) == []


def test_meta_device_gives_the_same_answer() -> None:
    with torch.device("meta"):
        meta = tiny_model("gpt2", "causal-lm")
    assert next(meta.parameters()).is_meta
    assert find_matrices(meta, "all-linear") == find_matrices(tiny_model("gpt2", "causal-lm"), "all-linear")


@pytest.mark.parametrize(("name", "kind"), [
    ("transformer.h.3.self_attention.query_key_value", "qkv"), ("transformer.h.3.self_attention.dense", "output"),
    ("model.layers.0.self_attn.dense", "output"), ("layers.0.attn.Wqkv", "qkv"), ("layers.0.attn.Wo", "output"),
    ("backbone.layers.0.mixer.in_proj", "other"), ("pooler.dense", "other"), ("encoder.project_in", "other"),
    ("encoder.layer.0.crossattention.output.dense", "output"), ("monkey", "other"), ("h.0.mlp.fc_out", "down"),
])
def test_type_of_paths_beyond_the_families(name: str, kind: str) -> None:
    assert matrix_type(name) == kind


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_linear_weight_computes_what_the_module_computes(family: str) -> None:
    model = tiny_model(family)
    for info in find_matrices(model, "all-linear"):
        module = model.get_submodule(info.name)
        weight = linear_weight(module)
        assert weight.shape == (info.out_features, info.in_features)
        x = torch.randn(3, info.in_features, generator=torch.Generator().manual_seed(0))
        bias = model.get_parameter(f"{info.name}.bias") if info.bias else torch.zeros(())
        torch.testing.assert_close(module(x), x @ weight.T + bias)
        assert weight.data_ptr() == model.get_parameter(f"{info.name}.weight").data_ptr()


def test_linear_weight_refuses_other_modules() -> None:
    with pytest.raises(ModelError, match=r"expected nn.Linear or transformers' Conv1D, got Embedding"):
        linear_weight(nn.Embedding(3, 4))
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match="packed"):
        linear_weight(packed)
