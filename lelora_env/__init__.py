"""LLM fine-tuning with learned low-rank allocations, as a reinforcement-learning environment.

``gymnasium.make("LeLoRA-v0", model=..., task=...)`` is the front door; see `LeLoRAEnv`.
"""

import gymnasium as gym

from lelora_env.config import AdapterConfig, EnvConfig
from lelora_env.env import LeLoRAEnv
from lelora_env.errors import LeLoRAError
from lelora_env.matrices import MATRIX_TYPES
from lelora_env.tasks.base import Splits, Task
from lelora_env.vector_env import LeLoRAVectorEnv

__version__ = "0.1.0"

__all__ = [
    "MATRIX_TYPES",
    "AdapterConfig",
    "EnvConfig",
    "LeLoRAEnv",
    "LeLoRAError",
    "LeLoRAVectorEnv",
    "Splits",
    "Task",
    "__version__",
]

gym.register(
    id="LeLoRA-v0",
    entry_point="lelora_env.env:LeLoRAEnv",
    vector_entry_point="lelora_env.vector_env:LeLoRAVectorEnv",
)
