"""Who may import whom, and what a plain import must not load."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS = (
    ("errors",),
    ("config", "keys", "reward", "capture", "reference", "loading", "memory", "fused", "infos"),
    ("tasks.base", "spectra", "matrices", "allocation"),
    ("tasks",),  # every concrete task; they may use one another
    ("cache", "arguments", "budget"),
    ("spectrum",),
    ("bank",),
    ("adapter", "optim"),
    ("models", "batches"),
    ("attach", "grams", "inputs", "passes"),
    ("features", "scoring"),
    ("finetune",),
    ("attribution",),
    ("outcome",),
    ("accounting",),
    ("vector_env",),
    ("env",),
    ("synthetic", "logged"),
    ("drift", "surrogate"),
    ("instances",),
    ("export",),
    ("generation",),
    ("runs",),
    ("records",),
    ("plots", "learnt"),
    ("training",),
    ("search",),
    ("compare.sweep",),
    ("compare.store",),
    ("compare.contest", "compare.analysis"),
    ("compare",),
    ("cli",),
)
"""Modules of lelora_env, each layer above the next: a module imports from layers above it."""

UPWARD = {("vector_env", "instances"), ("vector_env", "export"), ("env", "export")}
"""Imports inside functions that go against the layers, on purpose."""

LIGHT = ("transformers", "datasets", "pandas", "pyarrow", "sklearn", "scipy", "matplotlib", "stable_baselines3",
         "typer", "tensorboard", "huggingface_hub")


def layer(module: str) -> int:
    for index, names in enumerate(LAYERS):
        if module in names:
            return index
    if module.startswith("tasks."):
        return LAYERS.index(("tasks",))
    raise AssertionError(f"lelora_env/{module} has no place in LAYERS")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Modules that a file imports, and whether inside a function; type-checking blocks do not count."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.ImportFrom) and child.module:
                yield child.module, inside
            if isinstance(child, ast.Import):
                yield from ((alias.name, inside) for alias in child.names)
            yield from walk(child, inside or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False)


MODULES = sorted((ROOT / "lelora_env").rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_import_from_layers_above(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT / "lelora_env").with_suffix("").parts).removesuffix(".__init__")
    if module == "__init__":
        return
    here = layer(module)
    for name, inside in imports(path):
        package, _, other = name.partition(".")
        if package == "agents":
            assert inside, f"{module} imports agents at module level"
            assert module in ("cli", "training", "search", "runs", "compare.contest"), f"{module} imports agents"
        if package == "lelora_env" and other and not (inside and (module, other) in UPWARD):
            siblings = module.startswith("tasks") and other.startswith("tasks")
            assert layer(other) < here or siblings, f"{module} imports {other}, which is not above it"


def test_every_layer_exists() -> None:
    names = {name for names in LAYERS for name in names}
    missing = [n for n in names if not (ROOT / "lelora_env" / f"{n.replace('.', '/')}.py").exists()
               and not (ROOT / "lelora_env" / n / "__init__.py").exists()]
    assert missing == []


def test_agents_use_the_environment_through_its_interface_only() -> None:
    allowed = {"lelora_env", *(f"lelora_env.{name}" for name in ("errors", "config", "matrices", "capture", "budget"))}
    for path in sorted((ROOT / "agents").glob("*.py")):
        used = {name for name, _ in imports(path) if name.partition(".")[0] == "lelora_env"}
        assert used <= allowed, f"{path.name} reaches into {used - allowed}"


@pytest.mark.parametrize("package", ["lelora_env", "agents"])
def test_plain_import_is_light_and_silent(package: str) -> None:
    heavy = (*LIGHT, "torch") if package == "lelora_env" else LIGHT
    code = f"import sys, {package}; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    assert done.stderr == ""
