"""How the loss on the reward rows falls during a real run, whatever the agent does; behind `lelora_env.drift`.

Steps MiniLM-L6 on SST-2 under allocations drawn uniformly at random at every env step, and fits the three things that
`LeLoRA-drift-v0` is made of: each lane's curve L1(t) = floor + fall/(1 + exp((t - middle)/width)), how far the lanes'
middles lie apart, and the noise of L2 about its running mean.

    python -m benchmarks.drift_curve --task sst2:DATA/sst2 --lanes 4 --steps 180 --out start.json
    python -m benchmarks.drift_curve --task sst2:DATA/sst2 --lanes 1 --seed 4 --steps 500 --out whole.json
    python -m benchmarks.drift_curve --read start.json whole.json

Lanes share the 32 reward rows and differ in seed: head start, order of the training rows, allocations. The floor is
taken from the last 100 env steps of lanes that went to the end. The last line of the output is one JSON document.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

import lelora_env  # noqa: F401 - registers LeLoRA-v0
from benchmarks.common import report

OPTIONS: dict[str, Any] = {"target_modules": "query,value", "parametrisation": "unit", "learning_rate": 1e-3,
                           "batch_size": 16, "reward_size": 32, "horizon": 500}
WINDOW = 11
"""Env steps over which the running mean of L2 is taken."""

CALM = 60
"""The first env steps, in which hardly anything falls, say nothing about the noise and are left out of its fit."""


def measure(task: str, model: str, lanes: int, steps: int, seed: int, out: Path) -> np.ndarray:
    """L1 before the first env step and after each, (steps + 1, L); written to `out` every ten steps."""
    env: Any = gym.make_vec("LeLoRA-v0", num_envs=lanes, vectorization_mode="vector_entry_point", model=model,
                            task=task, **OPTIONS)
    env.action_space.seed(seed)
    _, infos = env.reset(seed=seed)
    losses = [infos["L1"].tolist()]
    start = time.perf_counter()
    for step in range(steps):
        *_, infos = env.step(env.action_space.sample())
        losses.append(infos["L1"].tolist())
        if (step + 1) % 10 == 0:
            out.write_text(json.dumps(losses), encoding="utf-8")
            each = (time.perf_counter() - start) / (step + 1)
            print(f"step {step + 1}: L1 {np.mean(losses[-1]):.4f}, {each:.2f} s a step", flush=True)
    env.close()
    return np.array(losses)


def fit_curve(losses: np.ndarray, floor: float | None) -> dict[str, float]:
    """Least squares of floor + fall/(1 + exp((t - middle)/width)) on one lane's losses (T,); by search over a grid.

    Args:
        losses: L1 from env step 0 on.
        floor: Its lower end, where it is known.
    """
    t = np.arange(len(losses))
    fits = []
    for middle in range(60, 260):
        for width in np.linspace(5, 50, 91):
            shape = 1 / (1 + np.exp((t - middle) / width))
            design = np.stack([shape, np.ones(len(t))], axis=1) if floor is None else shape[:, None]
            target = losses - (floor or 0.0)
            weights, *_ = np.linalg.lstsq(design, target, rcond=None)
            error = float(((design @ weights - target) ** 2).mean())
            low = float(weights[1]) if floor is None else floor
            fits.append((error, low, float(weights[0]), float(middle), float(width)))
    error, low, fall, middle, width = min(fits)
    return {"floor": low, "fall": fall, "middle": middle, "width": width, "rmse": error**0.5}


def expected_spread(curve: dict[str, float], steps: int) -> np.ndarray:
    """What the spread of L2's noise is taken to be proportional to, at env steps 1 to `steps`.

    The learning rate's share of its peak (warm-up over 6 % of the horizon, then linear to 0), times the square root of
    the share of the fall that is done.
    """
    t, horizon = np.arange(1, steps + 1), OPTIONS["horizon"]
    rate = np.minimum(t / (0.06 * horizon), (horizon - t + 0.5) / (0.94 * horizon))
    spread: np.ndarray = rate * np.sqrt(1 / (1 + np.exp(-(t - curve["middle"]) / curve["width"])))
    return spread


def fit_noise(lanes: list[np.ndarray], curves: list[dict[str, float]]) -> dict[str, Any]:
    """Spread of L2 less its running mean, in units of `expected_spread`: overall and by portions from CALM on; lags."""
    scaled, margin = [], WINDOW // 2
    for lane, curve in zip(lanes, curves, strict=True):
        steps = np.diff(lane)
        mean = np.convolve(steps, np.full(WINDOW, 1 / WINDOW), "valid")
        rest = (steps[margin:-margin] - mean) / (1 - 1 / WINDOW) ** 0.5  # puts back what the mean takes of it
        scaled.append((rest / expected_spread(curve, len(steps))[margin:-margin])[CALM:])
    spread = float((np.concatenate(scaled) ** 2).mean() ** 0.5)
    lags = {f"lag{by}": float(np.concatenate([x[by:] * x[:-by] for x in scaled]).mean() / spread**2)
            for by in (1, 2, 3)}
    portions = range(0, max(map(len, scaled)), 60)
    shares = [float((np.concatenate([x[at : at + 60] for x in scaled]) ** 2).mean() ** 0.5) for at in portions]
    return {"scale": spread, "scale_by_60_steps": shares, **lags}


def main() -> None:
    """Measure or read the losses, fit, report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--lanes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("drift_losses.json"))
    parser.add_argument("--read", type=Path, nargs="+", help="losses that an earlier run has written")
    arguments = parser.parse_args()
    if arguments.read:
        tables = [np.array(json.loads(path.read_text(encoding="utf-8"))) for path in arguments.read]
    else:
        tables = [measure(arguments.task, arguments.model, arguments.lanes, arguments.steps, arguments.seed,
                          arguments.out)]
    lanes = [lane for table in tables for lane in table.T]
    whole = [lane for lane in lanes if len(lane) > OPTIONS["horizon"]]
    floor = float(np.mean([lane[-100:].mean() for lane in whole])) if whole else None
    curves = [fit_curve(lane, floor) for lane in lanes]
    mean = {name: float(np.mean([curve[name] for curve in curves])) for name in curves[0]}
    spread = {f"{name}_std": float(np.std([curve[name] for curve in curves], ddof=1)) for name in ("middle", "width")}
    shown = {f"lane {i}": [round(float(x), 4) for x in lane[::20]] for i, lane in enumerate(lanes)}
    settings = {**OPTIONS, "model": arguments.model, "steps": [len(lane) - 1 for lane in lanes]}
    report("drift_curve", settings, {"curve": mean, **spread, "curves": curves,
                                     "noise": fit_noise(lanes, curves), "losses": shown})


if __name__ == "__main__":
    main()
