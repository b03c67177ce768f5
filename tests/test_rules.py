"""Rules: spectra made by hand, running means written out as loops, and credit that was planted."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from agents import (
    REQUIRED,
    AgentSpec,
    Credit,
    Sensitivity,
    SpectralEnergy,
    Transition,
    make_agent,
    required_options,
    run,
)
from agents.rules import window_sums
from lelora_env.errors import LeLoRAError, UnknownNameError
from tests.helpers import dense_weights, make_lanes, two_layer
from tests.test_env import VectorTask
from tests.toy_env import Array, ToyEnv, ToyVectorEnv

SLOTS = 24  # of a 32 x 32 matrix: 8 components each from 0, 16 and 24


def _spec(matrices: int = 3, lanes: int = 2, small: int = 0) -> AgentSpec:
    return AgentSpec.from_env(ToyVectorEnv(lanes, num_matrices=matrices, small_matrices=small))


def _transition(info: Mapping[str, Array], lanes: int, matrices: int, done: Array | None = None) -> Transition:
    observation = np.zeros((lanes, matrices, 8), dtype=np.float32)
    ended = np.zeros(lanes, dtype=bool) if done is None else done
    action = np.zeros((lanes, 2 * matrices), dtype=np.int64)
    return Transition(observation, action, np.zeros(lanes), ended, np.zeros(lanes, dtype=bool), info, observation)


def _seen(lanes: int, matrices: int) -> Array:
    return np.zeros((lanes, matrices, 8), dtype=np.float32)


# --- energy ---------------------------------------------------------------------------------------------------------


def _spectra(*spectra: list[float]) -> Array:
    """Observations of one lane as the environment scales them: ln(σ / rms) / 4."""
    sigma = np.array(spectra)
    observation = np.zeros((1, len(sigma), 8), dtype=np.float32)
    observation[0, :, 3:7] = np.log(sigma / np.sqrt(np.square(sigma).mean(1, keepdims=True))) / 4
    return observation


def test_demand_of_spectra_made_by_hand() -> None:
    """Shares of energy: 100/103 at once; 0.25, 0.5, 0.75, 1; 0.356, 0.711, 0.911."""
    agent = SpectralEnergy(_spec(3, 1), energy=0.9)
    demand = agent.demand(_spectra([10, 1, 1, 1], [1, 1, 1, 1], [2, 2, 1.5, 1]))
    np.testing.assert_allclose(demand, [[1, 32, 1 + 2 / 3 * 31]], rtol=1e-6)


def test_more_demand_never_gets_less_and_the_budget_holds() -> None:
    spec = _spec(4, 1)
    observation = _spectra([10, 1, 1, 1], [1, 1, 1, 1], [2, 2, 1.5, 1], [10, 1, 1, 1])
    for budget, expected in ((1.0, [3, 3, 3, 3]), (0.5, [0, 3, 3, 0]), (0.25, [0, 2, 2, 0])):
        agent = SpectralEnergy(spec, budget=budget, location="minor")
        pairs = agent.act(observation)[0].reshape(-1, 2)
        assert pairs[:, 0].tolist() == expected
        assert (pairs[:, 1] == 2).all()
        assert agent.probabilities(observation)[0].sum((1, 2)).tolist() == [1] * 4


def test_many_matrices_use_their_budget() -> None:
    spec = _spec(160, 1)
    observation = np.tile(_spectra([3, 2, 1, 1], [4, 1, 1, 1]), (1, 80, 1))
    action = SpectralEnergy(spec, budget=0.5).act(observation)[0].reshape(-1, 2)
    trained = np.array(spec.rank_set)[action[:, 0]].sum()
    assert 0.48 * 160 * 8 < trained <= 0.5 * 160 * 8


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("spectrum", ["full", 16])
def test_demand_is_that_of_the_weights_also_where_sizes_differ(raw: bool, spectrum: Any) -> None:
    env = make_lanes(1, model=two_layer(), task=VectorTask(), target_modules="all-linear", rank_set=(0, 2, 4),
                     reward_size=4, tune_size=0, raw_observation=raw, spectrum=spectrum)
    observation, _ = env.reset(seed=0)
    demand = SpectralEnergy(AgentSpec.from_env(env), energy=0.8).demand(observation)[0]
    for matrix, weight in enumerate(dense_weights(env, 0)):
        square = np.linalg.svd(weight, compute_uv=False) ** 2
        exact = 1 + int((square.cumsum() / square.sum() < 0.8).sum())
        assert demand[matrix] == pytest.approx(exact, abs=1e-6 if spectrum == "full" else 1)


@pytest.mark.parametrize(("options", "message"), [
    ({"energy": 1.0}, "energy must be in"), ({"energy": 0.0}, "energy must be in"), ({"budget": 0.0}, "budget must be"),
    ({"location": "major"}, "unknown location")])
def test_energy_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LeLoRAError, match=message):
        make_agent("energy", ToyEnv(), **options)


# --- sensitivity and AdaLoRA ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["sensitivity", "adalora"])
def test_scores_are_those_of_the_papers_formulas(measure: str) -> None:
    """Ī ← β·Ī + (1-β)·I and Ū ← β·Ū + (1-β)·|I - Ī| from 0, anew with every run; the score is Ī, or Ī·Ū."""
    rng, beta, spec = np.random.default_rng(0), 0.7, _spec()
    agent = Sensitivity(spec, measure=measure, decay=beta, budget=1.0)
    agent.act(_seen(2, 3))
    mean, apart = np.zeros((2, 3, SLOTS)), np.zeros((2, 3, SLOTS))
    assert spec.component_mask is not None
    for step in range(9):
        found = rng.exponential(size=(2, 3, SLOTS))
        done = np.array([step == 3, step == 5])
        for lane, matrix, slot in np.ndindex(2, 3, SLOTS):
            value = found[lane, matrix, slot]
            mean[lane, matrix, slot] = beta * mean[lane, matrix, slot] + (1 - beta) * value
            difference = abs(value - mean[lane, matrix, slot])
            apart[lane, matrix, slot] = beta * apart[lane, matrix, slot] + (1 - beta) * difference
        agent.update(_transition({"component_sensitivity": found}, 2, 3, done))
        score = mean if measure == "sensitivity" else mean * apart
        pairs = agent.act(_seen(2, 3)).reshape(2, 3, 2)
        for lane, matrix in np.ndindex(2, 3):
            sums = [sum(score[lane, matrix][spec.component_mask[matrix, 3, place]]) for place in range(3)]
            expected = [3, 0] if done[lane] else [3, int(np.argmax(sums))]  # a new run begins at the first location
            assert pairs[lane, matrix].tolist() == expected
        mean[done], apart[done] = 0, 0


def test_the_budget_goes_to_the_sensitive_matrices() -> None:
    spec = _spec(4, 1)
    agent = Sensitivity(spec, budget=0.5)
    start = agent.act(_seen(1, 4)).reshape(4, 2)
    assert start.tolist() == [[2, 0]] * 4  # rank 4 of 8 each, at the first location
    found = np.full((1, 4, SLOTS), 0.01)
    found[0, [1, 2], 8:16] = 1.0  # the medium window
    agent.update(_transition({"component_sensitivity": found}, 1, 4))
    assert agent.act(_seen(1, 4)).reshape(4, 2).tolist() == [[0, 0], [3, 1], [3, 1], [0, 0]]


def test_window_sums_are_sums_over_the_table() -> None:
    spec, rng = _spec(3, 1, small=1), np.random.default_rng(0)
    assert spec.component_mask is not None
    scores = rng.normal(size=(2, *spec.component_mask[:, 0, 0].shape))
    sums = window_sums(scores, spec)
    for lane, matrix, rank, place in np.ndindex(2, 3, 4, 3):
        expected = scores[lane, matrix][spec.component_mask[matrix, rank, place]].sum()
        assert sums[lane, matrix, rank, place] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("name", "options", "message"), [
    ("sensitivity", {"decay": 1.0}, "decay must be in"), ("adalora", {"decay": 0.0}, "above 0 for adalora"),
    ("sensitivity", {"measure": "sens"}, "Did you mean 'sensitivity'"), ("sensitivity", {"budget": 2.0}, "budget must"),
    ("credit", {"caution": -1.0}, "caution and price"), ("credit", {"price": float("nan")}, "caution and price"),
    ("credit", {"decay": 1.0}, "decay in"), ("credit", {"budget": 0.0}, "budget must be")])
def test_options_out_of_range_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(LeLoRAError, match=message):
        make_agent(name, ToyEnv(), **options)
    with pytest.raises(UnknownNameError, match="unknown option"):
        make_agent("adalora", ToyEnv(), measure="sensitivity")


# --- credit ---------------------------------------------------------------------------------------------------------


def _credit(rng: np.random.Generator, lanes: int, useful: Mapping[int, slice], noise: float = 1.0) -> Array:
    """Noise of mean 0 everywhere; 3 on top for the useful slots of a matrix, so that their sums stand out."""
    found = rng.normal(size=(lanes, 3, SLOTS)) * noise
    for matrix, slots in useful.items():
        found[:, matrix, slots] += 3
    return found


def test_windows_of_positive_credit_are_taken_and_useless_ones_left() -> None:
    """Matrix 0 has use for the whole medium window, matrix 1 for the two smallest components, matrix 2 for none."""
    spec, rng = _spec(), np.random.default_rng(0)
    agent = Credit(spec, caution=3.0)
    assert agent.act(_seen(2, 3)).tolist() == [[3, 0] * 3] * 2  # nothing known: all of the first window
    for _ in range(30):
        agent.update(_transition({"component_credit": _credit(rng, 2, {0: slice(8, 16), 1: slice(22, 24)})}, 2, 3))
    first = agent.act(_seen(4, 3))
    assert first.tolist() == [[3, 1, 1, 2, 0, 0]] * 4
    assert agent.probabilities(_seen(4, 3)).shape == (4, 3, 4, 3)


def test_the_bound_is_mean_less_standard_errors_and_price() -> None:
    """With no decay to speak of: the textbook mean and standard error over steps, of the mean over lanes."""
    rng, spec = np.random.default_rng(1), _spec()
    agent = Credit(spec, caution=2.0, price=0.05, decay=1 - 1e-12)
    samples = []
    for _ in range(7):
        samples.append(_credit(rng, 2, {0: slice(0, 8)}))
        agent.update(_transition({"component_credit": samples[-1]}, 2, 3))
    every = np.stack(samples).mean(1)  # (7, M, K)
    bound = every.mean(0) - 2 * every.std(0, ddof=1) / np.sqrt(7) - 0.05
    assert spec.component_mask is not None
    for matrix, rank, place in np.ndindex(3, 4, 3):
        expected = bound[matrix][spec.component_mask[matrix, rank, place]].sum()
        assert agent.values()[matrix, rank, place] == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_a_price_above_what_a_component_earns_keeps_it_out() -> None:
    rng = np.random.default_rng(2)
    for price, rank in ((2.0, 3), (4.0, 0)):
        agent = Credit(_spec(), price=price)
        for _ in range(20):
            agent.update(_transition({"component_credit": _credit(rng, 2, {0: slice(0, 8)}, 0.1)}, 2, 3))
        assert agent.act(_seen(1, 3))[0, 0] == rank


def test_lanes_that_say_nothing_do_not_count() -> None:
    """Diverged lanes report zeros; a lane of NaN is no better."""
    rng, agent, other = np.random.default_rng(3), Credit(_spec()), Credit(_spec())
    for _ in range(3):
        found = _credit(rng, 2, {0: slice(0, 8)})
        other.update(_transition({"component_credit": found[:1]}, 1, 3))
        found[1] = 0
        agent.update(_transition({"component_credit": found}, 2, 3))
        agent.update(_transition({"component_credit": np.full((2, 3, SLOTS), np.nan)}, 2, 3))
    np.testing.assert_array_equal(agent.values(), other.values())


def test_one_lane_one_matrix_and_equal_credit() -> None:
    spec = _spec(1, 1)
    agent = Credit(spec)
    agent.update(_transition({"component_credit": np.full((1, 1, SLOTS), 0.5)}, 1, 1))
    assert agent.act(_seen(1, 1)).tolist() == [[3, 0]]
    agent.update(_transition({"component_credit": np.full((1, 1, SLOTS), -0.7)}, 1, 1))
    assert agent.act(_seen(1, 1)).tolist() == [[0, 0]]


# --- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_an_environment_that_does_not_report_is_a_clear_error(name: str) -> None:
    env = ToyVectorEnv(2)
    wanted = required_options(name)["component_info"][0]
    with pytest.raises(LeLoRAError, match=f"make a LeLoRA-v0 environment with component_info='{wanted}'"):
        run(env, make_agent(name, env), env_steps=1, seed=0)


def test_required_options_are_put_together() -> None:
    assert required_options("random", "reinforce") == {}
    assert required_options("adalora", "credit", "sensitivity") == {"component_info": ("sensitivity", "credit")}


def _rewards(name: str) -> Array:
    env = make_lanes(2, horizon=5, **required_options(name))
    return np.stack(run(env, make_agent(name, env), env_steps=8, seed=0).rewards)


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_the_same_seed_gives_the_same_curve(name: str) -> None:
    np.testing.assert_array_equal(_rewards(name), _rewards(name))


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_a_state_continues_bit_for_bit_in_mid_run(name: str) -> None:
    """Two agents hear the same from here on, and do the same."""
    rng, key = np.random.default_rng(0), f"component_{required_options(name)['component_info'][0]}"
    env = ToyVectorEnv(2, num_matrices=3)
    agent, other = make_agent(name, env), make_agent(name, env)
    for step in range(8):
        if step == 4:
            other.load_state_dict(agent.state_dict())
        transition = _transition({key: rng.normal(size=(2, 3, SLOTS))}, 2, 3, np.array([step == 2, step == 5]))
        for one in (agent, other) if step >= 4 else (agent,):
            one.act(_seen(2, 3))
            one.update(transition)
    for name_, value in agent.state_dict().items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(other.state_dict()[name_]), err_msg=name_)
    np.testing.assert_array_equal(agent.act(_seen(2, 3)), other.act(_seen(2, 3)))


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_states_of_other_sizes_are_refused(name: str) -> None:
    key = f"component_{required_options(name)['component_info'][0]}"
    agent = make_agent(name, ToyVectorEnv(2, num_matrices=3))
    agent.act(_seen(2, 3))
    agent.update(_transition({key: np.ones((2, 3, SLOTS))}, 2, 3))
    with pytest.raises(LeLoRAError, match=r"expected the state of a.*4, 24\)"):
        make_agent(name, ToyVectorEnv(2, num_matrices=4)).load_state_dict(agent.state_dict())


def test_a_state_is_a_snapshot() -> None:
    agent = make_agent("sensitivity", ToyVectorEnv(1, num_matrices=3))
    agent.act(_seen(1, 3))
    agent.update(_transition({"component_sensitivity": np.ones((1, 3, SLOTS))}, 1, 3))
    state = agent.state_dict()
    agent.update(_transition({"component_sensitivity": np.full((1, 3, SLOTS), 9.0)}, 1, 3))
    assert float(state["mean"].max()) == pytest.approx(0.15)


def test_credit_finds_the_planted_allocation_within_a_run() -> None:
    """The built-in instance: what is planted is taken, and nothing else at a tenth of what that earns."""
    env = make_lanes(4, horizon=20, **required_options("credit"))
    agent = make_agent("credit", env, price=3e-5)
    run(env, agent, episodes=1, seed=0)
    task: Any = env.task
    choices = task.best_allocation()
    pairs = agent.act(env.observation_space.sample())[0].reshape(-1, 2)
    locations = list(env.adapter_config.location_names)
    planted = [m for m, choice in enumerate(choices) if choice.rank]
    right = [pairs[m].tolist() == [3, locations.index(choices[m].location)] for m in planted]
    assert np.mean(right) > 0.9
    assert [pairs[m, 0] for m in range(len(choices)) if m not in planted] == [0] * (len(choices) - len(planted))


def test_asking_for_one_lane_leaves_the_means_of_all() -> None:
    agent: Any = make_agent("sensitivity", ToyVectorEnv(2, num_matrices=3, horizons=50))
    rng = np.random.default_rng(0)
    agent.update(_transition({"component_sensitivity": rng.random((2, 3, SLOTS))}, 2, 3))
    before = agent.act(_seen(2, 3))
    assert agent.probabilities(_seen(1, 3)).shape[0] == 1
    np.testing.assert_array_equal(agent.act(_seen(2, 3)), before)
    with pytest.raises(LeLoRAError, match="made for 2 lanes"):
        agent.act(_seen(3, 3))


def test_lanes_that_say_the_same_are_not_counted_as_evidence() -> None:
    """Eight lanes with the same credit give the bound of one lane, not one that is tighter by the root of 8."""
    rng, bounds = np.random.default_rng(0), []
    draws = rng.normal(1.0, 1.0, size=(10, 3, SLOTS))
    for lanes in (1, 8):
        agent = Credit(_spec())
        for one in draws:
            agent.update(_transition({"component_credit": np.repeat(one[None], lanes, axis=0)}, lanes, 3))
        bounds.append(agent.values())
    np.testing.assert_allclose(bounds[0], bounds[1])
