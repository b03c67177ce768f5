"""A policy learnt on a small planted model, written to a file, finds what is planted in a deeper and wider one."""

from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import lelora_env  # noqa: F401 - registers LeLoRA-v0
from agents import AgentSpec, evaluate, make_agent, run
from agents.files import save_policy

DEEPER = "planted-deep/test-0"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["reinforce", "ppo"])
def test_a_policy_works_on_a_deeper_and_wider_model(name: str, tmp_path: Path) -> None:
    env = gym.make_vec("LeLoRA-v0", num_envs=8, vectorization_mode="vector_entry_point", autoreset_mode="Disabled",
                       instance="planted-free/train-0")
    agent: Any = make_agent(name, env, seed=0)
    untrained = tmp_path / "untrained.safetensors"
    save_policy(agent.network, AgentSpec.from_env(env), untrained)
    run(env, agent, env_steps=800, seed=0)
    save_policy(agent.network, AgentSpec.from_env(env), tmp_path / "trained.safetensors")
    env.close()
    before, after = (evaluate(partial(make_agent, name, seed=0, policy_file=path), [DEEPER], lanes=2).score
                     for path in (untrained, tmp_path / "trained.safetensors"))
    assert before < 0.2
    assert after > 0.6


@pytest.mark.slow
def test_the_default_agent_finds_what_is_planted_and_the_papers_does_not() -> None:
    """Probability of choices that cover the planted window; 3,200 env steps of a training instance."""
    found = {}
    for preset in ("practical", "paper"):
        env: Any = gym.make_vec("LeLoRA-v0", num_envs=8, vectorization_mode="vector_entry_point",
                                autoreset_mode="Disabled", instance="planted-type/train-2")
        agent: Any = make_agent("reinforce", env, seed=0, preset=preset)
        run(env, agent, env_steps=400, seed=0)
        observation, _ = env.reset(seed=9)
        likely = agent.probabilities(observation).mean(0)  # (M, R, S)
        best = env.unwrapped.task.best_allocation()  # rank 8, the largest, wherever something is planted
        names = list(env.unwrapped.adapter_config.location_names)
        found[preset] = np.mean([likely[m, -1, names.index(c.location)] for m, c in enumerate(best) if c.rank])
        env.close()
    assert found["practical"] > 0.7
    assert found["paper"] < 0.6
