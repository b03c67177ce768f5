"""The nine GLUE tasks by name, and AG News, with their official metrics.

Sources: Wang et al. 2019, "GLUE" (https://gluebenchmark.com); hub data set ``nyu-mll/glue``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lelora_env.errors import UnknownNameError
from lelora_env.tasks.classification import TEXT_COLUMNS, TextClassification
from lelora_env.tasks.files import EVAL_NAMES, RawData


@dataclass(frozen=True)
class TextDataset:
    """What is known of a published data set.

    Attributes:
        columns: Its text columns on the hub.
        num_labels: Number of classes; 1 = regression.
        metrics: The official metrics, the main one first.
        hub: The data set's name on the hub.
        subset: Its configuration there; empty for none.
        eval_splits: Name of the held-out split with labels.
    """

    columns: tuple[str, ...]
    num_labels: int = 2
    metrics: tuple[str, ...] = ("accuracy",)
    hub: str = "nyu-mll/glue"
    subset: str = ""
    eval_splits: tuple[str, ...] = EVAL_NAMES


_PAIR = ("sentence1", "sentence2")
_MNLI = ("premise", "hypothesis")

TEXT_DATASETS: dict[str, TextDataset] = {
    "cola": TextDataset(("sentence",), metrics=("matthews_correlation", "accuracy"), subset="cola"),
    "sst2": TextDataset(("sentence",), subset="sst2"),
    "mrpc": TextDataset(_PAIR, metrics=("accuracy", "f1"), subset="mrpc"),
    "stsb": TextDataset(_PAIR, num_labels=1, metrics=("pearson", "spearman"), subset="stsb"),
    "qqp": TextDataset(("question1", "question2"), metrics=("accuracy", "f1"), subset="qqp"),
    "mnli": TextDataset(_MNLI, num_labels=3, subset="mnli", eval_splits=("validation_matched",)),
    "mnli-mm": TextDataset(_MNLI, num_labels=3, subset="mnli", eval_splits=("validation_mismatched",)),
    "qnli": TextDataset(("question", "sentence"), subset="qnli"),
    "rte": TextDataset(_PAIR, subset="rte"),
    "wnli": TextDataset(_PAIR, subset="wnli"),
    "ag_news": TextDataset(("text",), num_labels=4, metrics=("accuracy", "macro_f1"), hub="fancyzhx/ag_news",
                           eval_splits=("test",)),
}
"""Published text data sets by name. For MRPC and QQP the main metric is accuracy, as in the paper's tables."""


def glue_task(
    name: str, data: str | Path | RawData | None = None, *, text_columns: Sequence[str] | None = None, **options: Any
) -> TextClassification:
    """A published text task: one of `TEXT_DATASETS`.

    Args:
        name: Such as ``"sst2"``; ``"mnli-mm"`` is MNLI judged on the mismatched genres.
        data: ``None`` reads it from the hub; or a local file or folder whose text columns are the
            hub's, or ``sentence``, or ``sentence1`` and ``sentence2``, with integer labels as on the hub.
        text_columns: The text columns, where they have other names.
        options: Further options of `TextClassification`.

    Raises:
        UnknownNameError: No such task.
    """
    if name not in TEXT_DATASETS:
        raise UnknownNameError("text task", name, TEXT_DATASETS)
    known = TEXT_DATASETS[name]
    regression = known.num_labels == 1
    settings: dict[str, Any] = {
        "text_columns": text_columns, "regression": regression, "metrics": known.metrics, "name": name,
        "num_labels": None if regression else known.num_labels,
    }
    if data is None:
        settings |= {"subset": known.subset or None, "eval_splits": known.eval_splits,
                     "text_columns": text_columns or known.columns}
        return TextClassification(known.hub, **settings | options)
    settings |= {"column_candidates": (known.columns, *TEXT_COLUMNS), "eval_splits": known.eval_splits}
    return TextClassification(data, **settings | options)
