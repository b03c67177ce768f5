"""LLM fine-tuning with learned low-rank allocations, as a reinforcement-learning environment.

``gymnasium.make("LeLoRA-v0", model=..., task=...)`` is the front door; see `LeLoRAEnv`.
Importing this package registers the environment and loads nothing heavy: the names below arrive
when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import gymnasium as gym

if TYPE_CHECKING:
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

_HOMES = {
    "MATRIX_TYPES": "matrices",
    "AdapterConfig": "config",
    "EnvConfig": "config",
    "LeLoRAEnv": "env",
    "LeLoRAError": "errors",
    "LeLoRAVectorEnv": "vector_env",
    "Splits": "tasks.base",
    "Task": "tasks.base",
}


def __getattr__(name: str) -> Any:
    """Fetch a public name from its module on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, those not fetched yet included."""
    return sorted(set(globals()) | set(__all__))


gym.register(
    id="LeLoRA-v0",
    entry_point="lelora_env.env:LeLoRAEnv",
    vector_entry_point="lelora_env.vector_env:LeLoRAVectorEnv",
)
gym.register(
    id="LeLoRA-drift-v0",
    entry_point="lelora_env.drift:DriftEnv",
    vector_entry_point="lelora_env.drift:DriftVectorEnv",
)
gym.register(
    id="LeLoRA-surrogate-v0",
    entry_point="lelora_env.surrogate:SurrogateEnv",
    vector_entry_point="lelora_env.surrogate:SurrogateVectorEnv",
)
