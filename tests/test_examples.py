"""The examples and the README's Python run, as they stand there."""

import csv
import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import gymnasium as gym
import pytest

from tests.families import tiny_model
from tests.small_tokenizers import bert_like

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {"torchrl_collect": "torchrl"}
"""Examples for a package that is no dependency: without it they say how to get it, and end well."""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the model and the data that the README speaks of."""
    tokenizer = bert_like()
    model = tiny_model("bert", num_labels=2, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64)
    model.save_pretrained(tmp_path / "my-model")
    tokenizer.save_pretrained(tmp_path / "my-model")
    with (tmp_path / "reviews.csv").open("w", newline="") as file:
        rows = [(f"review number {i} is {'good' if i % 3 else 'bad'}", int(i % 3 > 0)) for i in range(300)]
        csv.writer(file).writerows([("text", "label"), *rows])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme_python_runs(number: int, workplace: Path) -> None:
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), {"__name__": "__main__"})


def test_readme_shows_the_twelve_lines() -> None:
    assert len(BLOCKS) >= 4
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(lines) <= 12


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_run(path: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch,
                      capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--tiny"] if "--tiny" in path.read_text(encoding="utf-8") else []
    monkeypatch.setattr(sys, "argv", [str(path), *tiny])
    if path.stem in NEEDS and find_spec(NEEDS[path.stem]) is None:
        with pytest.raises(SystemExit) as ending:
            runpy.run_path(str(path), run_name="__main__")
        assert ending.value.code == 0
        assert f"pip install {NEEDS[path.stem]}" in capsys.readouterr().err
        return
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_readme_names_files_that_exist() -> None:
    """The annotated tree and the examples that the text points to."""
    tree = README.split("## Where is what")[1].split("\n## ")[0]
    named = {name for name in re.findall(r"\b([a-z_]+\.py)\b", tree) if name != "base.py"}
    there = {p.name for p in (ROOT / "lelora_env").glob("*.py")} - {"__init__.py"}
    assert named == there
    for name in re.findall(r"((?:examples|benchmarks)/\w+\.py)", README):
        assert (ROOT / name).exists()


def test_readme_versions_are_those_of_the_package() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = dict(d.split(">=") for d in project["dependencies"])
    rows = dict(re.findall(r"^\| ([\w-]+) \| ([\d.]+) \|", README, re.M))
    assert rows.pop("Python") == project["requires-python"].removeprefix(">=")
    assert rows == {name: bounds[name] for name in rows}
    assert len(rows) >= 5
    assert gym.__version__ >= rows["gymnasium"]
