"""The command ``lelora``.

Each sub-command is one function: it turns its options into settings, calls a module that knows nothing
of the command line, and prints. Bad input is one line on stderr and exit code 2; Ctrl-C is exit code 130,
SIGTERM 143.
"""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lelora_env.errors import LeLoRAError, UnknownNameError

if TYPE_CHECKING:
    from lelora_env.training import LaneResult

LISTS = ("rank_set", "locations", "betas", "extra_features", "hidden", "columns", "metrics", "text_columns",
         "eval_splits")
"""Settings that hold several values; on the command line these are separated by commas."""

app = typer.Typer(
    name="lelora", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune language models while an agent chooses rank and spectral location of every adapted matrix.",
)


class Terminated(KeyboardInterrupt):
    """SIGTERM: the run ends as by Ctrl-C, with an exit code of its own."""


def _terminate(signal_number: int, frame: object) -> None:
    raise Terminated


def main() -> None:
    """Entry point of the console command."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        signal.signal(signal.SIGTERM, _terminate)
        app()
    except KeyboardInterrupt as error:
        sys.exit(_interrupted(error))


def _interrupted(error: KeyboardInterrupt) -> int:
    """Say so in one line; the exit code is 128 + the signal's number, as shells have it."""
    typer.echo("lelora: interrupted", err=True)
    return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn errors that users can mend into one line on stderr and an exit code."""
    try:
        yield
    except LeLoRAError as error:
        typer.echo(f"lelora: error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt as error:
        raise typer.Exit(_interrupted(error)) from None


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"lelora-env {version('lelora-env')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    """Options before any sub-command; also makes typer keep ``train`` as a sub-command."""


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """Read ``key=value`` settings: numbers, true, false and none as such, all else as text.

    Raises:
        LeLoRAError: A setting without ``=``.
    """
    settings = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise LeLoRAError(f"a setting must look like key=value (got {pair!r})")
        key = key.strip().replace("-", "_")
        listed = key in LISTS and _value(text) is not None
        parts = [_value(part) for part in text.strip("[]() ").split(",") if part.strip()]
        settings[key] = parts if listed else _value(text)
    return settings


def _value(text: str) -> Any:
    text = text.strip()
    if text.lower() in ("none", "null"):
        return None
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except json.JSONDecodeError:
        return text


def config_options(pairs: Sequence[str], given: dict[str, Any]) -> dict[str, Any]:
    """Options of the environment from ``--set`` and from options of their own, which win.

    Raises:
        UnknownNameError: A setting that there is none of.
        LeLoRAError: A value that does not fit its setting.
    """
    from lelora_env.config import ADAPTER_FIELDS, ENV_FIELDS, split_options

    options = parse_settings(pairs)
    for name in options:
        if name not in ADAPTER_FIELDS + ENV_FIELDS:
            raise UnknownNameError("setting", name, ADAPTER_FIELDS + ENV_FIELDS)
    options |= {name: value for name, value in given.items() if value is not None}
    split_options(options)
    return options


class Progress:
    """A progress bar on a terminal; elsewhere a plain line at every tenth of the way."""

    def __init__(self, total: int, unit: str = "step") -> None:
        """Count up to `total`."""
        self.total, self.started, self.bar, self.done = total, time.monotonic(), None, 0
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, unit=unit, dynamic_ncols=True)

    def __call__(self, step: int, losses: dict[str, float]) -> None:
        """Env step `step` is done; `losses` are those of the lanes."""
        text = "loss: " + ", ".join(f"{lane} {loss:.3f}" for lane, loss in losses.items())
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif step * 10 // self.total > (step - 1) * 10 // self.total:
            typer.echo(f"  env step {step}/{self.total}  {text}  ({time.monotonic() - self.started:.0f} s)")

    def count(self, steps: int) -> None:
        """So many more are done."""
        self.done += steps
        if self.bar is not None:
            self.bar.update(steps)
        else:
            typer.echo(f"  {self.done}/{self.total}  ({time.monotonic() - self.started:.0f} s)")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self.bar.close()


def table(results: Sequence["LaneResult"]) -> list[str]:
    """The closing table as lines of text; ``tune`` only where there is one."""
    metric, tuned = results[0].metric, not all(math.isnan(r.tune_after) for r in results)
    tune = ["tune after"] if tuned else []
    head = [f"{metric} on", "eval before", "eval after", *tune, "reward loss before", "after", "mean rank",
            "trained parameters"]
    rows = [head]
    for r in results:
        scores = (r.eval_before, r.eval_after, *([r.tune_after] if tuned else []), r.loss_before, r.loss_after)
        rows.append([r.lane, *(f"{x:.4f}" for x in scores), f"{r.mean_rank:.2f}", f"{r.trained_parameters:,.0f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return [row[0].ljust(widths[0]) + "".join("  " + cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))
            for row in rows]


@app.command()
def train(
    model: Annotated[str | None, typer.Option(
        help="Local folder, hub id, 'minilm' (the demonstration model), or 'built-in' (tiny, for the planted task).",
        show_default="minilm")] = None,
    task: Annotated[str | None, typer.Option(
        help="Task by name, or a JSONL, JSON, CSV, TSV or Parquet file of texts and labels; also text:<path>, "
             "instruction:<path>, chat:<path>, choice:<path>.", show_default="docstrings")] = None,
    agent: Annotated[str, typer.Option(
        help="Who allocates: reinforce, ppo, a2c, bandit, additive, credit, sensitivity, adalora, energy, random or "
             "fixed.")] = "reinforce",
    policy: Annotated[Path | None, typer.Option(
        help="A policy to start from: policy.safetensors of an earlier run, also on another model.")] = None,
    control: Annotated[list[str] | None, typer.Option(
        help="An agent to run beside it on the same data; may be repeated; 'none' for no control.",
        show_default="fixed, random")] = None,
    horizon: Annotated[int | None, typer.Option("--horizon", "--steps", help="Env steps of the run.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of data order, head start and agents.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Run folder; must be new or empty.", show_default="runs/...")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate of the adapters.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Training rows per optimiser step.")] = None,
    target_modules: Annotated[str | None, typer.Option(help="What to adapt: query,value or all-linear.")] = None,
    rank_set: Annotated[str | None, typer.Option(help="Ranks to choose from, such as 0,2,4,8.")] = None,
    device: Annotated[str | None, typer.Option(help="Torch device; the GPU where there is one.")] = None,
    setting: Annotated[list[str] | None, typer.Option(
        "--set", metavar="KEY=VALUE", help="Any other field of AdapterConfig or EnvConfig; may be repeated.")] = None,
    task_setting: Annotated[list[str] | None, typer.Option(
        "--task-set", metavar="KEY=VALUE", help="An option of the task, such as eval_rows; may be repeated.")] = None,
    agent_setting: Annotated[list[str] | None, typer.Option(
        "--agent-set", metavar="KEY=VALUE", help="An option of the agent; may be repeated.")] = None,
) -> None:
    """Fine-tune a model under an agent's allocations, beside controls, and leave a run folder."""
    given = {"horizon": horizon, "learning_rate": learning_rate, "batch_size": batch_size, "device": device,
             "target_modules": target_modules, **parse_settings([f"rank_set={rank_set}"] if rank_set else [])}
    with plain_errors():
        from lelora_env.training import TrainSettings

        chosen_model, chosen_task = _model_and_task(model, task)
        _check_policy(policy, agent)
        controls = tuple(name for name in control or ["fixed", "random"] if name != "none")
        _train(TrainSettings(
            model=chosen_model, task=chosen_task, agent=agent, controls=controls, seed=seed, out=out,
            options=config_options(setting or [], given), task_options=parse_settings(task_setting or []),
            agent_options={**parse_settings(agent_setting or []), **({"policy_file": str(policy)} if policy else {})},
        ))


