"""What can go wrong without a sound: each of these once did, or could."""

import copy
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from torch import Tensor, nn

from lelora_env import LeLoRAEnv, LeLoRAError, LeLoRAVectorEnv
from lelora_env.export import load_adapter, save_adapter
from tests.families import tiny_model
from tests.helpers import TokenTask, action_for, make_lanes
from tests.small_tokenizers import bert_like
from tests.test_env import VectorTask

TINY: dict[str, Any] = {"reward_size": 8, "tune_size": 0, "batch_size": 4, "rank_set": (0, 1, 2),
                        "parametrisation": "unit"}


def bert(**more: Any) -> dict[str, Any]:
    return {"model": tiny_model("bert", num_labels=3), "task": TokenTask(), **TINY, **more}


def test_a_loaded_adapter_brings_its_own_l1(tmp_path: Path) -> None:
    env = make_lanes(2)
    env.reset(seed=0)
    for _ in range(5):
        env.step(action_for(env, 3, 0))
    save_adapter(env, tmp_path, lane=1)
    fresh = make_lanes(1)
    fresh.reset(seed=3)
    load_adapter(fresh, tmp_path)
    before = float(fresh.tuner.reward_loss())
    _, _, _, _, info = fresh.step(action_for(fresh, 3, 0))
    assert info["L2"][0] == pytest.approx(float(fresh.tuner.reward_loss()) - before, abs=1e-6)


class ReadsTheWeight(nn.Module):
    """Uses one layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self.second(nn.functional.linear(input, self.first.weight))
        return out


class SharedPositions(nn.Module):
    """Puts a tensor without a batch dimension through an adapted layer, as relative positions often are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(64, 16), nn.Embedding(12, 16)
        self.query, self.classifier = nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        places = self.query(self.places.weight[: input_ids.shape[1]])
        hidden = torch.tanh(self.query(self.words(input_ids)) + places) * attention_mask.unsqueeze(-1)
        out: Tensor = self.classifier(hidden.mean(1))
        return out


def test_a_layer_that_is_never_called_is_refused() -> None:
    with torch.random.fork_rng():
        model = ReadsTheWeight()
    with pytest.raises(LeLoRAError, match="never calls 'first'"):
        make_lanes(2, model=model, task=VectorTask(), target_modules="all-linear", **TINY).reset(seed=0)
    make_lanes(2, model=model, task=VectorTask(), target_modules=("second",), **TINY).reset(seed=0)


@pytest.mark.parametrize("lanes", [2, 3, 4, 6])
def test_lanes_run_one_at_a_time_where_a_layer_sees_no_batch(lanes: int) -> None:
    with torch.random.fork_rng():
        model = SharedPositions()
    options = {"model": model, "task": TokenTask("none"), "target_modules": ("query",), **TINY, "learning_rate": 0.05}
    env = make_lanes(lanes, **options)
    env.reset(seed=0)
    assert env.tuner.passes.looped
    for _ in range(3):
        actions = action_for(env, 2, 0)
        actions[0] = 0
        infos = env.step(actions)[4]
    alone = make_lanes(1, **options)
    alone.reset(seed=lanes - 1)
    for _ in range(3):
        expected = alone.step(action_for(alone, 2, 0))[4]
    assert infos["L1"][-1] == pytest.approx(expected["L1"][0], abs=1e-5)


def test_nothing_moves_or_reads_the_global_generators(tmp_path: Path) -> None:
    """Also where the checkpoint lacks weights of the backbone."""
    import transformers

    config = transformers.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                                     intermediate_size=64, num_labels=3)
    with torch.random.fork_rng():
        transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    starts = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
        env = LeLoRAEnv(str(tmp_path), TokenTask(), tokenizer=bert_like(), **TINY)
        starts.append(env.reset(seed=0)[1]["L1"])
        env.step(env.action_space.sample())
        LeLoRAEnv().reset(seed=0)
        assert torch.equal(before[0], torch.get_rng_state())
        assert np.array_equal(before[1], np.random.get_state()[1])  # type: ignore[index]  # noqa: NPY002
        del env
    assert starts[0] == starts[1]


@pytest.mark.parametrize("seed", [-1, 1.5, "a", 2**63, True, [-1, 2], [1.5, 2], [2**63, 1], ["a", 2]])
def test_bad_seeds_change_nothing(seed: Any) -> None:
    env = make_lanes(2)
    env.reset(seed=0)
    before = env.get_state(1)
    with pytest.raises(LeLoRAError, match="seed"):
        env.reset(seed=seed)
    assert all(torch.equal(value, before[key]) for key, value in env.get_state(1).items())


