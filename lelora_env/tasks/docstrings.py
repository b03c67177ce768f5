"""The built-in text task ``docstrings``: which library was this sentence written for?

Real text that every machine has. The sentences are read at run time from the docstrings of
installed libraries and of the standard library (parsed as source text, nothing is imported), so
nothing is downloaded and nothing is copied. The six classes are topics:

======================  ==========================================================
arrays                  numpy
internet                the standard library's network, mail and process modules
machine learning        scikit-learn
neural networks         torch
plots                   matplotlib
tables                  pandas
======================  ==========================================================

Names that give the answer away are replaced by ``X``: everything that looks like code; the names of
the libraries; names of their modules, classes and functions that occur (almost) only in one class;
and every word that all but names its class. What is left has to be read: the best keyword of each
class is right on about 22 % of the eval rows and ten keywords a class on about 35 %, a linear model of
all words on about 65 %; a guess on 17 %.

The rows depend on the installed versions and on nothing else: `TextClassification.fingerprint` of
the task identifies them. Sentences that occur in two classes are left out, near copies (equal up to
masks, digits, case and punctuation) are kept once, and every class has the same number of rows.
"""

import ast
import gc
import hashlib
import importlib.util
import re
import sysconfig
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from lelora_env.errors import DataError
from lelora_env.tasks.classification import TextClassification
from lelora_env.tasks.files import RawData, Table

SOURCES: dict[str, tuple[str, tuple[str, ...]]] = {
    "arrays": ("numpy", ("lib", "ma/core.py", "ma/extras.py", "fft", "linalg/_linalg.py", "polynomial/polynomial.py")),
    "internet": ("", ("asyncio", "concurrent", "email", "ftplib.py", "http", "imaplib.py", "ipaddress.py", "logging",
                      "mailbox.py", "selectors.py", "smtplib.py", "socket.py", "socketserver.py", "ssl.py",
                      "subprocess.py", "urllib", "wsgiref", "xmlrpc")),
    "machine learning": ("sklearn", ("cluster", "decomposition", "linear_model", "model_selection")),
    "neural networks": ("torch", ("autograd", "distributions", "nn/init.py", "nn/modules", "nn/utils", "optim",
                                  "utils/data")),
    "plots": ("matplotlib", ("animation.py", "artist.py", "axes", "axis.py", "colors.py", "figure.py", "text.py",
                             "ticker.py", "widgets.py")),
    "tables": ("pandas", ("core/frame.py", "core/generic.py", "core/indexes/base.py", "core/series.py")),
}
"""Class → top-level package ("" = the standard library) and the parts of it that are read."""

LIBRARY_NAMES = frozenset("numpy python sklearn scikit learn torch pytorch matplotlib pyplot mpl pandas scipy".split())
MASK = "X"
ROWS_PER_CLASS = 720
EVAL_PER_CLASS = 120
MIN_WORDS, MAX_WORDS = 10, 24
MASKED_SHARE = 0.15
GIVE_AWAY_SHARE, GIVE_AWAY_COUNT = 0.95, 8

_NOT_PROSE = re.compile(r"\s*([=\-~^*#]{3,}|>>>|\.\.\.|\.\. |[:@]\w|\||\+[-=]|```|\w+ : |[-*] )")
_CODE = re.compile(
    r"(?::[\w:]+:)?`+[^`]*`+_*"                      # `name`, ``code``, :role:`name`
    r"|\*{1,2}[^*\s][^*]*\*{1,2}|\"[^\"]*\"|'[^'\s]+'"     # *name*, "text", 'text'
    r"|\S*[_<>={}\[\]\\/@|%$&+~^#]\S*"                # snake_case, a[i], x=1, paths, addresses
    r"|\w+(?:\.\w+)+(?:\(\))?|\w+\([^)\s]*\)"            # dotted.names, calls()
    r"|\b[a-z]+[A-Z]\w*|\b[A-Z]+[a-z]*[A-Z]\w*|\b\w*\d\w*"  # camelCase, CamelCase, ACRONYMS, numbers
)
_MASKS = re.compile(rf"{MASK}(?:[\s,]+{MASK}\b)+")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_PROSE = re.compile(r"[A-Z][A-Za-z ,;:'()\-]+\.")
_WORD = re.compile(r"[A-Za-z]+")


def docstrings_task(**options: Any) -> TextClassification:
    """The task ``docstrings``: six balanced classes, 32 tokens at most.

    Args:
        options: Options of `TextClassification`, such as ``train_rows``.
    """
    settings: dict[str, Any] = {"text_columns": "text", "num_labels": len(SOURCES), "max_length": 32,
                                "name": "docstrings"}
    return TextClassification(read_docstrings, **settings | options)


