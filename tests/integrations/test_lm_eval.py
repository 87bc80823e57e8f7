"""lm-eval: the model "fastdllm" in the real harness, on the embedded model and its arithmetic
problems.
"""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "bench"), str(ROOT / "bench" / "quality")]

import evaluate  # noqa: E402
import tiny  # noqa: E402
from tiny_models.problems import make_problem  # noqa: E402

import fastdllm  # noqa: E402
from fastdllm import EntropyBound, Factor, Quota, Threshold, text  # noqa: E402
from fastdllm.integrations import lm_eval as integration  # noqa: E402
from fastdllm.integrations.lm_eval_options import READERS, Options, read_options  # noqa: E402

COUNT = 20
SETTING = {
    "cache": "dual",
    "rule": "threshold 0.5",
    "block_length": 128,
}  # fast, and wrong often enough to tell
ARGUMENTS = {
    "pretrained": "tiny-llada",
    "device": "cpu",
    "gen_length": 128,
    "block_length": 128,
    "threshold": 0.5,
}


# The arguments.


def decoding(**given):
    options = read_options({"pretrained": "x"} | given if "model_path" not in given else given)
    gen_length = options.gen_length or 256
    block_length = options.block_length or gen_length
    return (
        options.cache,
        block_length,
        repr(options.commit_rule(gen_length, block_length)),
        options.score,
    )


def test_our_own_names():
    assert decoding() == ("dual", 32, repr(Threshold(0.9)), "confidence")
    assert decoding(cache="prefix", threshold=0.8, block_length=16) == (
        "prefix",
        16,
        repr(Threshold(0.8)),
        "confidence",
    )
    assert decoding(factor=1.0, score="margin") == ("dual", 32, repr(Factor(1.0)), "margin")
    assert decoding(gen_length=256, steps=128) == ("dual", 32, repr(Quota(16)), "confidence")


def test_the_published_llada_arguments():
    one_by_one = {
        "model_path": "x",
        "gen_length": 256,
        "steps": 256,
        "block_length": 32,
        "show_speed": True,
    }
    assert decoding(**one_by_one) == ("none", 32, repr(Quota(32)), "confidence")
    cached = one_by_one | {"use_cache": True, "steps": 8}
    assert decoding(**cached) == ("prefix", 32, repr(Quota(1)), "confidence")
    assert decoding(**cached, threshold=0.9) == ("prefix", 32, repr(Threshold(0.9)), "confidence")
    assert decoding(**cached, dual_cache=True, factor=1.0) == (
        "dual",
        32,
        repr(Factor(1.0)),
        "confidence",
    )
    assert decoding(model_path="x", gen_length=64) == ("none", 64, repr(Quota(64)), "confidence")
    assert decoding(model_path="x", gen_length=64, remasking="random")[3] == "random"
    options = read_options(
        {"model_path": "x", "save_dir": "y", "mc_num": 64, "is_check_greedy": False, "mask_id": 3}
    )
    assert (options.pretrained, options.resume, options.mc_num, options.is_check_greedy) == (
        "x",
        "y",
        64,
        False,
    )


def test_the_published_dream_arguments():
    base = {"max_new_tokens": 256, "diffusion_steps": 256, "add_bos_token": True}
    assert decoding(**base, alg="entropy") == ("none", 256, repr(Quota(256, "dream")), "entropy")
    assert decoding(**base) == decoding(**base, alg="entropy", threshold=0.9)
    assert (
        decoding(**base, alg="topk_margin")[3] == "margin"
        and decoding(**base, alg="maskgit_plus")[3] == "confidence"
    )
    fast = base | {"diffusion_steps": 8, "alg": "confidence_threshold", "use_cache": True}
    assert decoding(**fast, threshold=0.8) == ("prefix", 32, repr(Threshold(0.8)), "confidence")
    assert decoding(**fast, dual_cache=True, alg_temp=0.0, nll_type="mc") == (
        "dual",
        32,
        repr(Threshold(0.9)),
        "confidence",
    )