@app.command()
def search(
    out: Annotated[Path, typer.Option(help="Folder of allocation.json and rounds.jsonl; must be new or empty.")],
    model: Annotated[str | None, typer.Option(help="As of `lelora train`.", show_default="minilm")] = None,
    task: Annotated[str | None, typer.Option(help="As of `lelora train`.", show_default="docstrings")] = None,
    agent: Annotated[str, typer.Option(help="Who searches: additive, bandit, reinforce, ...")] = "additive",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of one run a lane.")] = 10,
    lanes: Annotated[int, typer.Option(min=1, help="Runs of a round, side by side.")] = 48,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of a run.")] = 300,
    budget: Annotated[float, typer.Option(help="Share of what the largest ranks everywhere would train.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Seed of data order, head start and agent.")] = 0,
    setting: Annotated[list[str] | None, typer.Option(
        "--set", metavar="KEY=VALUE", help="A field of AdapterConfig or EnvConfig; may be repeated.")] = None,
    task_setting: Annotated[list[str] | None, typer.Option(
        "--task-set", metavar="KEY=VALUE", help="An option of the task; may be repeated.")] = None,
    agent_setting: Annotated[list[str] | None, typer.Option(
        "--agent-set", metavar="KEY=VALUE", help="An option of the agent; may be repeated.")] = None,
) -> None:
    """Search one allocation for whole runs, under a budget of parameters, and leave it as a file."""
    with plain_errors():
        from lelora_env.search import SearchSettings
        from lelora_env.search import search as run_search

        chosen_model, chosen_task = _model_and_task(model, task)
        settings = SearchSettings(
            model=chosen_model, task=chosen_task, agent=agent, rounds=rounds, lanes=lanes, steps=steps, budget=budget,
            seed=seed, out=out, options=config_options(setting or [], {}),
            task_options=parse_settings(task_setting or []), agent_options=parse_settings(agent_setting or []))
        result = run_search(settings, lambda number, loss: typer.echo(f"round {number}/{rounds}: mean loss {loss:.4f}"))
        typer.echo(f"{result.path}: {result.trained_parameters:,} trained parameters; the search cost {result.runs} "
                   f"runs ({result.optimiser_steps:,} optimiser steps, {result.seconds:.0f} s).\nTrain with it: lelora "
                   f"train {result.train_with}")


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove every entry.")] = False,
    keep_gb: Annotated[float | None, typer.Option(
        help="Remove what was not used for longest until this many gigabytes are left.")] = None,
) -> None:
    """Show or empty the folder of decompositions (set by LELORA_CACHE and LELORA_CACHE_GB)."""
    with plain_errors():
        from lelora_env.cache import cache_folder, entries, prune, size_limit, to_bytes

        folder, limit = cache_folder(), size_limit()
        if clear and keep_gb is not None:
            raise LeLoRAError("--clear and --keep-gb exclude each other: give one of them")
        if folder is None:
            typer.echo("the cache is off (LELORA_CACHE)")
            return
        if clear or keep_gb is not None:
            removed = prune(folder, 0 if clear else to_bytes(keep_gb or 0), everything=clear)
            typer.echo(f"removed {len(removed)} entries, {sum(entry.size for entry in removed) / 1e9:.3f} GB")
        found = entries(folder)
        typer.echo(f"{folder}: {len(found)} entries, {sum(entry.size for entry in found) / 1e9:.3f} GB of at most "
                   f"{limit / 1e9:g} GB")
        for entry in found:
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
            what = f"{len(entry.matrices)} x {entry.shape[0]}x{entry.shape[1]}  {entry.matrices[0]}, ..." \
                if entry.matrices else "(cannot be read)"
            typer.echo(f"  {entry.path.name[:12]}  {entry.size / 1e6:9.1f} MB  used {used}  {what}")


