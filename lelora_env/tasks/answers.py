r"""Final answers of worked solutions: how they are found in a text, and when two are the same.

Conventions that are read: ``#### 72`` (GSM8K, https://github.com/openai/grade-school-math),
``\boxed{72}`` (MATH) and ``The answer is: 72`` (MetaMathQA). A text without any of them has *no*
answer, and no answer never equals anything.
"""

import re
from fractions import Fraction

_HASHES = re.compile(r"####[ \t]*([^\n]*)")
_SENTENCE = re.compile(r"(?:the|final)\s+answer\s+is\s*:?[ \t]*([^\n]*)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_FRACTION = re.compile(r"\\frac(?:\{(-?\d+)\}|(\d))(?:\{(\d+)\}|(\d))|(-?\d+)/(\d+)")
_WRAPPED = re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf)\{([^{}]*)\}")
_REMOVED = tuple(r"\left \right \! \, \; \$ $ ^\circ ^{\circ} \% % \( \)".split())


def extract_answer(text: str | None, *, last_number: bool = False) -> str | None:
    """The final answer of a solution, normalised; the last one where there are several.

    Args:
        text: A solution, written or generated.
        last_number: Without a marker, take the last number of the text.

    Returns:
        The answer, or ``None`` if there is none.
    """
    if not text:
        return None
    hashes = _HASHES.findall(text)
    if hashes:
        return normalise_answer(hashes[-1])
    boxed = last_boxed(text)
    if boxed is not None:
        return normalise_answer(boxed)
    sentences = _SENTENCE.findall(text)
    if sentences:
        return normalise_answer(sentences[-1])
    numbers = _NUMBER.findall(text) if last_number else []
    return normalise_answer(numbers[-1]) if numbers else None


def last_boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{...}`` or ``\fbox{...}``, braces balanced; ``None`` if none closes."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    begin = text.index("{", start) + 1
    depth = 1
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position]
    return None


def normalise_answer(answer: str | None) -> str | None:
    r"""One spelling for answers that are written differently; ``None`` for an empty one.

    Dollar and percent signs, degree signs, spacing commands, ``\text{}``, white space, thousands
    separators, a final full stop and a leading ``x =`` go; ``\dfrac`` and ``\tfrac`` become ``\frac``.
    """
    if answer is None:
        return None
    text = answer.strip().replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    for mark in _REMOVED:
        text = text.replace(mark, "")
    text = _WRAPPED.sub(r"\1", text)
    text = "".join(text.replace("\\ ", "").split()).rstrip(".")
    text = re.sub(r"^[a-zA-Z]=(?=.)", "", text)
    if _THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    return text or None


def same_answer(first: str | None, second: str | None) -> bool:
    """Whether two normalised answers are equal, as texts or as exact numbers (``72.0`` is ``72``)."""
    if first is None or second is None:
        return False
    if first == second:
        return True
    left, right = as_number(first), as_number(second)
    return left is not None and left == right


def as_number(text: str) -> Fraction | None:
    r"""The exact value of an integer, a decimal, ``a/b`` or ``\frac{a}{b}``; ``None`` for anything else."""
    sign = -1 if text.startswith("-\\frac") else 1
    fraction = _FRACTION.fullmatch(text.removeprefix("-") if sign < 0 else text)
    if fraction:
        top, bottom = (int(part) for part in fraction.groups() if part is not None)
        return sign * Fraction(top, bottom) if bottom else None
    if re.fullmatch(r"[-+]?(?:\d+\.?\d*|\.\d+)", text):
        return Fraction(text)
    return None


def judge_solution(generated: str, reference: str) -> bool:
    """Whether a generated solution ends in the reference answer.

    Args:
        generated: What the model wrote; its last marked answer counts, else its last number.
        reference: The right answer, or a worked solution that ends in it.
    """
    expected = extract_answer(reference) or normalise_answer(reference)
    return same_answer(extract_answer(generated, last_number=True), expected)