@pytest.mark.parametrize(
    "given, named",
    [
        ({}, "pretrained"),
        ({"pretrained": "x", "block_size": 3}, "block_size"),
        ({"pretrained": "x", "model_path": "x"}, "twice"),
        ({"pretrained": "x", "cache": "dual", "use_cache": True}, "use_cache"),
        ({"pretrained": "x", "alg": "origin"}, "alg"),
        ({"pretrained": "x", "alg": "low_confidence"}, "alg"),
        ({"pretrained": "x", "batch_size": "auto"}, "batch_size"),
        ({"pretrained": "x", "alg_temp": 0.5}, "alg_temp"),
        ({"pretrained": "x", "nll_type": "ar_ftb"}, "nll_type"),
    ],
)
def test_what_is_refused(given, named):
    with pytest.raises(ValueError, match=named):
        read_options(given)


NUMBERS = {
    "batch_size": [0, -1, 1.5, True, "auto"],
    "gen_length": [0, -4, 2.5, "many"],
    "max_new_tokens": [0, -4.0],
    "block_length": [0, -32, 0.5],
    "threshold": [-0.1, math.nan, math.inf, "1e400", "high", True],
    "factor": [0, -1, 1e-60, math.inf],
    "steps": [0, -4, 2.5, 10**20],
    "diffusion_steps": [0, 2.5],
    "temperature": [-1, math.inf, "hot"],
    "top_p": [0, 1.5, -0.5],
    "top_k": [-2, 0.5],
    "seed": [-1, 1.5, 2**63],
    "max_length": [0, 1, 2, -5, 8.5],
    "mc_num": [0, -1, 0.5],
    "sampling_eps": [-0.1, 1],
    "mask_id": [-1, 0.5],
}
WORDS = {
    "cache": ["full", True, 1],
    "schedule": ["odd"],
    "score": ["sure", 3, ["entropy"]],
    "remasking": ["none"],
    "dtype": ["int8", 16, ["auto"]],
    "device": ["tpu", "cuda:99", 0, "cpu:1"],
    "stop_early": ["no", 2, 0.5],
    "use_cache": ["prefix"],
    "add_bos_token": ["yes"],
    "resume": [True, ""],
    "rule": ["Nothing(1)", "Quota(0)", 0.9],
}
WRONG = [(name, value) for table in (NUMBERS, WORDS) for name in table for value in table[name]]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda value: str(value))
def test_a_wrong_value_is_refused_by_name(name, value):
    more = {"steps": 8} if name == "schedule" else {}
    with pytest.raises(ValueError, match=f"^{name}: .*expected .*got "):
        read_options({"pretrained": "x", name: value} | more)


def test_every_option_has_a_reader():
    assert {field.name for field in dataclasses.fields(Options)} <= READERS.keys()


@pytest.mark.parametrize(
    ("pair", "named"),
    [
        ({"threshold": 0.9, "factor": 1.0}, "factor: expected one rule, but threshold is given"),
        ({"threshold": 0.9, "steps": 8}, "steps: expected one rule"),
        ({"factor": 1.0, "steps": 8}, "steps: expected one rule"),
        ({"rule": "Threshold(0.9)", "threshold": 0.9}, "rule: expected one rule"),
        ({"model_path": "x", "threshold": 0.9, "factor": 1.0}, "factor: expected one rule"),
        ({"schedule": "dream"}, "schedule: expected steps beside it"),
        ({"schedule": "dream", "threshold": 0.5}, "schedule: expected steps beside it"),
    ],
)
def test_two_rules_are_refused(pair, named):
    with pytest.raises(ValueError, match=named):
        read_options({"pretrained": "x"} | pair if "model_path" not in pair else pair)


def test_numbers_as_lm_eval_reads_them():
    """Its parser makes floats of what is negative and of what has an exponent."""
    options = read_options(
        {"pretrained": 42, "top_k": -1.0, "gen_length": 1e2, "batch_size": "7", "stop_early": 0}
    )
    assert (options.pretrained, options.top_k, options.gen_length) == ("42", -1, 100)
    assert (options.batch_size, options.stop_early) == (7, False)
    assert options.asked({"do_sample": True, "top_k": 50}).top_k is None, "the option goes first"
    assert read_options({"pretrained": "x", "score": "entropy", "threshold": -0.5}).threshold < 0


def test_a_rule_may_be_written_out():
    written = 'Quota(steps=4, schedule="dream")'
    assert decoding(rule=written) == ("dual", 32, repr(Quota(4, "dream")), "confidence")
    published = {"model_path": "x", "use_cache": True, "steps": 32}
    assert decoding(**published, rule="Factor(0.5)")[2] == repr(Factor(0.5))


