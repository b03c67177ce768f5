from typing import Any

import numpy as np
import pytest
import torch

from lelora_env.errors import DataError, ModelError, UnknownNameError
from lelora_env.tasks.causal import IGNORED
from lelora_env.tasks.chat import chat_task, ultrafeedback_task
from lelora_env.tasks.choice import ChoiceTask
from lelora_env.tasks.commonsense import HUB_CHOICES, boolq_rows, choice_rows
from lelora_env.tasks.dataset import DatasetTask
from lelora_env.tasks.files import RawData
from lelora_env.tasks.instruction import CausalTask, instruction_task
from lelora_env.tasks.maths import math_task
from lelora_env.tasks.prompts import ALPACA, ALPACA_INPUT, render_prompt
from tests.small_tokenizers import gpt_like

SIZES = {"reward_size": 3, "tune_size": 4, "seed": 0}
Columns = dict[str, list[Any]]
SPLITS = ("train", "reward", "tune", "eval")


def table(count: int, *, output: str = "answer {i}", start: int = 0) -> dict[str, list[Any]]:
    span = range(start, start + count)
    return {"instruction": [f"say {i}" for i in span], "input": ["" if i % 2 else f"in {i}" for i in span],
            "output": [output.format(i=i) for i in span]}


def data(train: dict[str, list[Any]], held: dict[str, list[Any]] | None = None) -> RawData:
    return RawData(train, held, "validation", "rows")


@pytest.mark.parametrize("bos", [False, True])
def test_the_loss_is_on_the_answer_and_the_end_of_text_only(bos: bool) -> None:
    tokenizer = gpt_like(bos=bos)
    raw = table(30)
    rows = instruction_task(data(raw)).splits(tokenizer, **SIZES)
    for split in SPLITS:
        for i, source in enumerate(rows.sources[split]):
            row = int(source.split(":")[1])
            ids = rows[split]["input_ids"][i][rows[split]["attention_mask"][i] == 1]
            labels = rows[split]["labels"][i]
            template = ALPACA_INPUT if raw["input"][row] else ALPACA
            prompt = template.replace("{instruction}", raw["instruction"][row]).replace("{input}", raw["input"][row])
            start = "<|start|>" if bos else ""
            assert tokenizer.decode(ids) == f"{start}{prompt}{raw['output'][row]}<|end|>"
            learnt = labels != IGNORED
            assert tokenizer.decode(labels[learnt]) == f"{raw['output'][row]}<|end|>"
            assert torch.equal(labels[learnt], rows[split]["input_ids"][i][learnt])
            assert not learnt[rows[split]["attention_mask"][i] == 0].any()


def test_braces_in_the_data_survive_and_templates_are_checked() -> None:
    assert render_prompt("plain", "a {b} {input} {instruction}", "c {x}") == "a {b} {input} {instruction}\nc {x}\n"
    assert render_prompt("Q: {instruction} A:", "{}") == "Q: {} A:"
    with pytest.raises(UnknownNameError, match="alpaca"):
        instruction_task("x", prompt="alpacca")
    with pytest.raises(DataError, match="three names"):
        instruction_task("x", columns=("a", "b"))
    with pytest.raises(DataError, match="no column 'instruction'"):
        instruction_task(data({"prompt": ["a"], "output": ["b"]})).splits(gpt_like(), **SIZES)
    with pytest.raises(DataError, match="max_length"):
        instruction_task("x", max_length=1)


def test_over_long_rows_are_cut_at_the_end_or_dropped_and_counted() -> None:
    tokenizer = gpt_like()
    raw = table(40)
    raw["instruction"][0] = "long " * 200  # the whole answer is cut off
    raw["output"][1] = "word " * 200  # a part of it is
    raw["output"][2] = " "  # there is none
    rows = instruction_task(data(raw), max_length=300).splits(tokenizer, **SIZES)
    assert rows.notes["answer_cut_off"] == 1
    assert rows.notes["no_answer"] == 1
    assert rows.notes["truncated"] == 1
    names = [name for split in SPLITS for name in rows.sources[split]]
    assert len(set(names)) == len(names) == 38
    assert not {"train:0", "train:2"} & set(names)
    for split in SPLITS:
        assert (rows[split]["labels"][:, 1:] != IGNORED).any(1).all()  # no row without a loss: never a NaN
        assert rows[split]["input_ids"].shape[1] <= 300


