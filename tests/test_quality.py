"""bench/tiny_models and bench/quality: the problems, the tokenizer, the corruption, a few steps of
training, and the scoring.
"""

import dataclasses
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdllm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

import tables  # noqa: E402
from quality import evaluate  # noqa: E402
from tiny_models import data, problems, tasks, train  # noqa: E402
from tiny_models import tokenizer as tiny_tokenizer  # noqa: E402
from tiny_models.optimizer import Optimizer, orthogonalize  # noqa: E402

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
TRAIN = [problems.make_problem(index, "train") for index in range(20_000)]
TEST = [problems.make_problem(index, "test") for index in range(1_000)]
FIRST_TEST_QUESTION = (
    "Emma works 3 hours a day for 5 days at $6 an hour. Rosa adds $226, and then Emma pays $41 for "
    "a coat. How many dollars are left?"
)
MICRO = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 1,
    "num_kv_heads": 1,
    "intermediate_size": 128,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_tokenizer.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def auto_tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def micro_config(name):
    return dataclasses.replace(train.CONFIGS[name], **MICRO)


def test_a_problem_is_a_function_of_split_and_index():
    assert (
        problems.make_problem(7, "train") == TRAIN[7]
        and problems.make_problem(7, "test") == TEST[7]
    )
    assert TRAIN[7] != TEST[7] and TRAIN[7] != TRAIN[8]
    with pytest.raises(ValueError, match="split"):
        problems.make_problem(0, "valid")


def test_problems_stay_what_they_were():
    """The committed checkpoints and results belong to these very problems."""
    assert TEST[0].question == FIRST_TEST_QUESTION


def test_train_and_test_never_overlap():
    def stated(index, split):
        template, numbers, _ = problems.draw_numbers(index, split)
        key = template.name, tuple(numbers[slot] for slot in template.given)
        assert problems.split_of(*key) == split
        return key

    train_keys = {stated(index, "train") for index in range(len(TRAIN))}
    test_keys = {stated(index, "test") for index in range(len(TEST))}
    assert not train_keys & test_keys
    assert len(test_keys) > 0.98 * len(TEST)
    assert not {p.question for p in TRAIN} & {p.question for p in TEST}
    numbers = {
        (re.sub(r"\d+", "0", p.question), tuple(re.findall(r"\d+", p.question))) for p in TRAIN
    }
    assert not numbers & {
        (re.sub(r"\d+", "0", p.question), tuple(re.findall(r"\d+", p.question))) for p in TEST
    }


@pytest.mark.parametrize("split", [TRAIN[:5000], TEST], ids=["train", "test"])
def test_every_step_is_right_and_follows_from_what_is_known(split):
    for problem in split:
        known = {int(number) for number in re.findall(r"\d+", problem.question)}
        *lines, last = problem.answer_text.split("\n")
        assert 2 <= len(lines) <= 5 and last == f"#### {problem.final}"
        for line in lines:
            [(a, sign, b, result)] = EQUATION.findall(line)
            a, b, result = int(a), int(b), int(result)
            assert {a, b} <= known
            assert result == {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign] <= 9999
            assert sign != "/" or (a % b == 0 and b < 10)
            assert sign != "*" or (max(a, b) < 100 and min(a, b) < 10)
            known.add(result)
        assert result == problem.final and 10 <= problem.final <= 9999


def test_chance_answers_are_useless_and_every_template_is_used():
    (_, most), *_ = Counter(p.final for p in TRAIN).most_common(1)
    assert most < 0.02 * len(TRAIN)
    used = Counter(problems.draw_numbers(index, "train")[0].name for index in range(3000))
    assert len(used) == len(problems.TEMPLATES) >= 8 and min(used.values()) > 100
    digits = Counter(len(str(p.final)) for p in TRAIN)
    assert set(digits) == {2, 3, 4} and min(digits.values()) > 0.05 * len(TRAIN)


def test_lengths_fit_the_canvas_and_span_several_blocks():
    for problem in TRAIN[:5000] + TEST:
        prompt, answer = map(len, tiny_tokenizer.encode_problem(problem))
        assert prompt <= 75 and 40 <= answer <= 110
        canvas = min(tasks.TASKS["stories"].canvases)
        assert prompt + answer < canvas and canvas - prompt >= 112


