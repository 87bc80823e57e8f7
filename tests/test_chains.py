"""bench/tiny_models/chains.py: every line is checked by plain arithmetic read off the question, and
what the evaluation says of them.
"""

import re
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from quality import evaluate  # noqa: E402
from tiny_models import chains, tasks  # noqa: E402
from tiny_models import tokenizer as tiny_tokenizer  # noqa: E402

TRAIN = [chains.make_problem(index, "train") for index in range(4000)]
TEST = [chains.make_problem(index, "test") for index in range(300)]
FIRST_TEST_LINE = "Sam adds 26 to 87: 13"


def counted(question):
    """All that the counter shows, from the question's words alone: results in the order in which
    they are written.
    """
    x = int(re.match(r"A counter shows (\d\d)\. ", question)[1])
    shown = []
    for name, asked in re.findall(r"([A-Z][a-z]+) (adds|takes|times|turns)(?= )", question):
        rest = question.split(f" {name} {asked} ")[1].split(".")[0]
        numbers = [int(number) for number in re.findall(r"\d+", rest)]
        if "over" in rest:
            factor, plus, bound, more, less = numbers
            shown.append(f"{x * factor % 100:02}")
            shown.append(shown[-1][::-1])
            shown.append(f"{(int(shown[-1]) + plus) % 100:02}")
            x = int(shown[-1]) + more if int(shown[-1]) > bound else int(shown[-1]) - less
        else:
            [n] = numbers or [0]
            results = {"adds": x + n, "takes": x - n, "times": x * n, "turns": int(f"{x:02}"[::-1])}
            x = results[asked]
        x %= 100
        shown.append(f"{x:02}")
    return shown


def written(answer):
    """The results that an answer writes, in their order."""
    return re.findall(r"(?:: |turned |it reads |shows )(\d\d)", answer)


@pytest.mark.parametrize("split", [TRAIN, TEST], ids=["train", "test"])
def test_every_written_result_is_what_the_question_makes(split):
    for problem in split:
        shown = counted(problem.question)
        lines = problem.answer_text.split("\n")
        assert written(problem.answer_text) == shown and 8 <= len(shown) <= 20
        assert lines[-1] == f"#### {shown[-1]}" and problem.final == int(shown[-1])
        assert [line.split()[0] for line in lines[:-1]] == [step.name for step in problem.steps]
        assert problem.is_right(problem.answer_text) and problem.is_right(
            f" {problem.answer_text}\n"
        )


def test_a_problem_is_a_function_of_split_and_index_and_stays_what_it_was():
    assert chains.make_problem(7, "train") == TRAIN[7] != TRAIN[8]
    assert TEST[0].answer_text.split("\n")[0] == FIRST_TEST_LINE
    with pytest.raises(ValueError, match="split"):
        chains.make_problem(0, "valid")


def test_train_and_test_never_overlap_and_nothing_comes_twice():
    questions = {problem.question for problem in TRAIN}
    unseen = {problem.question for problem in TEST}
    assert not questions & unseen
    assert len(questions) == len(TRAIN) and len(unseen) == len(TEST)


def test_all_wordings_are_right_and_nothing_else_is():
    for problem in TEST[:100]:
        *lines, last = problem.answer_text.split("\n")
        for place, step in enumerate(problem.steps):
            for other in step.lines():
                assert problem.is_right(
                    "\n".join([*lines[:place], other, *lines[place + 1 :], last])
                )
            checked = step.kind == "check"
            assert len(step.lines()) == (9 if checked else 3)
            bad = lines[place].replace(step.name, "Nobody")
            assert not problem.is_right("\n".join([*lines[:place], bad, *lines[place + 1 :], last]))
            if checked:
                bad = re.sub(r"(so|now) (it|this) (reads|shows)", "so it shows", lines[place])
                text = "\n".join([*lines[:place], bad, *lines[place + 1 :], last])
                assert not problem.is_right(text)
        assert not problem.is_right("\n".join(lines))
        assert not problem.is_right("\n".join([*lines[1:], last]))
        assert not problem.is_right(problem.answer_text + "0")


