"""Stable-Baselines3's on-policy algorithms under this package's `Agent` protocol.

Import this module only where Stable-Baselines3 is wanted; importing it takes seconds.
Shapes: L lanes · M matrices · F features · T env steps in a rollout.
"""

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.utils import obs_as_tensor

from agents.agent import Array, Transition
from agents.files import load_policy
from agents.policy import PerMatrixPolicy
from agents.sb3 import ALGORITHMS, PER_MATRIX, beyond_known, sb3_defaults, training_scalars, with_policy
from agents.sb3_policy import Actor
from agents.spec import AgentSpec
from lelora_env.errors import LeLoRAError

_BUFFER = ("observations", "actions", "rewards", "episode_starts", "values", "log_probs")


class SB3Agent:
    """An on-policy SB3 model as an `Agent`: `act` and `update` together do what its ``learn`` does.

    Works on the single environment and on the vector environment in every autoreset mode. SB3
    draws from the global random generators; this class lends it a private copy of them for each
    call, so that nothing outside is moved and a seed fixes the whole curve.
    Schedules over training progress stay at their start, because the end is not known here.
    """

    def __init__(self, spec: AgentSpec, *, algorithm: str = "ppo", policy: Any = PER_MATRIX, seed: int = 0,
                 model: OnPolicyAlgorithm | None = None, train: bool = True, known_baseline: bool = True,
                 policy_file: str | Path | None = None, **options: Any) -> None:
        """Build a model, or take a given one.

        Args:
            spec: What is observed and chosen.
            algorithm: ``"ppo"`` or ``"a2c"``.
            policy: ``"per_matrix"``, or a policy class or name of SB3.
            seed: Seed of weights, sampling and minibatches.
            model: A model to present instead (``PPO.load(...)``, or one from `make_sb3`).
            train: Whether `update` learns. ``False``: `act` gives the model's likeliest action.
            known_baseline: With γ = 0, learn from rewards without what was known before the action
                (`agents.sb3.beyond_known`).
            policy_file: A policy for the actor to start from (`agents.files.save_policy`).
            **options: Arguments of the SB3 class, over `sb3_defaults`.

        Raises:
            UnknownNameError: No such algorithm.
            LeLoRAError: The given model is for other spaces, or for another number of lanes; or SB3
                refuses an option.
        """
        self.spec, self.train, self.known_baseline = spec, train, known_baseline
        self._generators = _global_generators()
        with self._own_generators():
            if model is None:
                settings = {"seed": seed, **sb3_defaults(algorithm, spec.num_lanes, spec.horizon), **options}
                model = _started_from(policy_file, spec, algorithm, policy, settings)
            elif policy_file is not None or options:
                raise LeLoRAError("a model brings its own settings: leave policy_file and other options out beside it")
            else:
                _check_model(model, spec, train)
                torch.manual_seed(seed)
                np.random.seed(seed)  # noqa: NPY002 - SB3 draws from this one
        self.model = model
        self.model.set_logger(Logger(folder=None, output_formats=[]))
        self._episode_starts: Array = np.ones(spec.num_lanes, dtype=bool)
        self._acted: tuple[torch.Tensor, torch.Tensor] | None = None  # values and log-probabilities of the last action

    @property
    def network(self) -> PerMatrixPolicy | None:
        """The per-matrix network that is trained; ``None`` where the model has another policy."""
        actor = getattr(self.model.policy, "action_net", None)
        return actor.network if isinstance(actor, Actor) else None

    def probabilities(self, observation: Array) -> Array:
        """How likely every choice is: (L, M, F) -> (L, M, R, S) float32, summing to 1 over the last two.

        Rank 0 has no location; its probability is spread as the location head says.
        """
        tensor: Any = obs_as_tensor(observation, self.model.device)
        with torch.no_grad():
            found: Any = self.model.policy.get_distribution(tensor).distribution
        if self.network is not None:
            rank, location = (one.probs for one in found)
        else:  # SB3's own: a list of 2M categoricals, ranks and locations in turn
            rank, location = (torch.stack([one.probs for one in found[first::2]], dim=1) for first in (0, 1))
        joint: Array = (rank.unsqueeze(-1) * location.unsqueeze(-2)).cpu().numpy()
        return joint

    @contextmanager
    def _own_generators(self) -> Iterator[None]:
        outside, python = _global_generators(), random.getstate()
        _set_global_generators(self._generators)
        try:
            yield
        finally:
            self._generators = _global_generators()
            _set_global_generators(outside)
            random.setstate(python)

    def act(self, observation: Array) -> Array:
        """Sample (or, without training, take the likeliest) actions: (L, M, F) -> (L, 2M) int64.

        Raises:
            LeLoRAError: The policy's logits are not finite.
        """
        if self.network is not None:
            self.network.check(observation)
        self.model.policy.set_training_mode(False)
        with self._own_generators(), torch.no_grad():
            tensor: Any = obs_as_tensor(observation, self.model.device)
            try:
                actions, values, log_probs = self.model.policy(tensor, deterministic=not self.train)
            except ValueError as error:
                raise LeLoRAError("the SB3 policy gives no valid distribution: it has diverged, or the observation "
                                  f"holds NaN. Lower its learning_rate. ({str(error).splitlines()[0]})") from None
        self._acted = values, log_probs
        result: Array = actions.cpu().numpy().astype(np.int64)
        return result

    def update(self, transition: Transition) -> dict[str, float]:
        """Add an env step to the rollout; once T of them are there, train as SB3 does.

        Returns:
            SB3's ``train/...`` scalars after a training, else nothing.

        Raises:
            LeLoRAError: A reward is not finite, or `act` was not called before.
        """
        if not self.train:
            return {}
        if self._acted is None or not np.isfinite(transition.reward).all():
            what = "update was called without act before it" if self._acted is None else "a reward is not finite"
            raise LeLoRAError(f"{what}; nothing was learnt from this env step. Run the agent with agents.run")
        buffer = self.model.rollout_buffer
        values, log_probs = self._acted
        buffer.add(transition.observation, transition.action, self._bootstrapped(transition), self._episode_starts,
                   values, log_probs)
        self.model.num_timesteps += len(transition.reward)
        self._episode_starts, self._acted = transition.done, None
        if not buffer.full:
            return {}
        last_values = self._values(transition.next_observation)
        buffer.compute_returns_and_advantage(last_values=last_values, dones=transition.done)
        with self._own_generators():
            self.model.train()
        buffer.reset()
        return training_scalars(self.model)

    def _values(self, observation: Array) -> torch.Tensor:
        tensor: Any = obs_as_tensor(observation, self.model.device)
        with torch.no_grad():
            values: torch.Tensor = self.model.policy.predict_values(tensor)
        return values

    def _bootstrapped(self, transition: Transition) -> Array:
        """Rewards (L,) float32 to learn from; with γ·V of the last observation where a lane was cut from outside."""
        reward: Array = transition.reward.astype(np.float32)
        if self.known_baseline and self.model.gamma == 0:
            reward = beyond_known(reward, transition.info)
        for lane in np.flatnonzero(transition.truncated & ~transition.terminated):
            last = self._values(transition.next_observation[lane:lane + 1])[0]
            reward[lane] += float(self.model.gamma * last)  # the product in float32, as SB3 takes it
        return reward

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimiser, unfinished rollout and random state; a snapshot."""
        buffer, torch_state, numpy_state = self.model.rollout_buffer, *self._generators
        arrays = {n: torch.from_numpy(getattr(buffer, n)[:buffer.pos].copy()) for n in _BUFFER}
        key = {**numpy_state["state"], "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))}
        return {"agent": type(self.model).__name__.lower(), "spec": self.spec.fingerprint(),
                "parameters": copy.deepcopy(self.model.get_parameters()), "rollout": arrays,
                "episode_starts": self._episode_starts.tolist(), "num_timesteps": self.model.num_timesteps,
                "n_updates": self.model._n_updates,
                "generators": {"torch": torch_state, "numpy": {**numpy_state, "state": key}}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            LeLoRAError: The state is of another agent, or of other features, actions or lanes.
        """
        kind = type(self.model).__name__.lower()
        if state.get("agent") != kind or len(state["episode_starts"]) != self.spec.num_lanes:
            raise LeLoRAError(f"expected the state of a {kind} agent on {self.spec.num_lanes} lanes (got one of "
                              f"{state.get('agent')!r} on {len(state.get('episode_starts', []))})")
        self.spec.check_fingerprint(state["spec"])
        steps = len(state["rollout"]["rewards"])
        if steps > self.model.rollout_buffer.buffer_size:
            raise LeLoRAError(f"the saved rollout has {steps} env steps, this agent's n_steps is "
                              f"{self.model.rollout_buffer.buffer_size}: build it with the n_steps of then")
        try:
            self.model.set_parameters(copy.deepcopy(state["parameters"]))
        except (RuntimeError, ValueError) as error:
            text = " ".join(str(error).split())
            raise LeLoRAError(f"the saved policy does not fit this environment: {text}") from None
        buffer = self.model.rollout_buffer
        buffer.reset()
        for name, values in state["rollout"].items():
            getattr(buffer, name)[:len(values)] = values.numpy()
            buffer.pos = len(values)
        self.model.num_timesteps, self.model._n_updates = state["num_timesteps"], state["n_updates"]
        numpy_state = state["generators"]["numpy"]
        key = {**numpy_state["state"], "key": numpy_state["state"]["key"].numpy().astype(np.uint32)}
        self._generators = state["generators"]["torch"].clone(), {**numpy_state, "state": key}
        self._episode_starts, self._acted = np.array(state["episode_starts"]), None


