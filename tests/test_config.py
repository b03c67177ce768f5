"""Settings: what is accepted takes one form, what is not accepted is named together with its rule."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from lelora_env import AdapterConfig, EnvConfig, LeLoRAError
from lelora_env.config import ADAPTER_FIELDS, as_options, split_options


def build(option: dict[str, Any]) -> Any:
    return (AdapterConfig if next(iter(option)) in ADAPTER_FIELDS else EnvConfig)(**option)


@pytest.mark.parametrize(("option", "message"), [
    ({"learning_rate": "a"}, "learning_rate must be a positive number .got 'a'"),
    ({"learning_rate": None}, "learning_rate must be a positive number .got None"),
    ({"learning_rate": True}, "learning_rate must be"),
    ({"learning_rate": 10**400}, "learning_rate must be"),
    ({"learning_rate": torch.tensor(0.1)}, "learning_rate must be"),
    ({"head_learning_rate": "1e-3"}, "head_learning_rate must be a positive number or None"),
    ({"max_grad_norm": "1"}, "max_grad_norm must be a positive number or None"),
    ({"max_grad_norm": float("nan")}, "max_grad_norm must be"),
    ({"warmup": "0.1"}, r"warmup must be in \[0, 1\)"),
    ({"dropout": None}, r"dropout must be in \[0, 1\)"),
    ({"alpha": [0.8]}, "alpha must be a number of at least 0"),
    ({"betas": 0.9}, r"betas must be two numbers in \[0, 1\) .got 0.9"),
    ({"betas": (0.9, "b")}, "betas must be two numbers"),
    ({"betas": (0.9,)}, "betas must be two numbers"),
    ({"betas": {0.9: 1, 0.99: 2}}, "betas must be two numbers"),
    ({"split_seed": -1}, "split_seed must be an integer of at least 0 .got -1"),
    ({"split_seed": 1.5}, "split_seed must be an integer of at least 0 .got 1.5"),
    ({"horizon": True}, "horizon must be an integer of at least 1 .got True"),
    ({"horizon": 5.0}, "horizon must be an integer"),
    ({"horizon": "5"}, "horizon must be an integer"),
    ({"tune_size": False}, "tune_size must be an integer"),
    ({"spectrum": True}, "spectrum must be 'full' or"),
    ({"spectrum": "half"}, "spectrum must be 'full' or"),
    ({"spectrum": np.array([4, 5])}, "spectrum must be 'full' or"),
    ({"raw_observation": "no"}, "raw_observation must be True or False .got 'no'"),
    ({"cuda_graphs": 1}, "cuda_graphs must be True or False"),
    ({"extra_features": ("grad_norm", "grad_norm")}, "extra_features must be without repeats"),
    ({"extra_features": "grad_norm, gradnorm"}, "unknown extra feature 'gradnorm'.*Did you mean 'grad_norm'"),
    ({"extra_features": 3}, "extra_features must be a list of names"),
    ({"extra_features": [["grad_norm"]]}, "unknown extra feature"),
    ({"dtype": torch.bfloat16}, "unknown dtype.*Did you mean 'bfloat16'"),
    ({"device": "gpu"}, "device must be a torch device or its name.*'gpu'"),
    ({"device": 0}, "device must be a torch device or its name.*got 0"),
    ({"rank_set": 4}, "rank_set must be a non-empty list of integers"),
    ({"rank_set": "0,2"}, "rank_set must be a non-empty list of integers"),
    ({"rank_set": np.array([0.0, 2.0])}, "rank_set must be a non-empty list of integers"),
    ({"rank_set": np.array([[0, 2]])}, "rank_set must be a non-empty list of integers"),
    ({"rank_set": [0, [2]]}, "rank_set must be a non-empty list of integers"),
    ({"rank_set": (False, True)}, "rank_set must be a non-empty list of integers"),
    ({"locations": 0.5}, "locations must be a list"),
    ({"locations": (True,)}, "locations must be a name or a fraction"),
    ({"locations": (float("nan"),)}, "locations must be a name or a fraction"),
    ({"locations": ([0.5],)}, "locations must be a name or a fraction"),
    ({"locations": "primary,primry"}, "unknown location 'primry'"),
    ({"locations": ""}, "locations must be non-empty"),
    ({"locations": (0.1234567, 0.1234568)}, r"locations must be without repeats.*'at_0.123457', 'at_0.123457'"),
    ({"parametrisation": ["usv"]}, "unknown parametrisation"),
    ({"parametrisation": np.array(["usv", "unit"])}, "unknown parametrisation"),
    ({"unit_scale": "1"}, "unit_scale must be a positive number"),
    ({"target_modules": 3}, "target_modules must be a string, or a list of strings"),
    ({"target_modules": ["query", 3]}, "target_modules must be a string, or a list of strings"),
])
def test_bad_values_name_field_value_and_rule(option: dict[str, Any], message: str) -> None:
    with pytest.raises(LeLoRAError, match=message) as caught:
        build(option)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None, "an inner error shows"


@pytest.mark.parametrize(("option", "expected"), [
    ({"rank_set": np.array([0, 2, 4])}, (0, 2, 4)),
    ({"rank_set": [np.int64(0), np.int32(2)]}, (0, 2)),
    ({"rank_set": range(0, 6, 2)}, (0, 2, 4)),
    ({"locations": "primary"}, ("primary",)),
    ({"locations": "primary, minor"}, ("primary", "minor")),
    ({"locations": ["medium", np.float64(0.25), 1]}, ("medium", 0.25, 1.0)),
    ({"locations": np.array([0.0, 0.5])}, (0.0, 0.5)),
    ({"unit_scale": np.float32(2)}, 2.0),
    ({"target_modules": ["query"]}, ("query",)),
    ({"extra_features": "grad_norm"}, ("grad_norm",)),
    ({"extra_features": "grad_norm,update_norm"}, ("grad_norm", "update_norm")),
    ({"extra_features": ["relative_depth"]}, ("relative_depth",)),
    ({"horizon": np.int64(5)}, 5),
    ({"spectrum": np.int64(5)}, 5),
    ({"split_seed": np.uint8(3)}, 3),
    ({"learning_rate": np.float32(0.5)}, 0.5),
    ({"alpha": 1}, 1.0),
    ({"betas": np.array([0.5, 0.75])}, (0.5, 0.75)),
    ({"betas": [0, 0.75]}, (0.0, 0.75)),
    ({"raw_observation": np.bool_(True)}, True),
    ({"device": torch.device("cuda", 1)}, "cuda:1"),
    ({"max_grad_norm": None}, None),
])
def test_accepted_values_take_one_plain_form(option: dict[str, Any], expected: Any) -> None:
    value = getattr(build(option), next(iter(option)))
    assert value == expected
    assert type(value) is type(expected)
    if isinstance(expected, tuple):
        assert [type(x) for x in value] == [type(x) for x in expected]


def test_options_survive_a_round_trip_also_through_json() -> None:
    given: dict[str, Any] = {
        "rank_set": np.array([0, 3]), "locations": ["primary", np.float32(0.25)], "betas": [0, np.float64(0.9)],
        "horizon": np.int64(7), "alpha": 1, "extra_features": "grad_norm", "device": torch.device("cpu"),
        "spectrum": "full", "target_modules": ["query", "value"], "raw_observation": np.bool_(False),
    }
    configs = split_options(given)
    assert split_options(as_options(*configs)) == configs
    assert split_options(json.loads(json.dumps(as_options(*configs)))) == configs
    assert len({configs, split_options(given)}) == 1  # hashable, and equal by value