def test_a_rule_says_which_score_it_reads():
    written = "EntropyBound(0.05)"
    assert decoding(rule=written) == ("dual", 32, repr(EntropyBound(0.05)), "entropy")
    with pytest.raises(ValueError, match="^score: expected 'entropy', .*EntropyBound.*'margin'"):
        read_options({"pretrained": "x", "rule": written, "score": "margin"})


def test_what_published_arguments_drop_is_said(caplog):
    decoding(max_new_tokens=64, alg="entropy", threshold=0.9)
    assert "threshold: not used" in caplog.text and "entropy" in caplog.text
    decoding(gen_length=256, block_length=32, steps=100)
    assert "steps: 100 do not spread evenly over 8 blocks; 12 in each" in caplog.text


def test_what_a_request_asks_for():
    options = read_options({"pretrained": "x", "top_p": 0.5})
    plain = options.asked({"temperature": 2.0, "top_k": 5, "until": "\n"})
    assert (plain.gen_length, plain.temperature, plain.until) == (256, 0.0, ("\n",))
    assert (plain.top_p, plain.top_k) == (0.5, None)
    sampled = options.asked(
        {"do_sample": True, "temperature": 2.0, "top_k": 5, "top_p": 0.9, "max_tokens": 8}
    )
    assert (sampled.gen_length, sampled.temperature) == (8, 2.0)
    assert (sampled.top_p, sampled.top_k, sampled.until) == (0.5, 5, ())
    wrong = {"max_gen_toks": 0, "temperature": -1, "top_k": -5, "max_tokens": 2.5}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"generation_kwargs: {name}: expected"):
            options.asked({"do_sample": True, name: value})


# The log-likelihood.


@pytest.mark.parametrize("length", [1, 5, 64])
def test_noise_is_uniform(length):
    draws = 64 * 50
    masks, weights = integration.counted_masks(draws, length, torch.Generator().manual_seed(0))
    count = masks.sum(1)
    assert torch.equal(weights, length / count.double())
    expected = draws / length
    assert (count.bincount(minlength=length + 1)[1:] - expected).abs().max() <= 1
    assert (masks.double().mean(0) - (length + 1) / (2 * length)).abs().max() < 0.05
    masks, weights = integration.bernoulli_masks(draws, length, torch.Generator().manual_seed(0))
    assert not masks[:, -1].any() and weights.min() >= 1 and weights.max() <= 1000
    assert length == 1 or (masks[:, :-1].double().mean(0) - 0.5).abs().max() < 0.05


@pytest.fixture
def harness(tmp_path):
    """A Harness around a tiny random model, without lm-eval and without a tokenizer."""

    def build(config, **options):
        made = object.__new__(integration.Harness)
        model, _ = tiny.build(tmp_path, config)
        tokenizer = SimpleNamespace(eos_token_id=model.config.stop_ids[0], bos_token_id=None)
        made.text = text.TextModel(model, tokenizer)
        made.options = read_options({"pretrained": "x", **options})
        made.max_length = made.model.config.max_positions
        return made

    return build


def exact(model, context, target, dream):
    """The same bound by summing over every mask; Dream's p is integrated over a fine grid."""
    target = torch.tensor(target + [model.config.stop_ids[0]] * dream)
    length, total = len(target), 0.0
    p = 1e-3 + (1 - 1e-3) * (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    for mask in itertools.product([False, True], repeat=length - dream):
        mask = torch.tensor([*mask, *[False] * dream])
        n = int(mask.sum())
        if not n:
            continue
        if dream:
            weight = (p**n * (1 - p) ** (length - 1 - n) / p).mean()
        else:
            weight = 1 / length / math.comb(length, n) * (length / n)
        tokens = torch.cat([torch.tensor(context), target.where(~mask, model.config.mask_id)])
        logp = model.logits(tokens[None])[0, len(context) :].log_softmax(-1)
        total += float(weight) * logp[mask, target[mask]].sum().item()
    return total


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_estimate_comes_to_the_sum_over_all_masks(harness, family):
    lm = harness(tiny.FAMILIES[family], mc_num=6000, batch_size=500)
    context, target = [3, 1, 4], [1, 5, 9]
    wanted = exact(lm.model, context, target, family == "dream")
    ((value, _),) = lm._loglikelihood_tokens([("", context, target)], disable_tqdm=True)
    assert value == pytest.approx(wanted, rel=0.03)
    assert value == lm._estimate(context, target), "the same draws every time"
    lm.options.batch_size = 7
    assert lm._estimate(context, target) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_is_greedy(harness, family):
    lm = harness(tiny.FAMILIES[family], mc_num=2)
    context = [3, 1, 4, 1]
    done = fastdllm.generate(
        lm.model, [context], gen_length=3, cache="none", rule=Quota(32), stop_ids=()
    )
    target = done.tokens[0][4:].tolist()
    other = [*target[:2], (target[2] + 1) % 30]
    pairs = [("", context, target), ("", context, other)]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(pairs, disable_tqdm=True)] == [
        True,
        False,
    ]
    lm.options.is_check_greedy = False
    assert not lm._loglikelihood_tokens(pairs[:1], disable_tqdm=True)[0][1]