def test_finals_openings_kinds_and_checks_are_spread():
    (_, most), *_ = Counter(problem.final for problem in TRAIN).most_common(1)
    assert most < 0.02 * len(TRAIN)
    kinds = Counter(step.kind for problem in TRAIN for step in problem.steps)
    assert set(kinds) == set(chains.ASKED) and min(kinds.values()) > 0.1 * sum(kinds.values())
    words = Counter(re.findall(", (over|under)", " ".join(p.answer_text for p in TRAIN)))
    assert 0.6 < words["over"] / words["under"] < 1.6


def test_openings_differ_in_length_and_two_of_three_closings_share_a_word():
    for kind, openings in chains.OPENINGS.items():
        lengths = {len(re.findall(tiny_tokenizer.PIECE, f" {text}")) for text in openings}
        assert len(lengths) >= 2, kind
    slots = list(zip(*(closing.split() for closing in chains.CLOSINGS), strict=True))
    most = [Counter(words).most_common(1)[0] for words in slots]
    assert [count for _, count in most] == [2, 2, 2]
    assert " ".join(word for word, _ in most) not in chains.CLOSINGS


def test_lengths_differ_widely_and_fit():
    task, answers = tasks.TASKS["chains"], []
    for problem in TRAIN + TEST:
        prompt, answer = map(len, tiny_tokenizer.encode_problem(problem))
        assert prompt <= 140 and answer < task.gen_length
        assert prompt + answer < max(task.canvases)
        answers.append(answer)
    assert min(answers) < 80 and max(answers) > 200
    # No draw is longer: a simple line has at most 13 tokens, a check 33, the end 5.
    longest = 13 * (20 - 4) + 33 + 5
    assert longest < task.gen_length and longest + 140 < max(task.canvases)


def test_known_words_are_one_token_and_the_older_ids_stay():
    for text in chains.texts():
        filled = re.sub(r"\{\w+\}", "0", text)
        assert tiny_tokenizer.encode_known(filled)
    assert tiny_tokenizer._IDS["Zoe"] == 481 and tiny_tokenizer.VOCAB_SIZE <= 512


def test_both_takes_turns_and_keeps_the_splits_apart():
    make = tasks.TASKS["both"].make
    for split in ("train", "test"):
        for index in range(40):
            alone = tasks.TASKS["stories" if index % 4 == 0 else "chains"].make
            assert make(index, split) == alone(index // 4 if index % 4 == 0 else index, split)


def chain_report(changes=()):
    scores = {"nfe": 40.0, "refreshes": 8.0, "cached_steps": 32.0, "tokens_per_forward": 4.0}
    report = {"model": "m", "task": "chains", "problems": 2000, "gen_length": 256, "results": []}
    for cache, rule, accuracy in (
        ("none", "1 a step", 0.96),
        ("dual", "threshold 0.9", 0.95),
        ("dual", "threshold 1.0", 0.95),
        ("dual", "threshold 0.5", 0.8),
    ):
        result = {"cache": cache, "rule": rule, "block_length": 32, "accuracy": accuracy}
        report["results"].append(result | scores | {"exact": accuracy} | dict(changes))
    return report | {"dtype": "bfloat16", "environment": {"gpu": None, "torch": "2"}}


def test_requirements_are_told_with_the_report():
    text = evaluate.markdown(chain_report())
    assert "2000 unseen chains" in text and text.count("| yes |") == 5 and "| no |" not in text
    assert "| 95.0 [94.0, 95.9] |" in text
    missed = {"accuracy": 0.9, "tokens_per_forward": 9.0, "cached_steps": 4.0}
    assert evaluate.markdown(chain_report(missed.items())).count("| no |") == 4
    assert evaluate.requirements(chain_report() | {"results": []}).count("\n") == 1


def test_intervals_are_wilsons():
    # By R: binom::binom.wilson(c(1900, 0), 2000) and prop.test without correction.
    assert evaluate.interval(0.95, 2000) == pytest.approx((0.93955, 0.95873), abs=2e-4)
    low, high = evaluate.interval(0.0, 2000)
    assert low == pytest.approx(0, abs=1e-12) and high == pytest.approx(0.0019171, abs=1e-6)