@app.command()
def compare(
    sweep: Annotated[str, typer.Argument(help="A TOML file of methods and problems, or a preset: planted-small.")],
    out: Annotated[Path, typer.Option(help="Folder of the runs; a sweep that was stopped goes on there.")],
    lanes: Annotated[int, typer.Option(min=1, help="Most runs that share a model at a time.")] = 32,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be run, and stop.")] = False,
) -> None:
    """Run methods x problems x seeds, and leave runs.jsonl and table.md."""
    with plain_errors():
        from lelora_env.compare import RunStore, check_sweep, load_sweep, run_sweep, summarise
        from lelora_env.export import write_atomically

        loaded, store = load_sweep(sweep), RunStore(out)
        check_sweep(loaded)
        everything, done = loaded.runs(), store.done()
        waiting = sum(run.key not in done for run in everything)
        typer.echo(f"{loaded.name}: {len(loaded.methods)} methods x {len(loaded.problems)} problems x "
                   f"{len(loaded.seeds)} seeds = {len(everything)} runs, {waiting} to be made")
        if dry_run:
            return
        progress = Progress(max(1, waiting), "run")
        try:
            run_sweep(loaded, store, lanes=lanes, observer=lambda count: progress.count(count))
        finally:
            progress.close()
        records = store.records()
        lines = summarise(records, loaded).lines()
        write_atomically(out / "table.md", lambda path: path.write_text("\n".join(lines) + "\n", encoding="utf-8"))
        typer.echo("\n" + "\n".join(lines) + f"\n\nRuns: {store.path}")
        keys = {run.key for run in everything}
        crashes = [record for record in records if record["key"] in keys and record["status"] == "crashed"]
        for reason in dict.fromkeys(f"{record['method']}: {record['reason']}" for record in crashes):
            typer.echo(f"crashed: {reason}", err=True)
        if crashes:
            raise typer.Exit(1)