def test_no_usable_row_is_a_clear_error() -> None:
    with pytest.raises(DataError, match="0 of them distinct and usable"):
        instruction_task(data(table(40)), max_length=5).splits(gpt_like(), **SIZES)


def test_score_of_known_logits() -> None:
    task = instruction_task("x")
    labels = torch.tensor([[IGNORED, 1, 2], [IGNORED, IGNORED, 0]])
    logits = torch.zeros(2, 3, 4)
    logits[0, 0, 1] = 3.0  # right for the first token; the others are a coin with four sides
    batch = {"labels": labels}
    total, weight = task.loss(logits, batch)
    first = -np.log(np.exp(3.0) / (np.exp(3.0) + 3))
    assert total.tolist() == pytest.approx([first + np.log(4), np.log(4)], rel=1e-6)
    assert weight.tolist() == [2, 1]
    scores = task.score(task.predict(logits, batch).numpy(), batch)
    assert scores["loss"] == pytest.approx((first + 2 * np.log(4)) / 3, rel=1e-6)
    assert scores["token_accuracy"] == pytest.approx(2 / 3)  # argmax of equal logits is token 0
    assert scores["perplexity"] == pytest.approx(np.exp(scores["loss"]))


def test_the_same_question_is_never_trained_on_and_rewarded() -> None:
    raw = table(30)
    doubled = {name: values + values for name, values in raw.items()}
    doubled["output"] = [f"other wording {i}" for i in range(60)]  # as MetaMathQA: one question, many answers
    rows = instruction_task(data(doubled)).splits(gpt_like(), **SIZES)
    asked = {split: {int(name.split(":")[1]) % 30 for name in rows.sources[split]} for split in SPLITS}
    for split in ("reward", "tune", "eval"):
        assert not asked["train"] & asked[split]


def test_a_part_of_a_large_data_set_keeps_its_row_numbers() -> None:
    raw = table(2000)
    rows = instruction_task(data(raw, table(5, start=5000)), train_rows=6).splits(gpt_like(), **SIZES)
    assert len(rows.sources["train"]) == 6
    tokenizer = gpt_like()
    row = int(rows.sources["train"][0].split(":")[1])
    assert raw["instruction"][row] in tokenizer.decode(rows.train["input_ids"][0])
    assert rows.sources["eval"] == [f"validation:{i}" for i in range(5)]


def test_mathematics_with_generated_answers() -> None:
    raw = {"question": [f"what is {i} plus 1?" for i in range(30)],
           "answer": [f"It is {i + 1}.\n#### {i + 1}" for i in range(30)]}
    task = math_task("gsm8k", data(raw))
    rows = task.splits(gpt_like(), **SIZES)

    def generate(prompts: list[str]) -> list[str]:
        numbers = [int(prompt.split("what is ")[1].split()[0]) for prompt in prompts]
        return [f"#### {n + 1}.00" if n % 2 else "no idea" for n in numbers]

    expected = np.mean([int(name.split(":")[1]) % 2 for name in rows.sources["train"]])
    assert task.generated_score(generate, rows.sources["train"]) == {
        "exact_match": pytest.approx(expected), "rows": len(rows.sources["train"])}
    with pytest.raises(DataError, match="no rule"):
        instruction_task(data(table(9))).generated_score(generate, ["train:0"])