def test_autotokenizer_loads_it(auto_tokenizer):
    assert len(auto_tokenizer) == tiny_tokenizer.VOCAB_SIZE <= 512
    assert auto_tokenizer.eos_token_id == tiny_tokenizer.EOS_ID
    assert auto_tokenizer.mask_token_id == tiny_tokenizer.MASK_ID
    assert auto_tokenizer.chat_template == tiny_tokenizer.CHAT_TEMPLATE


@settings(max_examples=200, deadline=None)
@given(
    text=st.text()
    | st.text(alphabet="Mia has12 4.\n#<|>maskendoftxé")
    | st.sampled_from(["a<|mask|> b<|endoftext|>"])
)
def test_any_text_comes_back(auto_tokenizer, text):
    assert auto_tokenizer.decode(auto_tokenizer.encode(text)) == text


def test_known_words_and_digits_are_one_token(auto_tokenizer):
    tokens = auto_tokenizer.tokenize(" apples 4096 = 12")
    assert tokens == ["Ġapples", "Ġ4", "0", "9", "6", "Ġ=", "Ġ1", "2"]


def test_the_fast_encoding_is_the_tokenizers(auto_tokenizer):
    for problem in TRAIN[:1000] + TEST:
        prompt, answer = tiny_tokenizer.encode_problem(problem)
        text = f"{tiny_tokenizer.prompt_of(problem)} {problem.answer_text}"
        assert auto_tokenizer.encode(text) == prompt + answer
        assert auto_tokenizer.encode(tiny_tokenizer.prompt_of(problem)) == prompt
    with pytest.raises(KeyError):
        tiny_tokenizer.encode_known("é")


def test_the_chat_template_makes_the_prompt(auto_tokenizer):
    for problem in TEST[:50]:
        chat = [{"role": "user", "content": problem.question}]
        text = auto_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert text == tiny_tokenizer.prompt_of(problem)


@pytest.fixture(scope="module", params=tasks.TASKS)
def pool(request):
    return request.param, data.Pool(request.param, 400, 16, seed=3)


def test_a_pool_holds_its_problems_once_in_canvases_that_fit(pool):
    task, pool = pool
    rows = {
        (canvas, *tokens[row].tolist())
        for canvas, (tokens, _, _) in pool.parts.items()
        for row in range(len(tokens))
    }
    assert sum(len(tokens) for tokens, _, _ in pool.parts.values()) == len(rows) == 400
    assert set(pool.parts) == set(tasks.TASKS[task].canvases)
    for index in range(100):
        ids = sum(tiny_tokenizer.encode_problem(tasks.TASKS[task].make(index, "train")), [])
        filled = {
            (canvas, *ids, *[tiny_tokenizer.EOS_ID] * (canvas - len(ids))) for canvas in pool.parts
        }
        assert len(filled & rows) == 1


def test_a_pass_takes_every_batch_once_and_a_new_one_shuffles(pool):
    task, pool = pool
    count = len(pool.places)
    first = [pool.batch(number)[0] for number in range(count)]
    seen = [tuple(row) for tokens in first for row in tokens.tolist()]
    assert len(set(seen)) == len(seen) == 16 * count
    assert not all(
        torch.equal(pool.batch(count + number)[0], tokens) for number, tokens in enumerate(first)
    )
    again = data.Pool(task, 400, 16, seed=3)
    assert all(
        torch.equal(a, b) for a, b in zip(again.batch(count), pool.batch(count), strict=True)
    )


def test_workers_make_the_same_pool(monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 20)
    alone, shared = (data.Pool("chains", 50, 8, workers=workers) for workers in (0, 2))
    for number in range(3):
        for a, b in zip(alone.batch(number), shared.batch(number), strict=True):
            assert torch.equal(a, b)
    with pytest.raises(ValueError, match="problems: expected enough for a batch of 64, got 50"):
        data.Pool("chains", 50, 64)