def test_numpy_seeds_are_seeds() -> None:
    one, two = make_lanes(2), make_lanes(2)
    seed: Any = np.int64(3)
    assert np.array_equal(one.reset(seed=seed)[1]["L1"], two.reset(seed=3)[1]["L1"])
    assert one.np_random.integers(2**40) == two.np_random.integers(2**40)


def test_common_random_numbers_share_a_drawn_seed_whatever_is_reset_first() -> None:
    env = make_lanes(2, common_random_numbers=True)
    env.reset(options={"reset_mask": np.array([False, True])})
    env.reset(options={"reset_mask": np.array([True, False])})
    seeds = [int(env.get_state(lane)["env.clock"][0]) for lane in range(2)]
    assert seeds[0] == seeds[1] >= 0
    env.step(action_for(env, 1, 0))


def test_an_instance_brings_its_own_first_seed() -> None:
    for _ in range(2):
        env = gym.make("LeLoRA-v0", instance="planted-free/test-0")
        env.reset()
        assert int(env.unwrapped.get_state()["env.clock"][0]) == 200  # type: ignore[attr-defined]


def test_specs_with_enums_devices_and_objects_can_be_made_again() -> None:
    env = make_lanes(2, autoreset_mode=AutoresetMode.SAME_STEP, device="cpu")
    assert env.spec is not None
    again = gym.make_vec(copy.deepcopy(env.spec))
    assert isinstance(again, LeLoRAVectorEnv)
    assert again.autoreset_mode == AutoresetMode.SAME_STEP
    one = gym.make("LeLoRA-v0", **bert())
    assert one.spec is not None
    assert gym.make(one.spec).reset(seed=0)[1] == one.reset(seed=0)[1]


def test_an_interrupted_step_leaves_no_dropout_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_lanes(2, **bert(dropout=0.5))
    env.reset(seed=0)
    expected = env.tuner.reward_loss()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lelora_env.finetune.backward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            env.step(action_for(env, 2, 0))
    assert torch.equal(env.tuner.reward_loss(), expected)


def test_dropout_that_could_not_work_is_refused() -> None:
    model = tiny_model("llama", num_labels=3)
    model.config.pad_token_id = 1
    with pytest.raises(LeLoRAError, match="would have no effect"):
        make_lanes(1, model=model, task=TokenTask(), dropout=0.1, target_modules="query", **TINY).reset(seed=0)


def test_dropout_of_a_lane_does_not_hang_on_the_others_widths() -> None:
    """Lane 0 is put back to its start in mid-run, so that the two lanes' batches differ in width from then on."""
    task = TokenTask(rows=64, length=40)
    model = tiny_model("bert", num_labels=3)
    options = {**TINY, "model": model, "task": task, "dropout": 0.3, "adam_eps": 1e-5}
    pair, alone = make_lanes(2, **options), make_lanes(1, **options)
    pair.reset(seed=0)
    alone.reset(seed=1)
    widths = set()
    for step in range(10):
        if step == 3:
            pair.reset(options={"reset_mask": np.array([True, False])})
        widths.add(tuple(pair.tuner.batches.width(int(s)) for s in pair.tuner.steps))
        ours, theirs = pair.step(action_for(pair, 2, 0))[4], alone.step(action_for(alone, 2, 0))[4]
        assert ours["train_loss"][1] == pytest.approx(theirs["train_loss"][0], abs=2e-6)
    assert any(a != b for a, b in widths)


def test_the_gradient_norm_does_not_grow_with_the_batch() -> None:
    seen = []
    for batch in (8, 32):
        env = make_lanes(1, batch_size=batch, raw_observation=True, extra_features=("grad_norm",), max_grad_norm=None)
        env.reset(seed=0)
        observation, *_, infos = env.step(np.tile([3, 0], (1, 24)))
        seen.append(np.sqrt((observation[0, :, -1] ** 2).sum()))
        assert infos["grad_norm"][0] <= seen[-1] * 1.001  # info counts what trained, the column the whole bank
    assert seen[1] < 1.5 * seen[0]