def test_training_on_one_data_set_and_judging_on_another() -> None:
    mine = {"query": [f"q {i}" for i in range(30)], "response": [f"The answer is: {i}" for i in range(30)]}
    other = {"question": ["e 0", "e 1"], "answer": ["#### 0", "#### 1"]}
    task = math_task("metamathqa", data(mine), eval_data=data({}, other))
    rows = task.splits(gpt_like(), **SIZES)
    assert rows.sources["eval"] == ["validation:0", "validation:1"]
    assert task.generated_score(lambda prompts: ["#### 1"] * len(prompts), rows.sources["eval"])["exact_match"] == 0.5


def conversations(count: int) -> dict[str, list[Any]]:
    return {"messages": [
        [{"role": "system", "content": "be kind"}, {"role": "user", "content": f"hello {i}"},
         {"role": "assistant", "content": f"first {i}"}, {"role": "user", "content": "again"},
         {"role": "assistant", "content": f"second {i}"}, {"role": "user", "content": "unanswered"}]
        for i in range(count)]}


def test_chat_learns_the_assistants_turns_only() -> None:
    tokenizer = gpt_like(bos=True)
    rows = chat_task(data(conversations(20)), chat_template="chatml").splits(tokenizer, **SIZES)
    i = int(rows.sources["reward"][0].split(":")[1])
    ids = rows.reward["input_ids"][0][rows.reward["attention_mask"][0] == 1]
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nbe kind<|im_end|>\n"
        f"<|im_start|>user\nhello {i}<|im_end|>\n<|im_start|>assistant\nfirst {i}<|im_end|>\n"
        f"<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\nsecond {i}<|im_end|>\n"
    )
    learnt = rows.reward["labels"][0]
    assert tokenizer.decode(learnt[learnt != IGNORED]) == f"first {i}<|im_end|>\nsecond {i}<|im_end|>\n"


def test_chat_uses_the_tokenisers_own_template() -> None:
    tokenizer = gpt_like()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }};{% endfor %}" \
                              "{% if add_generation_prompt %}[assistant]{% endif %}"
    rows = chat_task(data(conversations(20))).splits(tokenizer, **SIZES)
    learnt = rows.train["labels"][0]
    assert tokenizer.decode(learnt[learnt != IGNORED]).startswith("first ")
    assert tokenizer.decode(rows.train["input_ids"][0]).startswith("[system]be kind;[user]hello")


def test_chat_errors() -> None:
    with pytest.raises(DataError, match="no chat template"):
        chat_task(data(conversations(20))).splits(gpt_like(), **SIZES)
    with pytest.raises(DataError, match="expected a list of"):
        chat_task(data({"messages": ["hello"] * 9}), chat_template="chatml").splits(gpt_like(), **SIZES)
    silent = {"messages": [[{"role": "user", "content": "x"}]] * 9}
    with pytest.raises(DataError, match="assistant's turn"):
        chat_task(data(silent), chat_template="chatml").splits(gpt_like(), **SIZES)
    with pytest.raises(DataError, match="template refuses"):
        chat_task(data(conversations(9)), chat_template="{{ raise_exception('no') }}").splits(gpt_like(), **SIZES)


def test_ultrafeedback_takes_the_chosen_answer() -> None:
    raw: Columns = {"prompt": [f"p {i}" for i in range(20)],
           "chosen": [[{"role": "user", "content": f"p {i}"}, {"role": "assistant", "content": f"good {i}"}]
                      for i in range(20)]}
    tokenizer = gpt_like()
    rows = ultrafeedback_task(data(raw)).splits(tokenizer, **SIZES)
    learnt = rows.train["labels"][0]
    row = rows.sources["train"][0].split(":")[1]
    assert tokenizer.decode(learnt[learnt != IGNORED]) == f"good {row}<|end|>"


def choices(count: int, start: int = 0) -> dict[str, list[Any]]:
    right = [i % 3 + 1 for i in range(start, start + count)]
    return {
        "instruction": [f"Question {i}?\n\nAnswer1: a Answer2: b Answer3: c\n\nAnswer format: answer1/answer2/answer3"
                        for i in range(start, start + count)],
        "input": [""] * count,
        "output": [f"the correct answer is answer{r}" for r in right],
        "answer": [f"answer{r}" for r in right],
    }