@pytest.mark.parametrize("seed", range(20))
def test_corruption_spares_the_prompt_and_masks_something(seed, pool):
    tokens, prompt, answer = pool[1].batch(seed)
    rows = len(tokens)
    noisy, weights = data.corrupt(tokens, prompt, answer, torch.Generator().manual_seed(seed))
    masked = noisy == tiny_tokenizer.MASK_ID
    assert torch.equal(masked, weights > 0) and torch.equal(noisy[~masked], tokens[~masked])
    position = torch.arange(tokens.shape[1]) - prompt[:, None]
    assert not masked[position < 0].any()
    assert masked.any(1).all()
    assert (weights[position > answer[:, None]] <= data.TAIL_WEIGHT + 1e-6).all()
    for row in range(
        1, rows, 2
    ):  # block-wise: all masked from the end of a block on, all clean before its start
        generated = masked[row, prompt[row] :]
        full = (weights[row, prompt[row] :] == data.LATER_WEIGHT).nonzero().flatten()
        first = int(generated.nonzero()[0])
        assert any(
            generated[(first // length + 1) * length :].all() for length in data.BLOCK_LENGTHS
        )
        assert not len(full) or full[0] % min(data.BLOCK_LENGTHS) == 0


def test_orthogonalize_brings_singular_values_near_one():
    matrices = torch.randn(3, 48, 16, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrices, torch.float32))
    assert 0.6 < values.min() and values.max() < 1.3


def test_schedule_warms_up_stays_and_falls_to_zero():
    assert train.schedule(0) == 0 and train.schedule(train.WARMUP) == 1 == train.schedule(0.5)
    assert train.schedule(0.8) == pytest.approx(0.5) and train.schedule(1.01) == 0


@pytest.mark.parametrize("name", train.CONFIGS)
def test_a_few_steps_lower_the_loss(name):
    torch.manual_seed(0)
    model = train.initialize(train.DiffusionTransformer(micro_config(name)), seed=0)
    optimizer, losses = Optimizer(model, 0.02, 3e-3), []
    pool = data.Pool("stories", 160, 8)
    for number in range(16):
        tokens, prompt, answer = pool.batch(number)
        losses.append(train.masked_loss(model, tokens, *data.corrupt(tokens, prompt, answer)))
        losses[-1].backward()
        optimizer.step(1.0)
    assert losses[0] > 5.5 and sum(losses[-3:]) / 3 < losses[0] - 1


@pytest.mark.parametrize("name, task", [("tiny-llada", "stories"), ("tiny-dream", "chains")])
def test_a_run_saves_resumes_and_leaves_a_checkpoint_that_loads(name, task, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "TEST_SECONDS", 0)
    short = dataclasses.replace(tasks.TASKS[task], gen_length=8)
    monkeypatch.setitem(tasks.TASKS, task, short)

    def run(*more):
        args = f"{name} --task {task} --out {tmp_path} --rows 4 --problems 40 --workers 0"
        args = [*args.split(), "--examined", "2", "--device", "cpu", *more]
        run = train.Run(name, micro_config(name), tmp_path, train.arguments(args))
        run.train()
        return run

    run("--max-steps", "2")
    done = run("--max-steps", "3", "--resume")
    assert done.done["steps"] == 3
    assert 12 * min(short.canvases) <= done.done["tokens"] <= 12 * max(short.canvases)
    model = fastdllm.load(tmp_path, device="cpu")
    assert model.config == micro_config(name) and model.dtype == torch.bfloat16
    masters = done.optimizer.masters
    assert all(torch.equal(p, masters[key].bfloat16()) for key, p in model.named_parameters())
    assert f"- Trained on: 40 {short.about} in 0.3 passes" in (tmp_path / "README.md").read_text()
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"guessed", "solved", "whole"} <= logged[-1].keys() and logged[-1]["steps"] == 3


@pytest.mark.parametrize("name", train.CONFIGS)
def test_the_models_fit_in_sixteen_mebibytes(name):
    with torch.device("meta"):
        model = train.DiffusionTransformer(train.CONFIGS[name])
    assert 2 * sum(parameter.numel() for parameter in model.parameters()) <= 16 * 2**20


