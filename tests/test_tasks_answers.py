import pytest

from lelora_env.tasks.answers import (
    as_number,
    extract_answer,
    judge_solution,
    last_boxed,
    normalise_answer,
    same_answer,
)
from lelora_env.tasks.candidates import candidate_names, first_candidate


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48/2 = <<48/2=24>>24\n#### 72", "72"),
        ("#### 1\nno, wait\n#### $1,234.50.", "1234.50"),
        ("#### 18\n#### ", None),
        (r"so $x = \boxed{\dfrac{3}{4}}$.", r"\frac{3}{4}"),
        (r"\boxed{1} and then \boxed{\sqrt{2}+{3}}", r"\sqrt{2}+{3}"),
        (r"unclosed \boxed{1 + {2}", None),
        ("The answer is: 12 apples", "12apples"),
        ("the final answer is 7.\n", "7"),
        ("I count 3 and 4", None),
        ("", None),
        (None, None),
    ],
)
def test_extraction(text: str | None, answer: str | None) -> None:
    assert extract_answer(text) == answer


def test_the_last_number_is_only_taken_on_request() -> None:
    assert extract_answer("first 3 then 1,004", last_number=True) == "1004"
    assert extract_answer("none at all", last_number=True) is None


def test_boxed_braces_balance() -> None:
    assert last_boxed(r"a \boxed{x^{2}_{1}} b") == "x^{2}_{1}"
    assert last_boxed("nothing") is None


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("72", "72.0", True), ("1/2", "0.5", True), (r"\frac{1}{2}", "0.5", True), (r"-\frac{1}{2}", "-1/2", True),
        (r"\frac12", "1/2", True), (r"\frac123", "4", False),
        ("1/0", "1/0", True), ("1/0", "2/0", False), ("0.3333", "1/3", False),
        ("x+1", "x+1", True), ("72", "27", False), ("1,234", "1234", True), ("(1,234)", "(1234)", False),
        ("50\\%", "50", True), ("$5", "5", True), (r"\text{Evelyn}", "Evelyn", True), ("x=5", "5", True),
        (r"90^\circ", "90", True), (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", True), ("+3", "3", True),
    ],
)
def test_equality_after_normalisation(a: str, b: str, same: bool) -> None:
    assert same_answer(normalise_answer(a), normalise_answer(b)) is same


def test_no_answer_never_equals_anything() -> None:
    assert not same_answer(None, None)
    assert not same_answer(None, "1")
    assert not same_answer(normalise_answer(" "), normalise_answer("$"))
    assert not judge_solution("I do not know", "no number here either")
    assert not judge_solution("", "#### 3")


def test_numbers_are_exact() -> None:
    assert as_number("0.1") == as_number("1/10")
    assert as_number("1e5") is None
    assert as_number("nan") is None


def test_judging_solutions() -> None:
    assert judge_solution("She has 3.\n#### 72\nQuestion: more text 5", "#### 72")
    assert judge_solution("so it is 72", "72")
    assert judge_solution(r"\boxed{72}", "The answer is: 72")
    assert not judge_solution("#### 5 and 72", "72")


def test_candidates_of_a_question() -> None:
    assert candidate_names("... Answer format: true/false", "true") == ("true", "false")
    assert candidate_names("q\n\nAnswer1: a Answer2: b Answer3: c", "answer2") == ("answer1", "answer2", "answer3")
    assert candidate_names("no choices", "maybe") == ()


def test_the_candidate_that_is_named_first() -> None:
    names = tuple(f"answer{i}" for i in range(1, 11))
    assert first_candidate("the correct answer is Answer10, not answer1", names) == "answer10"
    assert first_candidate("answer11 or untrue", (*names, "true")) is None
    assert first_candidate("", names) is None