def test_choice_expands_tune_and_eval_and_scores_by_likelihood() -> None:
    task, tokenizer = ChoiceTask(data(choices(40), choices(7, 100))), gpt_like()
    rows = task.splits(tokenizer, **SIZES)
    assert [len(rows[split]["gold"]) for split in SPLITS] == [33, 3, 12, 21]
    assert rows.sources["eval"][:4] == ["validation:0"] * 3 + ["validation:1"]
    assert rows.train["gold"].all()
    for i in range(21):
        learnt = rows.eval["labels"][i]
        name = f"answer{int(rows.eval['candidate'][i]) + 1}"
        assert tokenizer.decode(learnt[learnt != IGNORED]) == f"the correct answer is {name}<|end|>"
        question = int(rows.sources["eval"][i].split(":")[1])
        assert int(rows.eval["gold"][i]) == int(choices(7, 100)["answer"][question] == name)
    gold = rows.eval["gold"].numpy()
    cost = np.where(gold == 1, 2.0, 3.0)
    cost[3:6] = np.where(gold[3:6] == 1, 9.0, 8.0)  # one question answered wrongly
    scores = task.score(np.stack([cost, np.full(21, 2.0)], 1), rows.eval)
    assert scores["accuracy"] == pytest.approx(6 / 7)
    assert scores["loss"] == pytest.approx((6 * 2.0 + 9.0) / (7 * 2.0))  # right candidates only


def test_a_model_that_cannot_tell_candidates_apart_or_has_diverged_scores_zero() -> None:
    task = ChoiceTask(data(choices(40), choices(7, 100)))
    rows = task.splits(gpt_like(), **SIZES).eval
    for value in (1.0, np.nan, np.inf):
        assert task.score(np.stack([np.full(21, value), np.full(21, 4.0)], 1), rows)["accuracy"] == 0.0


def test_choice_by_generated_answers() -> None:
    task = ChoiceTask(data(choices(40), choices(9, 100)))
    rows = task.splits(gpt_like(), **SIZES)
    seen: list[str] = []

    def generate(prompts: list[str]) -> list[str]:
        seen.extend(prompts)
        return ["the correct answer is answer2 (or answer1)"] * 6 + ["?"] * 3

    scores = task.generated_score(generate, rows.sources["eval"])
    assert len(seen) == len(set(seen)) == 9
    assert seen[0].endswith("### Response:\n")
    right = [choices(9, 100)["answer"][i] == "answer2" for i in range(6)]
    assert scores == {
        "generated_accuracy": pytest.approx(sum(right) / 9), "answered": pytest.approx(6 / 9), "rows": 9.0}


def test_questions_that_cannot_be_used_are_dropped_and_counted() -> None:
    raw = choices(40)
    raw["answer"][0] = "answer9"
    raw["instruction"][1] = "very long " * 100 + raw["instruction"][1]
    rows = ChoiceTask(data(raw), max_length=400).splits(gpt_like(), **SIZES)
    assert rows.notes == {"no_answer": 1, "answer_cut_off": 1}
    with pytest.raises(DataError, match="Answer format"):
        ChoiceTask(data(table(9) | {"answer": ["x"] * 9})).splits(gpt_like(), **SIZES)