def _started_from(
    policy_file: str | Path | None, spec: AgentSpec, algorithm: str, policy: Any, settings: dict[str, Any]
) -> OnPolicyAlgorithm:
    """A new model; its actor begins as the policy in a file, where one is given."""
    if policy_file is None:
        return _unbound_model(spec, algorithm, policy, settings)
    if policy != PER_MATRIX:
        raise LeLoRAError(f"a policy file holds the per-matrix network: leave policy={policy!r} out")
    start = load_policy(policy_file, spec)
    kwargs = {**(settings.get("policy_kwargs") or {}), "network_options": start.settings}
    model = _unbound_model(spec, algorithm, policy, {**settings, "policy_kwargs": kwargs})
    actor: Any = model.policy.action_net
    actor.network.load_state_dict(start.state_dict())
    return model


def _unbound_model(spec: AgentSpec, algorithm: str, policy: Any, settings: dict[str, Any]) -> OnPolicyAlgorithm:
    """A model for the spec's spaces that holds no environment."""
    kind, arguments = with_policy(policy, spec, settings)
    try:
        model = ALGORITHMS[algorithm](kind, None, _init_setup_model=False, **arguments)  # type: ignore[arg-type]
        model.observation_space, model.action_space = spec.observation_space, copy.deepcopy(spec.action_space)
        model.n_envs = spec.num_lanes
        model._setup_model()
    except LeLoRAError:
        raise
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        given = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        raise LeLoRAError(f"{algorithm} cannot be made with policy {policy!r} and {given}: "
                          f"{' '.join(str(error).split())}") from error
    return model


def _check_model(model: OnPolicyAlgorithm, spec: AgentSpec, train: bool) -> None:
    fits = model.observation_space == spec.observation_space and model.action_space == spec.action_space
    if not fits or (train and model.n_envs != spec.num_lanes):
        theirs = f"observations {model.observation_space.shape}, {model.action_space} and {model.n_envs} lanes"
        here = f"observations {spec.observation_space.shape}, {spec.action_space} and {spec.num_lanes} lanes"
        raise LeLoRAError(f"the model was made for {theirs} (or other bounds); the environment has {here}")


def _global_generators() -> tuple[torch.Tensor, dict[str, Any]]:
    state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - SB3 draws from this one
    return torch.get_rng_state(), state


def _set_global_generators(state: tuple[torch.Tensor, dict[str, Any]]) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])  # noqa: NPY002 - SB3 draws from this one