def letters(**options):
    """The fields of a tokenizer of one id a letter, "a" being 2; nothing for a NUL."""
    ids = {letter: 2 + index for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz ")}

    def encode(string, add_special_tokens=True):
        return SimpleNamespace(input_ids=[ids[letter] for letter in string.replace("\0", "")])

    encode.bos_token = None
    for name, value in options.items():
        setattr(encode, name, value)
    return encode


@pytest.fixture
def scorer(harness):
    """A Harness of LLaDA that reads letters, and the widths of the forwards that it makes."""
    lm = harness(tiny.LLADA, mc_num=4)
    stop = lm.model.config.stop_ids[0]
    lm.text = text.TextModel(lm.model, letters(eos_token_id=stop, bos_token_id=None))
    lm.widths = []
    real = lm.model.hidden_states

    def spy(tokens, *more):
        lm.widths.append(tokens.shape[1])
        return real(tokens, *more)

    lm.model.hidden_states = spy
    return lm


def scored(lm, *pairs):
    return lm.loglikelihood([SimpleNamespace(args=pair) for pair in pairs], disable_tqdm=True)


def test_no_continuation_is_certain_and_no_context_is_the_prefix_token(scorer):
    assert scored(scorer, ("abc", ""), ("", ""), ("ab ", ""), ("abc", "\0")) == [(0.0, True)] * 4
    assert scorer.widths == []
    prefix = [scorer.prefix_token_id]
    (wanted,) = scorer._loglikelihood_tokens([("", prefix, [2, 3])], disable_tqdm=True)
    assert scored(scorer, ("", "ab"), ("\0", "ab")) == [wanted] * 2
    (wanted,) = scorer._loglikelihood_tokens([("", prefix, [28, 2, 3])], disable_tqdm=True)
    assert scored(scorer, (" ", "ab"), ("", " ab")) == [wanted] * 2
    (wanted,) = scorer._loglikelihood_tokens([("", [4], [28, 2])], disable_tqdm=True)
    assert scored(scorer, ("c ", "a"), ("c", " a")) == [wanted] * 2


def test_the_rolling_log_likelihood_of_no_text_is_0(scorer, offline):
    none = [SimpleNamespace(args=("",)), SimpleNamespace(args=("\0",))]
    assert scorer.loglikelihood_rolling(none, disable_tqdm=True) == [0.0, 0.0]
    scorer.max_length = 3
    (value,) = scorer.loglikelihood_rolling([SimpleNamespace(args=("abcde",))], disable_tqdm=True)
    assert value < 0 and max(scorer.widths) <= 3


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_context_is_cut_with_a_word_and_the_limit_is_never_passed(harness, family, caplog):
    lm = harness(tiny.FAMILIES[family], mc_num=2)
    lm.max_length = 16
    widths = []
    real = lm.model.hidden_states
    lm.model.hidden_states = lambda tokens, *more: (
        widths.append(tokens.shape[1]) or real(tokens, *more)
    )
    context = [3 + index % 30 for index in range(40)]
    both = [("", context, [5, 6, 7]), ("", context[-12:], [5, 6, 7])]
    cut, whole = lm._loglikelihood_tokens(both, disable_tqdm=True)
    assert cut == whole and max(widths) <= 16
    assert "max_length 16: 1 of 2 contexts lose their beginning, 28 of 52 tokens" in caplog.text
    widths.clear()
    with pytest.raises(ValueError, match="max_length: expected room for a continuation of 15"):
        lm._loglikelihood_tokens([both[1], ("", [3], [4] * 15)], disable_tqdm=True)
    assert widths == [], "refused before any work"


# In the harness itself.

TASK = """\
task: arithmetic_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{prompt}"
doc_to_target: "{{{{final}}}}"
generation_kwargs: {{until: ["<|endoftext|>"], do_sample: false, max_gen_toks: 999}}
filter_list:
  - name: final
    filter:
      - {{function: regex, regex_pattern: '####\\s*(-?\\d+)\\s*$', fallback: none}}
      - {{function: take_first}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""


def write_task(folder, prompt="Question: {{question}} Answer:"):
    problems = [make_problem(index, "test") for index in range(COUNT)]
    data = folder / "problems.jsonl"
    data.write_text(
        "".join(
            json.dumps({"question": p.question, "final": str(p.final)}) + "\n" for p in problems
        )
    )
    (folder / "arithmetic_words.yaml").write_text(TASK.format(data=data, prompt=prompt))
    return folder / "arithmetic_words.yaml"


@pytest.fixture(scope="module")
def offline():
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def wanted():
    """What bench/quality makes of the problems: whether each is solved, and all in one batch."""
    model = text.load("tiny-llada", "cpu", "float32").model
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(text.ASSETS / "tiny-llada" / "tokenizer.json"))
    problems = [make_problem(index, "test") for index in range(COUNT)]
    each = [evaluate.measure(model, tokenizer, [problem], SETTING, rows=1) for problem in problems]
    together = evaluate.measure(model, tokenizer, problems, SETTING, rows=COUNT)
    return [result["accuracy"] for result in each], together


def model_args(**more):
    given = ARGUMENTS | more
    return ",".join(f"{name}={value}" for name, value in given.items() if value is not None)


def fastdllm_eval(folder, task, *arguments, **more):
    command = [
        sys.executable,
        "-m",
        "fastdllm",
        "eval",
        str(task),
        "--model_args",
        model_args(**more),
        *arguments,
    ]
    command += ["--output_path", str(folder / "out"), "--log_samples"]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "FASTDLLM_BACKEND": "reference",
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    return rows, done


@pytest.mark.parametrize("how", ["prompt in the task", "chat template"])
def test_the_accuracy_is_that_of_bench_quality_to_the_problem(offline, wanted, tmp_path, how):
    """tiny-llada's chat template writes what its prompts look like, so both ways give the same
    text.
    """
    chat = how == "chat template"
    task = write_task(tmp_path, "{{question}}") if chat else write_task(tmp_path)
    flags = ["--apply_chat_template"] * chat
    device = None if chat and not torch.cuda.is_available() else "cpu"
    more = {"show_speed": True, "device": device}
    rows, done = fastdllm_eval(tmp_path, task, "--batch_size", "7", *flags, **more)
    assert ("so the model runs on the CPU" in done.stderr) == (device is None)
    each, together = wanted
    assert [row["exact_match"] for row in rows] == each
    assert 0 < sum(each) < COUNT, "a setting that gets all or none right proves little"
    assert sum(each) / COUNT == together["accuracy"]
    assert "|arithmetic_words|" in done.stdout
    report = next(line for line in done.stderr.splitlines() if "tokens a forward" in line)
    tokens, forwards = round(COUNT * together["text_tokens"]), round(COUNT * together["nfe"])
    assert f"{COUNT} answers, {tokens} tokens" in report and f"{forwards} forwards" in report


@pytest.fixture(scope="module")
def lm(offline):
    return integration.register()(**ARGUMENTS, batch_size=4)


def requests(*pairs):
    from lm_eval.api.instance import Instance

    return [Instance("generate_until", {}, pair, i) for i, pair in enumerate(pairs)]


def prompts(count):
    return [f"Question: {make_problem(index, 'test').question} Answer:" for index in range(count)]


def test_registered_once_and_found_by_name(offline):
    from lm_eval.api.model import LM
    from lm_eval.api.registry import get_model

    assert integration.register() is integration.register() is get_model("fastdllm")
    assert issubclass(get_model("fastdllm"), LM)


def test_stop_strings_cut_at_the_first(lm):
    (prompt,) = prompts(1)
    whole, a, b, none = lm.generate_until(
        requests(
            (prompt, {"until": []}),
            (prompt, {"until": ["####", "\n"]}),
            (prompt, {"until": "####"}),
            (prompt, {}),
        ),
        disable_tqdm=True,
    )
    assert "####" in whole and whole == none and not whole.endswith("<|endoftext|>")
    assert a == whole[: whole.index("\n")] and b == whole[: whole.index("####")]


def test_answers_keep_the_order_of_the_requests_whatever_the_batches(lm):
    questions = prompts(5)
    settings = [{"until": []}, {"until": ["\n"]}]
    pairs = [(question, settings[i % 2]) for i, question in enumerate(questions)]
    together = lm.generate_until(requests(*pairs), disable_tqdm=True)
    alone = [lm.generate_until(requests(pair), disable_tqdm=True)[0] for pair in pairs]
    assert together == alone and len(set(alone)) == 5


def test_gen_length_of_the_task_counts_where_none_is_given(lm, monkeypatch):
    monkeypatch.setattr(lm.options, "gen_length", None)
    monkeypatch.setattr(lm.options, "block_length", 8)
    before = lm.speed["tokens"]
    lm.generate_until(
        requests((prompts(1)[0], {"until": [], "max_gen_toks": 8})), disable_tqdm=True
    )
    assert lm.speed["tokens"] - before <= 8


def test_sampling_is_reproducible_and_only_when_asked_for(lm):
    pair = (prompts(1)[0], {"until": [], "do_sample": True, "temperature": 9.0})
    greedy = (pair[0], {"until": [], "do_sample": False, "temperature": 9.0})
    a, b = (lm.generate_until(requests(pair, greedy), disable_tqdm=True) for _ in range(2))
    assert (
        a == b and a[0] != a[1] == lm.generate_until(requests((pair[0], {})), disable_tqdm=True)[0]
    )


@pytest.fixture
def limited(lm, monkeypatch):
    """The model with room for 116 positions, 96 of them to generate, and what it computes."""
    monkeypatch.setattr(lm, "max_length", 116)
    monkeypatch.setattr(lm.options, "gen_length", 96)
    seen = []
    real = fastdllm.generate

    def spy(model, prompts, **options):
        seen.extend(prompts)
        return real(model, prompts, **options)

    monkeypatch.setattr(fastdllm, "generate", spy)
    return lm, seen


def test_a_prompt_is_cut_with_a_word(limited, caplog):
    lm, seen = limited
    (prompt,) = prompts(1)
    ids = lm.tok_encode(prompt)
    lm.generate_until(requests((prompt, {}), ("", {})), disable_tqdm=True)
    assert seen == [ids[-20:], [lm.prefix_token_id]]
    lost = f"{len(ids) - 20} of {len(ids) + 1} tokens"
    assert f"max_length 116: 1 of 2 prompts lose their beginning, {lost}" in caplog.text
    caplog.clear()
    lm.max_length = len(ids) + 96
    lm.generate_until(requests((prompt, {})), disable_tqdm=True)
    assert seen[-1] == ids and not caplog.records


def test_no_room_for_a_prompt_is_an_error(limited):
    lm, seen = limited
    for lm.max_length in (60, 96):
        with pytest.raises(ValueError, match="max_length: expected room .* 96 tokens"):
            lm.generate_until(requests((prompts(1)[0], {})), disable_tqdm=True)
    assert seen == []


def test_a_limit_past_the_model_is_said(offline, caplog):
    lm = integration.register()(**ARGUMENTS, max_length=10**6)
    assert lm.max_length == lm.model.config.max_positions
    assert "max_length: 1000000 is more than" in caplog.text


def test_text_that_is_none_is_refused(lm):
    with pytest.raises(ValueError, match="expected text, got the byte 0xff at character 1"):
        lm.generate_until(requests(("a\udcff", {})), disable_tqdm=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
def test_the_default_device_of_lm_eval_is_no_wish(offline, caplog):
    made = integration.register()
    given = {name: value for name, value in ARGUMENTS.items() if name != "device"}
    written = ",".join(f"{name}={value}" for name, value in given.items())
    for make, arguments in (
        (made.create_from_arg_obj, given),
        (made.create_from_arg_string, written),
    ):
        lm = make(arguments, {"device": "cuda:0", "batch_size": "3"})
        assert lm.device.type == "cpu" and lm.options.batch_size == 3
        assert "no GPU, so the model runs on the CPU" in caplog.text
        caplog.clear()
    made.create_from_arg_obj(ARGUMENTS, {"device": "cuda:0"})
    assert not caplog.records, "a device among the arguments goes first"
    with pytest.raises(ValueError, match="device: expected cpu"):
        made.create_from_arg_obj(ARGUMENTS | {"device": "cuda:0"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
@pytest.mark.parametrize("flag", [["--device", "cuda:0"], ["--device=cuda"], ["--dev", "cuda"]])
def test_a_device_that_is_asked_for_and_not_there_is_an_error(offline, flag):
    with pytest.raises(ValueError, match="--device: expected cpu, since torch sees no GPU"):
        integration.main("no_such_task", flag)


def test_the_answers_are_only_ever_appended_to(tmp_path):
    """Whenever a run is killed, the file holds all that it held before."""
    options = read_options({"pretrained": "x", "resume": tmp_path})
    file = tmp_path / "answers.jsonl"
    store = integration.Store(options)
    for index in range(3):
        store.add(f"key {index}", f"answer\n{index}")
    whole = file.read_bytes()
    keys = dict(store.found)
    for length in range(len(whole) + 1):
        file.write_bytes(whole[:length])
        again = integration.Store(options)
        assert file.read_bytes() == whole[:length], "reading changes nothing"
        assert again.found.items() <= keys.items()
        assert len(again.found) >= whole[:length].count(b"\n")
        again.add("new", "answer")
        assert file.read_bytes().startswith(whole[:length])
        last = integration.Store(options)
        assert last.found == again.found


def test_draws_are_the_request_s_own_whatever_was_found(offline, tmp_path):
    settings = {"until": [], "do_sample": True, "temperature": 2.0}
    pairs = [(prompt, settings) for prompt in prompts(5)]

    def run(folder, pairs):
        made = integration.register()(**ARGUMENTS, batch_size=5, resume=str(folder))
        return made.generate_until(requests(*pairs), disable_tqdm=True)

    wanted = run(tmp_path / "whole", pairs)
    lines = (tmp_path / "whole" / "answers.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "answers.jsonl").write_text("".join(lines[1:3]))
    assert run(tmp_path / "part", pairs) == wanted


def test_a_run_goes_on_where_it_stopped(offline, tmp_path):
    pairs = [(prompt, {"until": []}) for prompt in prompts(4)]
    pairs.append(pairs[0])

    def run(**more):
        made = integration.register()(
            **ARGUMENTS | more, batch_size=2, save_dir=str(tmp_path / "answers")
        )
        return made.generate_until(requests(*pairs), disable_tqdm=True), made.speed["answers"]

    answers, generated = run()
    assert generated == 5 and answers[4] == answers[0]
    assert run() == (answers, 0)
    file = tmp_path / "answers" / "answers.jsonl"
    text = file.read_text()
    file.write_text(text[: text.index("\n", len(text) // 2) + 9])  # killed in the middle of a line
    again, generated = run()
    assert again == answers and 0 < generated < 5
    assert run() == (answers, 0)
    assert run(threshold=0.9)[1] == 5, "other settings are another run"


def test_the_tokenizer_decides_on_chat(lm, monkeypatch):
    chat = [{"role": "user", "content": "How many?"}]
    assert lm.apply_chat_template(chat) == "Question: How many? Answer:"
    monkeypatch.setattr(lm.tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="no chat template"):
        lm.apply_chat_template(chat)


def test_loglikelihood_prefers_what_is_right(lm):
    from lm_eval.api.instance import Instance

    (prompt,) = prompts(1)
    answer = " " + make_problem(0, "test").answer_text
    wrong = answer[:-1] + str((int(answer[-1]) + 1) % 10)
    made = [
        Instance("loglikelihood", {}, (prompt, text), i) for i, text in enumerate((answer, wrong))
    ]
    (right, greedy), (other, _) = lm.loglikelihood(made, disable_tqdm=True)
    assert right > other + 1 and greedy in (True, False)
    rolling = lm.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (prompt,), 0)], disable_tqdm=True
    )
    assert len(rolling) == 1 and rolling[0] < 0


def test_a_wrong_mask_id_is_refused(offline):
    with pytest.raises(ValueError, match="mask_id"):
        integration.register()(**ARGUMENTS, mask_id=126336)


def test_without_lm_eval_the_command_says_so(tmp_path):
    code = (
        "import sys; sys.modules['lm_eval'] = None; "
        "from fastdllm.cli import main; sys.exit(main(['eval', 'gsm8k']))"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert (
        done.returncode == 1
        and "pip install lm-eval" in done.stderr
        and len(done.stderr.splitlines()) == 1
    )


def test_importing_the_file_imports_no_lm_eval():
    code = (
        "import sys, fastdllm.integrations.lm_eval; "
        "print('lm_eval' in sys.modules, 'transformers' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["False", "False"], done.stderr