def test_hub_rows_become_the_commonsense_format() -> None:
    options = {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}
    arc: Columns = {"question": ["Why?"], "choices": [options], "answerKey": ["3"]}
    rows = choice_rows(arc, HUB_CHOICES["arc-c"], "arc")
    assert rows["instruction"] == ["Please choose the correct answer to the question: Why?\n\n"
                                   "Answer1: x Answer2: y Answer3: z\n\nAnswer format: answer1/answer2/answer3"]
    assert (rows["answer"], rows["output"]) == (["answer3"], ["the correct answer is answer3"])
    piqa: Columns = {"goal": ["g"], "sol1": ["s"], "sol2": ["t"], "label": [0]}
    assert choice_rows(piqa, HUB_CHOICES["piqa"], "piqa")["answer"] == ["solution1"]
    siqa = {"context": ["c"], "question": ["q"], "answerA": ["x"], "answerB": ["y"], "answerC": ["z"], "label": ["2"]}
    assert choice_rows(siqa, HUB_CHOICES["siqa"], "siqa")["answer"] == ["answer2"]
    wino = {"sentence": ["s _"], "option1": ["a"], "option2": ["b"], "answer": ["2"]}
    assert choice_rows(wino, HUB_CHOICES["winogrande"], "w")["answer"] == ["option2"]
    swag: Columns = {"activity_label": ["A"], "ctx": ["c"], "endings": [["p", "q", "r", "s"]], "label": ["3"]}
    assert choice_rows(swag, HUB_CHOICES["hellaswag"], "h")["answer"] == ["ending4"]
    assert boolq_rows({"question": ["is it"], "answer": [False]})["answer"] == ["false"]
    with pytest.raises(DataError, match="row 0 cannot be read"):
        choice_rows(arc | {"answerKey": ["D"]}, HUB_CHOICES["arc-e"], "arc")


def test_rows_are_cut_to_what_the_model_can_take() -> None:
    raw = table(40)
    raw["instruction"][0] = "long " * 200
    raw["output"][1] = "word " * 200
    tokenizer = gpt_like()
    tokenizer.model_max_length = 300
    rows = instruction_task(data(raw), max_length=4000).splits(tokenizer, **SIZES)
    assert rows.notes == {"answer_cut_off": 1, "truncated": 1}
    assert max(rows[split]["input_ids"].shape[1] for split in SPLITS) == 300
    talks = conversations(20)
    talks["messages"][3][4]["content"] = "word " * 200
    rows = chat_task(data(talks), chat_template="chatml").splits(tokenizer, **SIZES)
    assert rows.notes == {"truncated": 1}
    assert max(rows[split]["input_ids"].shape[1] for split in SPLITS) == 300
    asked = choices(40)
    asked["instruction"][1] = "very long " * 100 + asked["instruction"][1]
    tokenizer.model_max_length = 400
    assert ChoiceTask(data(asked)).splits(tokenizer, **SIZES).notes == {"answer_cut_off": 1}


def test_the_reason_why_no_row_is_usable_is_named() -> None:
    raw = table(40)
    with pytest.raises(DataError, match="40 with the answer cut off at max_length"):
        instruction_task(data(raw), max_length=5).splits(gpt_like(), **SIZES)
    raw["output"] = [" "] * 40
    with pytest.raises(DataError, match="40 without an answer"):
        instruction_task(data(raw)).splits(gpt_like(), **SIZES)


def test_a_model_without_a_language_model_head_is_refused() -> None:
    batch = {"labels": torch.zeros(4, 7, dtype=torch.int64)}
    rows = [{"labels": [0] * 7}] * 9
    other = DatasetTask(rows, lambda rows: {"labels": torch.zeros(len(rows), 7)}, head="causal-lm")
    for task in (instruction_task("x"), ChoiceTask("x"), other):
        for output in ({"last_hidden_state": torch.zeros(4, 7, 2)}, torch.zeros(4, 2), torch.zeros(4, 8, 2)):
            for method in (task.loss, task.predict):
                with pytest.raises(ModelError, match="AutoModelForCausalLM"):
                    method(output, batch)  # type: ignore[arg-type]


def test_causal_tasks_need_a_tokenizer() -> None:
    for task in (instruction_task(data(table(20))), ChoiceTask(data(choices(20)))):
        assert isinstance(task, CausalTask | ChoiceTask)
        with pytest.raises(DataError, match="needs a tokenizer"):
            task.splits(None, **SIZES)