@lru_cache(maxsize=1)
def read_docstrings() -> RawData:
    """Read, mask, deduplicate and balance the sentences: columns ``text`` and ``label`` (the class's name).

    Takes about two seconds the first time in a process.

    Raises:
        DataError: A library is missing, or its sources hold too few docstrings.
    """
    sentences: dict[str, list[str]] = {}
    names: set[str] = set()
    with _no_garbage_collection():
        for label, (package, parts) in SOURCES.items():
            sentences[label] = _read_class(package, parts, names)
    rows = _distinct(_mask_give_aways(sentences, names))
    per_class = min(ROWS_PER_CLASS, *map(len, rows.values()))
    if per_class < 2 * EVAL_PER_CLASS:
        smallest = min(rows, key=lambda label: len(rows[label]))
        raise DataError(f"task 'docstrings' found only {per_class} sentences for {smallest!r}; expected at least "
                        f"{2 * EVAL_PER_CLASS}. Are the installed packages stripped of docstrings? Give another task")
    train, held_out = Table(text=[], label=[]), Table(text=[], label=[])
    for label, texts in rows.items():
        for position, text in enumerate(sorted(texts, key=_digest)[:per_class]):
            table = held_out if position < EVAL_PER_CLASS else train
            table["text"].append(text)
            table["label"].append(label)
    return RawData(train, held_out, "validation", "the docstrings of the installed libraries")


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Parsing makes millions of objects and no cycles: the collector would take more time than the parser."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read_class(package: str, parts: Iterable[str], names: set[str]) -> list[str]:
    """The different sentences of one class, sorted; names in its sources are added to `names`."""
    found: dict[str, None] = {}
    for path in _source_files(package, parts):
        names.update(_WORD.findall(path.stem.lower()))
        for docstring in _docstrings(path, names):
            found.update(dict.fromkeys(_sentences(docstring)))
    return sorted(found)


def _source_files(package: str, parts: Iterable[str]) -> Iterator[Path]:
    """Python files, in a fixed order; found without importing anything."""
    if package:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise DataError(f"task 'docstrings' reads the sources of {package!r}, which is not installed; install it "
                            "or give another task")
        root = Path(spec.origin).parent
    else:
        root = Path(sysconfig.get_path("stdlib"))
    for part in parts:
        path = root / part
        found = [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))
        yield from (file for file in found if file.is_file() and "test" not in file.relative_to(root).as_posix())


def _docstrings(path: Path, names: set[str]) -> Iterator[str]:
    """The docstrings of a source file; the names of its classes and functions are added to `names`."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, OSError):
        return
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if not isinstance(node, ast.Module):
                names.update(_WORD.findall(node.name.lower()))
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                pending.extend(node.body)
            text = ast.get_docstring(node)
            if text:
                yield text


def _sentences(docstring: str) -> Iterator[str]:
    """Whole sentences of prose, with everything that looks like code masked."""
    for paragraph in _paragraphs(docstring):
        text = _MASKS.sub(MASK, _CODE.sub(MASK, paragraph))
        for sentence in _SENTENCE_END.split(text):
            if MIN_WORDS <= len(sentence.split()) <= MAX_WORDS and _PROSE.fullmatch(sentence):
                yield sentence


def _paragraphs(docstring: str) -> Iterator[str]:
    """Blocks of lines with the same indentation, without headings, directives, code, tables and lists."""
    block: list[str] = []
    indent = -1
    for line in [*docstring.splitlines(), ""]:
        width = len(line) - len(line.lstrip())
        prose = bool(line.strip()) and _NOT_PROSE.match(line) is None
        if block and (not prose or width != indent):
            yield " ".join(" ".join(block).split())
            block = []
        if prose:
            block.append(line)
            indent = width


def _mask_give_aways(sentences: dict[str, list[str]], names: set[str]) -> dict[str, list[str]]:
    """Replace the words that all but name their class."""
    counts = {label: Counter(w for text in texts for w in set(_WORD.findall(text.lower())))
              for label, texts in sentences.items()}
    give_away = set(LIBRARY_NAMES)
    for word in set().union(*counts.values()):
        share = {label: count[word] / len(sentences[label]) for label, count in counts.items()}
        most = max(share.values()) / sum(share.values())
        frequent = sum(count[word] for count in counts.values()) >= GIVE_AWAY_COUNT
        if most >= GIVE_AWAY_SHARE and (frequent or word in names):
            give_away.add(word)

    def hide(match: re.Match[str]) -> str:
        return MASK if match[0].lower() in give_away else match[0]

    return {label: [_MASKS.sub(MASK, _WORD.sub(hide, text)) for text in texts] for label, texts in sentences.items()}


def _distinct(sentences: dict[str, list[str]]) -> dict[str, list[str]]:
    """Readable sentences (few masks), near copies once, none that two classes share."""
    first: dict[str, str] = {}
    owners: defaultdict[str, set[str]] = defaultdict(set)
    for label, texts in sentences.items():
        for text in texts:
            words = _WORD.findall(text)
            if words.count(MASK) <= MASKED_SHARE * len(words) and len(text.split()) >= MIN_WORDS:
                key = " ".join(word.lower() for word in words if word != MASK)
                owners[key].add(label)
                first.setdefault(key, text)
    kept: dict[str, list[str]] = {label: [] for label in sentences}
    for key, labels in owners.items():
        if len(labels) == 1:
            kept[min(labels)].append(first[key])
    return kept


def _digest(text: str) -> str:
    """An order of texts that nothing but the text decides."""
    return hashlib.sha256(text.encode()).hexdigest()