def test_states_that_lack_something_change_nothing() -> None:
    env = make_lanes(2)
    env.reset(seed=0)
    state = env.get_state(0)
    env.step(action_for(env, 3, 0))
    before = env.get_state(1)
    for key in state:
        with pytest.raises(LeLoRAError, match="does not fit"):
            env.set_state({k: v for k, v in state.items() if k != key}, 1)
    for lanes in (7, -1, [0, 2]):
        with pytest.raises(LeLoRAError, match="no lane"):
            env.set_state(state, lanes)
    assert all(torch.equal(value, before[key]) for key, value in env.get_state(1).items())


def test_an_edited_module_is_read_anew() -> None:
    model = tiny_model("bert", num_labels=3)
    first = make_lanes(1, model=model, task=TokenTask(), **TINY).reset(seed=0)[1]["L1"][0]
    with torch.no_grad():
        model.get_parameter("bert.encoder.layer.0.attention.self.query.weight").mul_(30)
    again = make_lanes(1, model=model, task=TokenTask(), **TINY).reset(seed=0)[1]["L1"][0]
    assert abs(first - again) > 1e-6


def test_unknown_reset_options_and_modes_are_named() -> None:
    env = make_lanes(2)
    with pytest.raises(LeLoRAError, match="Did you mean 'reset_mask'"):
        env.reset(options={"reset_maks": np.array([True, False])})
    with pytest.raises(LeLoRAError, match="unknown autoreset_mode 'foo'"):
        LeLoRAVectorEnv(2, autoreset_mode="foo")
    with pytest.raises(LeLoRAError, match="max_episode_steps"):
        LeLoRAVectorEnv(2, max_episode_steps=0)


def test_a_lane_that_is_only_reset_ignores_even_a_bad_action() -> None:
    env = make_lanes(2, horizon=1, autoreset_mode="NextStep")
    env.reset(seed=0)
    env.step(action_for(env, 0, 0))
    env.step(np.full((2, 48), 99))


def test_rows_are_cut_to_what_the_model_has_positions_for(tmp_path: Path) -> None:
    from tests.small_tokenizers import gpt_like

    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"{'a b ' * 60}{i},{i % 2}\n" for i in range(120)))
    for family in ("bert", "roberta", "gpt2"):
        model = tiny_model(family, num_labels=2, max_position_embeddings=32, vocab_size=400)
        env = make_lanes(1, model=model, task=f"text:{tmp_path / 'rows.csv'}", target_modules="all-linear",
                         tokenizer=gpt_like() if family == "gpt2" else bert_like(), **TINY)
        env.reset(seed=0)
        width = env.tuner.splits.train["input_ids"].shape[1]
        assert width == (30 if family == "roberta" else 32)
        env.step(action_for(env, 1, 0))


def test_a_tokenizer_of_another_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"zz {i},{i % 2}\n" for i in range(120)))
    with pytest.raises(LeLoRAError, match="do not belong together"):
        make_lanes(1, model=tiny_model("bert", num_labels=2), task=f"text:{tmp_path / 'rows.csv'}",
                   tokenizer=bert_like(), **TINY).reset(seed=0)


def test_encoders_are_refused_for_causal_tasks(tmp_path: Path) -> None:
    import transformers

    config = transformers.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                                     intermediate_size=64)
    model = transformers.BertLMHeadModel(config)
    with pytest.raises(LeLoRAError, match="needs a decoder"):
        make_lanes(1, model=model, task=TokenTask("causal-lm"), **TINY).reset(seed=0)


def test_a_damaged_weights_file_is_named(tmp_path: Path) -> None:
    tiny_model("bert", num_labels=3).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(LeLoRAError, match="cannot load"):
        make_lanes(1, model=str(tmp_path), task=TokenTask(), tokenizer=bert_like(), **TINY).reset(seed=0)


def test_models_that_do_not_fit_are_named() -> None:
    with pytest.raises(LeLoRAError, match="brings its own model"):
        make_lanes(1, model=tiny_model("bert", num_labels=3), task="planted")
    with pytest.raises(LeLoRAError, match=r"single linear layer|no target module"):
        make_lanes(1, model=nn.Linear(8, 8), task=VectorTask(), target_modules="all-linear", **TINY).reset(seed=0)


def test_saved_files_have_the_users_own_mode(tmp_path: Path) -> None:
    env = make_lanes(1)
    env.reset(seed=0)
    save_adapter(env, tmp_path / "adapter")
    (tmp_path / "other").write_text("")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "adapter").iterdir()}
    assert modes == {(tmp_path / "other").stat().st_mode & 0o777}
