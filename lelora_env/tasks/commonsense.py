"""The eight commonsense data sets on the hub, rewritten into the Commonsense-170k format.

Wording from LLM-Adapters (https://github.com/AGI-Edgerunners/LLM-Adapters), so that models tuned on
``commonsense170k`` can be judged on them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lelora_env.errors import DataError, UnknownNameError
from lelora_env.tasks.files import RawData, Table, read_raw, require_columns

Row = Mapping[str, Any]
Parts = tuple[str, str, Sequence[str], int]
"""Question; what its choices are called; the choices; which is right."""


@dataclass(frozen=True)
class HubChoice:
    """Where a data set lies on the hub, and how its rows read.

    Attributes:
        hub: Its name.
        subset: Its configuration, if it has several.
        columns: The columns that are needed.
        parts: One row in parts.
    """

    hub: str
    subset: str | None
    columns: tuple[str, ...]
    parts: Callable[[Row], Parts]


def _piqa(row: Row) -> Parts:
    return (f"Please choose the correct solution to the question: {row['goal']}", "solution",
            (row["sol1"], row["sol2"]), int(row["label"]))


def _siqa(row: Row) -> Parts:
    return (f"Please choose the correct answer to the question: {row['context']} {row['question']}", "answer",
            (row["answerA"], row["answerB"], row["answerC"]), int(row["label"]) - 1)


def _hellaswag(row: Row) -> Parts:
    return (f"Please choose the correct ending to complete the given sentence: {row['activity_label']}: {row['ctx']}",
            "ending", tuple(row["endings"]), int(row["label"]))


def _winogrande(row: Row) -> Parts:
    return (f"Please choose the correct answer to fill in the blank to complete the given sentence: {row['sentence']}",
            "option", (row["option1"], row["option2"]), int(row["answer"]) - 1)


def _arc(row: Row) -> Parts:
    question = row["question"] if "question" in row else row["question_stem"]
    choices = row["choices"]
    return (f"Please choose the correct answer to the question: {question}", "answer", tuple(choices["text"]),
            list(choices["label"]).index(row["answerKey"]))


_ARC = ("question", "choices", "answerKey")
HUB_CHOICES: dict[str, HubChoice] = {
    "piqa": HubChoice("baber/piqa", None, ("goal", "sol1", "sol2", "label"), _piqa),
    "siqa": HubChoice("lighteval/siqa", None,
                      ("context", "question", "answerA", "answerB", "answerC", "label"), _siqa),
    "hellaswag": HubChoice("Rowan/hellaswag", None, ("activity_label", "ctx", "endings", "label"), _hellaswag),
    "winogrande": HubChoice("allenai/winogrande", "winogrande_xl", ("sentence", "option1", "option2", "answer"),
                            _winogrande),
    "arc-e": HubChoice("allenai/ai2_arc", "ARC-Easy", _ARC, _arc),
    "arc-c": HubChoice("allenai/ai2_arc", "ARC-Challenge", _ARC, _arc),
    "obqa": HubChoice("allenai/openbookqa", "main", ("question_stem", "choices", "answerKey"), _arc),
}
"""Name → data set on the hub; BoolQ, whose answers are true and false, is rewritten by `boolq_rows`.

The originals of PIQA (ybisk/piqa) and SIQA (allenai/social_i_qa) are loading scripts, which ``datasets`` no
longer runs: these are the copies that lm-evaluation-harness uses."""


def read_commonsense(name: str) -> RawData:
    """Read a multiple-choice data set from the hub, in the Commonsense-170k format.

    Raises:
        UnknownNameError: No such data set.
        DataError: The hub cannot be reached, or the data set has other columns than expected.
    """
    if name == "commonsense170k":
        return read_raw("zwhe99/commonsense_170k")
    if name == "boolq":
        raw = read_raw("google/boolq")
        return RawData(boolq_rows(raw.train), boolq_rows(raw.eval) if raw.eval else None, raw.eval_name, raw.where)
    if name not in HUB_CHOICES:
        raise UnknownNameError("multiple-choice task", name, (*HUB_CHOICES, "boolq", "commonsense170k"),
                               "For data of your own write 'choice:<path>'.")
    known = HUB_CHOICES[name]
    raw = read_raw(known.hub, subset=known.subset, eval_splits=("validation",) if name in _LABELLED else ("test",))
    held = choice_rows(raw.eval, known, raw.where) if raw.eval else None
    return RawData(choice_rows(raw.train, known, raw.where), held, raw.eval_name, raw.where)


_LABELLED = ("piqa", "siqa", "hellaswag", "winogrande")
"""Data sets whose test labels are not public: they are judged on their validation split."""


def boolq_rows(table: Table) -> Table:
    """BoolQ's questions, without their passages as in Commonsense-170k, in its format."""
    require_columns(table, ("question", "answer"), "google/boolq")
    answers = ["true" if answer else "false" for answer in table["answer"]]
    return _in_format(
        [f"Please answer the following question with true or false, question: {question}?\n\nAnswer format: true/false"
         for question in table["question"]], answers)


def choice_rows(table: Table, known: HubChoice, where: str) -> Table:
    """A hub data set's rows in the Commonsense-170k format.

    Raises:
        DataError: A column is missing, or a row cannot be read.
    """
    require_columns(table, known.columns, where)
    instructions, answers = [], []
    for i in range(len(table[known.columns[0]])):
        try:
            question, kind, choices, right = known.parts({name: table[name][i] for name in known.columns})
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"{where}: row {i} cannot be read ({type(error).__name__}: {error}); its columns are not "
                            f"what was expected: {', '.join(known.columns)}") from error
        listed = " ".join(f"{kind.capitalize()}{n}: {choice}" for n, choice in enumerate(choices, 1))
        names = "/".join(f"{kind}{n}" for n in range(1, len(choices) + 1))
        instructions.append(f"{question}\n\n{listed}\n\nAnswer format: {names}")
        answers.append(f"{kind}{right + 1}")
    return _in_format(instructions, answers)


def _in_format(instructions: list[str], answers: list[str]) -> Table:
    return {"instruction": instructions, "input": [""] * len(answers),
            "output": [f"the correct answer is {answer}" for answer in answers], "answer": list(answers)}