def test_score_reads_the_answer_up_to_its_end(auto_tokenizer):
    problem, stops = (
        problems.Problem("", "Mia has 2 * 3 = 6 apples.\n#### 6", 6),
        (tiny_tokenizer.EOS_ID,),
    )

    def scored(text):
        return evaluate.score(problem, auto_tokenizer.encode(text), auto_tokenizer, stops)

    end = tiny_tokenizer.EOS
    length = len(auto_tokenizer.encode(" " + problem.answer_text))
    assert scored(f" {problem.answer_text}{end}{end}") == (True, True, length)
    assert scored(f" {problem.answer_text}") == (True, True, length)
    assert scored(f" Mia has 2 * 3 = 5 apples.\n#### 6{end}")[:2] == (True, False)
    assert scored(f" {problem.answer_text}6{end}")[:2] == (False, False)
    assert scored(f" Mia has 6 apples.{end}#### 6")[:2] == (False, False)
    assert scored(end) == (False, False, 0)


def fake_report(accuracies=(0.96, 0.95, 0.94)):
    values = dict.fromkeys(evaluate.MEASURED, 2.0)
    results = [
        setting | values | {"accuracy": accuracy, "seconds": 1.0}
        for setting, accuracy in zip(evaluate.all_settings(), accuracies * 99, strict=False)
    ]
    head = {"model": "m", "problems": 9, "split": "test", "gen_length": 128, "dtype": "float32"}
    return head | {"environment": {"gpu": None, "torch": "2"}, "results": results}


def test_settings_cover_the_grid_once():
    keys = [evaluate.key_of(setting) for setting in evaluate.all_settings()]
    assert len(set(keys)) == len(keys) == 3 * 12 * 2 + 3 * 2 * 3
    assert (
        keys[0] == "none/1 a step/16"
        and "dual/factor 1.3/32" in keys
        and "prefix/threshold 0.9/8" in keys
    )


def test_reports_are_written_merged_tabled_plotted_and_put_into_the_card(tmp_path):
    report = fake_report()
    shards = [report | {"results": report["results"][i::2]} for i in range(2)]
    for i, shard in enumerate(shards):
        tables.write_json(tmp_path / f"m.{i}-of-2.json", shard)
    paths = sorted(tmp_path.glob("m.*json"))
    assert evaluate.merge(paths) == report
    tables.write_json(paths[1], shards[1] | {"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="dtype"):
        evaluate.merge(paths)
    lines_of_heads = 2
    assert evaluate.markdown(report).count("\n| ") == len(report["results"]) + lines_of_heads
    evaluate.plot(report, tmp_path, "m")
    assert {path.name for path in tmp_path.glob("*.png")} == {"m-parallel.png", "m-blocks.png"}
    (tmp_path / "README.md").write_text("# m\n- Accuracy: not measured yet.\nend\n")
    for _ in range(2):
        evaluate.update_card(tmp_path, report)
    assert "block length 32: 96.0% with one token a step" in (tmp_path / "README.md").read_text()


def test_measure_counts_forwards_and_resumes(tmp_path, monkeypatch):
    train.initialize(model := train.DiffusionTransformer(micro_config("tiny-llada")), seed=0)
    fastdllm.checkpoint.save(model, tmp_path / "m")
    tiny_tokenizer.write_tokenizer(tmp_path / "m")
    short = dataclasses.replace(tasks.TASKS["stories"], gen_length=32)
    monkeypatch.setitem(tasks.TASKS, "stories", short)
    command = [
        str(tmp_path / "m"),
        "--out",
        str(tmp_path),
        "--problems",
        "3",
        "--rows",
        "2",
        "--device",
        "cpu",
    ]
    for wanted in (["dual/2 a step/16"], ["dual/2 a step/16", "none/4 a step/32"]):
        evaluate.main([*command, "--dtype", "float32", "--limit-settings", *wanted])
    report = evaluate.merge([tmp_path / "m.json"])
    assert [evaluate.key_of(result) for result in report["results"]] == [
        "dual/2 a step/16",
        "none/4 a step/32",
    ]
    for result in report["results"]:
        assert (
            0 < result["nfe"] <= 16
            and result["nfe"] == result["refreshes"] + result["cached_steps"]
        )
    with pytest.raises(ValueError, match="another model"):
        evaluate.main([*command, "--dtype", "bfloat16"])