def _model_and_task(model: str | None, task: str | None) -> tuple[str, str]:
    """Fill in what was not given: the demonstration, or the planted task with its own model."""
    from lelora_env.tasks import TASKS
    from lelora_env.tasks.files import READERS

    if task and task.partition(":")[0] not in TASKS and (Path(task).suffix in READERS or Path(task).is_file()):
        task = f"text:{task}"
    if task is None:
        task = "planted" if model == "built-in" else "docstrings"
    if model is None:
        model = "built-in" if task == "planted" else "minilm"
    return model, task


def _check_policy(policy: Path | None, agent: str) -> None:
    """Refuse a policy file beside an agent that has no policy."""
    from agents import AGENT_NAMES, option_names

    takers = [name for name in AGENT_NAMES if "policy_file" in option_names(name)]
    if policy is not None and agent not in takers:
        raise LeLoRAError(f"--policy goes with the agents {', '.join(takers)}; {agent!r} has no policy to start from")


def _train(settings: Any) -> None:
    from lelora_env.training import Training

    typer.echo(f"Preparing {settings.model} for {settings.task} ...")
    training = Training(settings)
    for line in _plan(training):
        typer.echo(line)
    progress = Progress(training.base.horizon)
    try:
        results = training.run(progress)
    finally:
        progress.close()
    typer.echo("\n" + "\n".join(table(results)) + "\n")
    typer.echo(
        f"One run of {training.base.horizon} env steps is far too short to learn an allocation from rewards: the\n"
        "lanes differ mostly in how many components they trained, and by chance. Telling allocations apart takes\n"
        "hundreds of runs compared under common random numbers, or a policy trained for thousands of env steps.\n"
    )
    typer.echo(f"Run folder: {training.path} (allocation.png, metrics.jsonl, adapter.safetensors, ...)\n"
               f"Curves:     tensorboard --logdir {training.path / 'events'}")


def _plan(training: Any) -> list[str]:
    """What is about to happen, in a few lines."""
    base, settings = training.base, training.settings
    adapter, config = base.adapter_config, base.env_config
    kinds = ", ".join(dict.fromkeys(matrix.type for matrix in base.matrices))
    return [
        f"  lanes     {', '.join(settings.lanes)}: same start, same rows in the same order, own allocations",
        f"  matrices  {len(base.matrices)} ({kinds}); ranks {', '.join(map(str, adapter.rank_set))}; "
        f"locations {', '.join(adapter.location_names)}",
        f"  budget    {config.horizon} env steps x {config.steps_per_action} optimiser steps x {config.batch_size} "
        f"rows; reward on {config.reward_size} rows held out; seed {settings.seed}",
    ]
