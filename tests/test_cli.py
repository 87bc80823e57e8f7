"""cli.py and display.py: what a user types, and what comes back on which stream with which exit
code.
"""

import io
import json
import os
import re
import shutil
import signal
import string
import subprocess
import sys
import time
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastdllm
from fastdllm import checkpoint, cli, display, text
from fastdllm.config import ModelConfig
from fastdllm.model import DiffusionTransformer, initialize

ROOT = Path(__file__).parents[1]
MASK_ID, STOP_ID = 0, 1
LETTERS = sorted(set(string.printable) - set("\r\x0b\x0c"))
CHAT = (
    "{% for message in messages %}<{{ message.content }}>{% endfor %}"
    "{% if add_generation_prompt %}:{% endif %}"
)
SUMMARY = re.compile(
    r"(\d+) tokens, (\d+) forwards \((\d+) refresh \+ (\d+) cached\), "
    r"[\d.]+ tokens per forward, [\d.]+ tokens per second"
)
ANSI = "\x1b["


def write_tokenizer(folder, **settings):
    """One token a character, as tokenizer.json that transformers' AutoTokenizer loads."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {piece: i for i, piece in enumerate(["<mask>", "<end>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?m)."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<mask>", "<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<end>",
        "mask_token": "<mask>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random LLaDA of two layers with a tokenizer of characters."""
    config = ModelConfig(
        family="llada",
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        intermediate_size=48,
        vocab_size=len(LETTERS) + 2,
        max_positions=320,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        mask_id=MASK_ID,
        stop_ids=(STOP_ID,),
        qkv_bias=False,
        tie_embeddings=False,
        logit_shift=0,
        rope_in_fp32=True,
    )
    folder = tmp_path_factory.mktemp("models") / "random"
    checkpoint.save(initialize(DiffusionTransformer(config), seed=3, std=0.4), folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def chat_folder(folder):
    """The same model with a chat template."""
    copy = shutil.copytree(folder, folder.with_name("chat"))
    write_tokenizer(copy, chat_template=CHAT)
    return copy


@pytest.fixture
def call(folder, capsys, monkeypatch):
    """call("generate", ..., stdin=text) -> (exit code, stdout, stderr) of the random model on a
    short canvas.
    """
    monkeypatch.delenv("NO_COLOR", raising=False)

    def call(command, *words, stdin="", stdout=None):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        monkeypatch.setattr(sys, "stdout", stdout or sys.stdout)
        if command == "generate":
            defaults = {
                "--model": folder,
                "--device": "cpu",
                "--gen-length": 12,
                "--block-length": 6,
            }
            words += tuple(
                str(x) for pair in defaults.items() if pair[0] not in words for x in pair
            )
        return (cli.main([command, *map(str, words)]), *capsys.readouterr())

    return call


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 60 columns, for call's stdout."""
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    return screen


def written(*words, call):
    code, out, _ = call("generate", *words, "--json")
    assert code == 0
    return json.loads(out)


BAD_CALLS = [
    ([], "COMMAND"),
    (["decode", "hi"], "decode"),
    (["generate", "hi", "--gen-length", "0"], "--gen-length: expected an integer >= 1, got '0'"),
    (["generate", "hi", "--gen-length", "ten"], "--gen-length"),
    (["generate", "hi", "--block-length", "-4"], "--block-length"),
    (["generate", "hi", "--threshold", "-0.1"], "--threshold: expected a number >= 0, got '-0.1'"),
    (["generate", "hi", "--threshold", "nan"], "--threshold"),
    (["generate", "hi", "--factor", "0"], "--factor: expected a number > 0"),
    (["generate", "hi", "--factor", "inf"], "--factor"),
    (["generate", "hi", "--threshold", "1e400"], "float32 holds, got '1e400'"),
    (["generate", "hi", "--factor", "1e-60"], "float32 holds, got '1e-60'"),
    (["generate", "hi", "--steps", "99999999999999999999"], "got '99999999999999999999'"),
    (["generate", "hi", "--steps", "2.5"], "--steps"),
    (["generate", "hi", "--rule", "Threshold(0.9)", "--steps", "2"], "argument --rule"),
    (["generate", "hi", "--rule", "Nothing(0.9)"], "rule: expected Threshold, Factor, Quota"),
    (["generate", "hi", "--rule", "Quota(0)"], "rule: Quota.steps"),
    (["generate", "hi", "--rule", "Quota(4, plan=1)"], "plan"),
    (["generate", "hi", "--rule", "Quota(open('x'))"], "rule: expected numbers and texts"),
    (["generate", "hi", "--rule", "Quota(4)(5)"], "rule: expected numbers and texts"),
    (["generate", "hi", "--rule", "no.such.module:rule"], "no.such.module"),
    (["generate", "hi", "--rule", "os.path:nothing"], "os.path:nothing"),
    (["generate", "hi", "--rule", "a b"], "rule: expected a rule such as"),
    (["generate", "h\udcff"], "PROMPT: expected text, got the byte 0xff at character 1"),
    (["generate", "hi", "--steps", "0"], "--steps"),
    (
        ["generate", "hi", "--threshold", "0.5", "--factor", "1"],
        "not allowed with argument --threshold",
    ),
    (["generate", "hi", "--factor", "1", "--steps", "2"], "not allowed with argument --factor"),
    (["generate", "hi", "--temperature", "-1"], "--temperature"),
    (["generate", "hi", "--top-p", "1.5"], "--top-p: expected a number in (0, 1]"),
    (["generate", "hi", "--top-k", "-2"], "--top-k: expected an integer >= 1, or 0 or -1"),
    (["generate", "hi", "--seed", "1.5"], "--seed: expected an integer"),
    (["generate", "hi", "--cache", "full"], "--cache: invalid choice: 'full'"),
    (["generate", "hi", "--dtype", "int8"], "bfloat16"),
    (["generate", "hi", "--device", "tpu"], "--device: expected cpu, cuda or cuda:N, got 'tpu'"),
    (["generate", "hi", "--device", "cuda:99"], "--device: expected c"),
    (["generate", "hi", "--device", "cpu:1"], "--device"),
    (["generate", "hi", "--thresh", "0.5"], "--thresh"),
    (["generate", "one", "two"], "two"),
    (["generate", "hi", "--demo"], "leave PROMPT out"),
    (["generate", ""], "the prompt is empty"),
    (["generate", " \n"], "the prompt is empty"),
    (["generate"], "the prompt is empty"),
    (["generate", "-"], "the prompt is empty"),
    (["info", "--model", "x"], "--model"),
    (["serve", "--port", "70000"], "--port: expected an integer in [0, 65535], got '70000'"),
    (["serve", "--rows", "0"], "--rows: expected an integer >= 1"),
    (["serve", "--rule", "Nothing(0.9)"], "rule: expected Threshold, Factor, Quota"),
    (["serve", "--api-key-env", "NO_SUCH_KEY"], "got NO_SUCH_KEY, not set"),
    (["serve", "--drain-seconds", "-1"], "--drain-seconds: expected a number >= 0"),
    (["chat", "--positions", "many"], "--positions: expected an integer >= 1"),
    (["chat", "--rule", "Quota(0)"], "rule: Quota.steps"),
    (["batch", "nowhere.jsonl"], "--output"),
    (["batch", "nowhere.jsonl", "--output", os.devnull], "cannot read nowhere.jsonl"),
    (["batch", "x", "--output", os.devnull, "--rule", "Quota(0)"], "rule: Quota.steps"),
    (["batch", "x", "--output", "y", "--workers", "0"], "--workers: expected an integer >= 1"),
]


def assert_one_line(err, says):
    assert err.startswith("fastdllm: error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert says in err


@pytest.mark.parametrize(("argv", "says"), BAD_CALLS, ids=lambda value: " ".join(value)[:60])
def test_a_wrong_call_is_one_line_and_exit_code_2(argv, says, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    monkeypatch.setattr(
        checkpoint, "load", lambda *_, **__: pytest.fail("the call should be refused before")
    )
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert_one_line(err, says)


def test_what_generate_refuses_is_a_wrong_call(call):
    code, out, err = call("generate", "hi", "--gen-length", 5000)
    assert (code, out) == (2, "")
    assert_one_line(err, "5002")


def test_nan_in_the_logits_is_a_failure_and_not_a_wrong_call(call, monkeypatch):
    monkeypatch.setattr(
        DiffusionTransformer, "head", lambda self, hidden: self.lm_head(hidden) * float("nan")
    )
    code, out, err = call("generate", "hi")
    assert (code, out) == (1, "")
    assert_one_line(err, "NaN")


def test_no_prompt_at_a_terminal_does_not_wait_for_one(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert cli.main(["generate"]) == 2
    assert_one_line(capsys.readouterr().err, "no prompt")


def test_undecodable_standard_input_is_a_wrong_call(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    assert cli.main(["generate", "-"]) == 2
    assert_one_line(capsys.readouterr().err, "standard input is not text")


def test_bytes_that_the_locale_let_pass_are_a_wrong_call(capsys, monkeypatch):
    piped = io.TextIOWrapper(io.BytesIO(b"h\xff"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", piped)
    assert cli.main(["generate"]) == 2
    assert_one_line(capsys.readouterr().err, "expected text, got the byte 0xff at character 1")


def test_a_prompt_without_a_token_is_a_wrong_call(call, monkeypatch):
    monkeypatch.setattr(text.TextModel, "tokens", lambda *_, **__: [])
    code, _, err = call("generate", "hi")
    assert code == 2
    assert_one_line(err, "the prompt has no tokens")


def broken(folder, how):
    """A model folder that cannot be loaded."""
    if how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    elif how == "truncated weights":
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    elif how == "no weights":
        (folder / "model.safetensors").unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "config of another model":
        (folder / "config.json").write_text('{"model_type": "gpt2"}')
    elif how == "config that is no JSON":
        (folder / "config.json").write_text("{")
    elif how == "a file":
        return folder / "config.json"
    elif how == "nothing there":
        return folder / "nowhere"
    return folder


@pytest.mark.parametrize(
    "how",
    [
        "nothing there",
        "a file",
        "no config",
        "config of another model",
        "config that is no JSON",
        "no weights",
        "truncated weights",
        "no tokenizer",
    ],
)
def test_a_model_that_cannot_be_loaded_is_one_line_and_exit_code_1(how, folder, tmp_path, call):
    model = broken(shutil.copytree(folder, tmp_path / "model"), how)
    code, out, err = call("generate", "hi", "--model", model)
    assert (code, out) == (1, "")
    assert_one_line(err, f"cannot load {model}: ")


def test_a_backend_that_does_not_exist_is_one_line(call, monkeypatch):
    monkeypatch.setenv("FASTDLLM_BACKEND", "cuda")
    code, out, err = call("info")
    assert (code, out) == (1, "")
    assert_one_line(err, "FASTDLLM_BACKEND must be")


def test_debug_shows_the_traceback_above_the_line(call):
    code, _, err = call("generate", "hi", "--model", "./nowhere", "--debug")
    assert code == 1
    assert err.startswith("Traceback") and err.splitlines()[-1].startswith(
        "fastdllm: error: cannot load ./nowhere"
    )


def test_help_is_no_error(capsys):
    assert cli.main(["generate", "--help"]) == 0
    out, err = capsys.readouterr()
    assert "--block-length" in out and err == ""


def test_an_interrupt_is_quiet(call, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(fastdllm, "generate", interrupted)
    assert call("generate", "hi") == (130, "", "")


def test_a_reader_that_leaves_is_no_error(capsys, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["info"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("closed", ["stdout", "stderr"])
@pytest.mark.parametrize("command", ["info", "generate"])
def test_a_closed_stream_is_no_error(command, closed, call, monkeypatch):
    monkeypatch.setattr(sys, closed, None)
    words = ["hi"] if command == "generate" else []
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert cli.main([command, *words]) == 0
    assert cli.main([command, "--nonsense"]) == 2
    assert getattr(sys, closed) is None


def in_a_process(*words, **options):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command = [sys.executable, "-m", "fastdllm", *words]
    environment |= options.pop("env", {})

    def heed_interrupts():  # a shell starts what runs in its background deaf to them
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    return subprocess.Popen(
        command, cwd=ROOT, env=environment, preexec_fn=heed_interrupts, **options
    )


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_while_torch_is_imported_leaves_no_traceback(number, code):
    process = in_a_process("info", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    loaded = Path(f"/proc/{process.pid}/maps")
    if not loaded.exists():
        pytest.skip("only Linux tells what a process has loaded")
    while "libtorch" not in loaded.read_text():
        time.sleep(0.01)
    process.send_signal(number)
    assert process.communicate(timeout=60) == (b"", b"") and process.returncode == code


def test_importing_the_package_imports_no_torch():
    code = "import sys, fastdllm; print('torch' in sys.modules, fastdllm.generate.__name__)"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["False", "generate"], done.stderr


# A rule that takes long, and decides last where the text ends.
LAST_FIRST = """
import time

def last_first(scores, candidates, step):
    time.sleep(0.1)
    return candidates & (candidates.cumsum(1) == candidates.sum(1, keepdim=True))
"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_in_mid_run_gives_the_cursor_back(number, code, tmp_path):
    pty = pytest.importorskip("pty")
    screen, terminal = pty.openpty()
    (tmp_path / "slow.py").write_text(LAST_FIRST)
    words = ["generate", "hi", "--device", "cpu", "--rule", "slow:last_first"]
    environment = {
        "TERM": "xterm-256color",
        "COLUMNS": "60",
        "NO_COLOR": "",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", tmp_path))),
    }
    process = in_a_process(*words, stdout=terminal, stderr=subprocess.PIPE, env=environment)
    os.close(terminal)
    shown = b""
    while b"cached" not in shown:  # a step's frame
        shown += os.read(screen, 4096)
    assert b"\x1b[?25l" in shown, "the cursor is hidden while frames are drawn"
    process.send_signal(number)
    with suppress(OSError):  # the terminal is gone with the process
        while more := os.read(screen, 4096):
            shown += more
    assert process.wait(60) == code and process.stderr.read() == b""
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")


def test_plain_text_is_the_answer_and_one_summary_line(call):
    code, out, err = call("generate", "one and two", "--threshold", 0)
    assert (code, err) == (0, "") and ANSI not in out and display.MASK not in out
    run = written("one and two", "--threshold", 0, call=call)
    answer, summary = out.rstrip("\n").rsplit("\n", 1)
    assert answer == run["text"] and len(answer) == 12
    # A threshold of 0 commits a whole block in its refresh.
    assert SUMMARY.fullmatch(summary).groups() == ("12", "2", "2", "0")


def test_json_is_one_object_with_every_number(call):
    code, out, err = call("generate", "one", "--cache", "prefix", "--steps", 3, "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    run = json.loads(out)
    assert run["prompt"] == "one" and run["setting"] == "Fast-dLLM: cache prefix, 3 steps a block"
    assert len(run["text"]) == run["tokens"] == 12
    assert (run["forwards"], run["refreshes"], run["cached_steps"]) == (6, 2, 4)
    assert run["tokens_per_forward"] == 2 and run["tokens_per_second"] == pytest.approx(
        12 / run["seconds"]
    )
    assert set(run) == {
        "prompt",
        "model",
        "setting",
        "text",
        "tokens",
        "forwards",
        "refreshes",
        "cached_steps",
        "tokens_per_forward",
        "tokens_per_second",
        "seconds",
    }


def share(part):
    """A rule that commits this part of the candidates, the surest first."""

    def commit(scores, candidates, step):
        count = (candidates.sum(1, keepdim=True) * part).clamp(min=1)
        order = scores.masked_fill(~candidates, -1).argsort(1, descending=True)
        return candidates & (order.argsort(1) < count)

    return commit


half = share(0.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "cache dual, threshold 0.9"),
        (("--factor", 1.5, "--cache", "none"), "cache none, factor 1.5"),
        (("--steps", 2), "cache dual, 2 steps a block"),
        (("--rule", "Quota(2, schedule='dream')"), "cache dual, Quota(2, schedule='dream')"),
        (("--rule", "Threshold"), "cache dual, Threshold"),
        (("--rule", "EntropyBound(gamma=0.5)"), "cache dual, EntropyBound(gamma=0.5)"),
        (("--rule", "Neighbours(0.8, 0.5)"), "cache dual, Neighbours(0.8, 0.5)"),
        (("--rule", "test_cli:half"), "cache dual, test_cli:half"),
        (("--rule", "test_cli:share(0.5)"), "cache dual, test_cli:share(0.5)"),
    ],
)
def test_options_reach_generate(options, words, call, monkeypatch):
    seen = {}
    real = fastdllm.generate

    def spy(model, prompts, **options):
        seen.update(options, prompts=prompts, dtype=model.dtype)
        return real(model, prompts, **options)

    monkeypatch.setattr(fastdllm, "generate", spy)
    more = ("--temperature", 0.5, "--top-p", 0.8, "--top-k", 20, "--seed", 4, "--dtype", "float32")
    assert written("hi", *options, *more, call=call)["setting"] == f"Fast-dLLM: {words}"
    assert seen["gen_length"] == 12 and seen["block_length"] == 6 and seen["dtype"] == torch.float32
    assert (seen["temperature"], seen["top_p"], seen["top_k"], seen["seed"]) == (0.5, 0.8, 20, 4)
    kind = type(seen["rule"]).__name__.lower()
    assert kind in words.lower().replace("steps", "quota").replace("test_cli", "function")
    assert (
        seen["prompts"] == [[2 + LETTERS.index(letter) for letter in "hi"]]
        and seen["on_step"] is None
    )


@pytest.mark.parametrize("top_k", [0, -1])
def test_a_top_k_of_0_or_below_is_off(top_k, call):
    options = ("hi", "--temperature", 1.0, "--seed", 3)
    filtered = written(*options, "--top-k", top_k, call=call)
    assert filtered["text"] == written(*options, call=call)["text"]
    assert filtered["text"] != written(*options, "--top-k", 1, call=call)["text"]


@pytest.mark.parametrize(
    ("word", "dtype"),
    [
        ("auto", torch.float32),
        ("fp32", torch.float32),
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("fp16", torch.float16),
        ("half", torch.float16),
    ],
)
def test_the_words_for_a_dtype(word, dtype, folder):
    """The folder holds float32, which auto takes."""
    assert text.load(str(folder), "cpu", word).model.dtype == dtype


def test_auto_is_the_stored_dtype(folder, tmp_path):
    half = text.load(str(folder), "cpu", "fp16")
    copy = shutil.copytree(folder, tmp_path / "half")
    checkpoint.save(half.model, copy)
    assert text.load(str(copy), "cpu", "auto").model.dtype == torch.float16
    assert text.load(str(copy), "cpu").model.dtype == torch.float32


def test_tokens_after_the_first_end_of_text_do_not_count(call, monkeypatch):
    ids = [2 + LETTERS.index(letter) for letter in "hi 42"]
    tokens = torch.tensor(ids + [STOP_ID, ids[0], STOP_ID])
    generation = SimpleNamespace(
        tokens=[tokens],
        prompt_lengths=[2],
        refreshes=torch.tensor([1]),
        cached_steps=torch.tensor([1]),
        seconds=0.5,
    )
    monkeypatch.setattr(fastdllm, "generate", lambda *_, **__: generation)
    run = written("hi", call=call)
    assert (run["text"], run["tokens"], run["tokens_per_forward"], run["tokens_per_second"]) == (
        " 42",
        3,
        1.5,
        6,
    )


def test_the_prompt_may_come_from_standard_input(call):
    wanted = written("two\nlines", call=call)["text"]
    for words in ((), ("-",)):
        code, out, _ = call("generate", *words, "--json", stdin="two\nlines\n")
        assert (
            code == 0
            and json.loads(out)["prompt"] == "two\nlines"
            and json.loads(out)["text"] == wanted
        )


def test_a_seed_fixes_the_sampled_text(call):
    options = ("hi", "--temperature", 1.5, "--threshold", 0)
    texts = [written(*options, "--seed", seed, call=call)["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_compare_shows_vanilla_first_and_ends_in_one_line(call):
    code, out, err = call("generate", "one", "--compare", "--threshold", 0)
    assert (code, err) == (0, "")
    vanilla, fast = SUMMARY.findall(out)
    assert vanilla == ("12", "12", "12", "0") and fast == ("12", "2", "2", "0")
    assert out.index("vanilla: cache none, one token a step") < out.index(
        "Fast-dLLM: cache dual, threshold 0"
    )
    assert re.search(
        r"\n(same|different) [\w ,]+, 6\.0x fewer forwards, [\d.]+x (faster|slower)\n", out
    )


def test_compare_as_json(call):
    run = written("one", "--compare", "--cache", "none", "--steps", 6, call=call)
    assert run["same_text"] is True and run["vanilla"]["text"] == run["text"]
    assert (
        run["fewer_forwards"] == 1 and run["faster"] == run["vanilla"]["seconds"] / run["seconds"]
    )


@pytest.mark.parametrize(
    ("vanilla", "fast", "line"),
    [
        (
            ("#### 1,200", 8, 2.0),
            ("#### 1,200", 2, 4.0),
            "same answer, 4.0x fewer forwards, 2.0x slower",
        ),
        (
            ("so 1,200", 2, 3.0),
            ("#### 1200.", 4, 2.0),
            "same final number, other words, 2.0x more forwards, 1.5x faster",
        ),
        (
            ("#### 12", 2, 1.0),
            ("#### -12", 2, 1.0),
            "different answer, 1.0x fewer forwards, 1.0x faster",
        ),
        (("yes", 2, 1.0), ("no", 2, 1.0), "different answer, 1.0x fewer forwards, 1.0x faster"),
    ],
)
def test_the_comparison_line(vanilla, fast, line):
    runs = [dict(zip(("text", "forwards", "seconds"), run, strict=True)) for run in (vanilla, fast)]
    assert display.comparison(display.compared(*runs)) == line


def test_the_chat_template_is_applied_and_raw_turns_it_off(chat_folder, call):
    plain = written("<hi>:", call=call)["text"]
    raw = written("hi", call=call)["text"]
    assert plain != raw
    assert written("hi", "--model", chat_folder, call=call)["text"] == plain
    assert written("hi", "--model", chat_folder, "--raw", call=call)["text"] == raw


def test_a_tokenizer_published_as_code_is_read_and_never_run(tmp_path):
    from tokenizers import ByteLevelBPETokenizer

    byte_level = ByteLevelBPETokenizer()
    byte_level.train_from_iterator(["two plus two"], vocab_size=270)
    byte_level.save_model(str(tmp_path))
    mask = {
        "content": "<|mask|>",
        "special": True,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }
    mask["single_word"] = False
    settings = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {str(byte_level.get_vocab_size()): mask},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(
        '{"model_type": "Dream", "auto_map": {"AutoConfig": "code.Config"}}'
    )
    (tmp_path / "tokenization_dream.py").write_text("raise SystemExit('the code ran')")
    tokenizer = text.load_tokenizer(str(tmp_path), "Dream")
    ids = tokenizer("two plus<|mask|>").input_ids
    assert ids == [*byte_level.encode("two plus").ids, byte_level.get_vocab_size()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "two plus"


def test_a_stream_that_cannot_write_a_letter_shows_its_escape(call):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    code, _, err = call("generate", "h\u00e9", "--compare", stdout=narrow)
    assert (code, err) == (0, "")
    assert narrow.buffer.getvalue().startswith(rb"h\xe9")


def test_a_terminal_gets_coloured_frames_then_the_text(terminal, call):
    code, _, err = call("generate", "one", "--steps", 3, stdout=terminal)
    assert (code, err) == (0, "")
    shown = terminal.getvalue()
    assert ANSI in shown and display.MASK in shown and "forward 1 (refresh)" in shown
    assert SUMMARY.search(re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown).replace("\n", " "))


@pytest.mark.parametrize("switch", ["--no-color", "NO_COLOR", "--json"])
def test_a_terminal_without_colour_gets_plain_text(switch, terminal, call, monkeypatch):
    if switch == "NO_COLOR":
        monkeypatch.setenv("NO_COLOR", "1")
    code, _, _ = call(
        "generate", "one", *([switch] if switch.startswith("-") else []), stdout=terminal
    )
    shown = terminal.getvalue()
    assert code == 0 and "12" in shown and ANSI not in shown and display.MASK not in shown


def test_frames_follow_what_is_committed():
    from rich.console import Console

    screen = io.StringIO()
    view = display.View(
        Console(file=screen, force_terminal=True, width=60, color_system="standard")
    )
    tokenizer = SimpleNamespace(decode=lambda ids: "".join("?$ab"[i] for i in ids))
    with view.frames(tokenizer, prompt_length=3, gen_length=4, stop_ids=(1,)) as frames:
        assert frames.render().plain == display.MASK * 4 + "\nforward 0"
        step = SimpleNamespace(
            step=0,
            kind="refresh",
            positions=torch.tensor([4, 5]),
            token_ids=torch.tensor([3, 1]),
            scores=torch.tensor([0.95, 0.2]),
        )
        frames.on_step(step)
        assert (
            frames.render().plain
            == f"{display.MASK}b{display.STOP}{display.MASK}\nforward 1 (refresh)"
        )
        assert "\x1b[1;32mb" in screen.getvalue()  # just committed: bold; sure: green
        step.step, step.kind, step.positions, step.token_ids = (
            1,
            "cached",
            torch.tensor([3]),
            torch.tensor([2]),
        )
        step.scores = torch.tensor([0.3])
        frames.on_step(step)
    assert frames.text().plain == "ab" and frames.seconds > 0
    screen.truncate(0)
    view.answer("ab", frames)
    assert screen.getvalue().count(ANSI) >= 2
    screen.truncate(0)
    view.answer("ab, decoded [bold]otherwise[/bold] :smile:", frames)
    assert "ab, decoded [bold]otherwise[/bold] :smile:" in screen.getvalue()


@pytest.mark.parametrize(
    ("score", "colour"),
    [
        (1.0, "green"),
        (0.9, "green"),
        (0.89, "yellow"),
        (0.5, "dark_orange"),
        (0.1, "red"),
        (float("nan"), "red"),
    ],
)
def test_colours_follow_the_score(score, colour):
    assert display.colour_of(score) == colour


def test_the_demo_runs_every_embedded_problem(call):
    code, out, err = call("generate", "--demo", "--threshold", 0, "--json")
    assert (code, err) == (0, "")
    prompts = [json.loads(line)["prompt"] for line in out.splitlines()]
    assert len(prompts) == 3 and all(re.fullmatch(r"\S.*\?", prompt) for prompt in prompts)


def test_the_demo_problems_are_test_problems(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from tiny_models.problems import make_problem

    asked = {make_problem(i, "test").question for i in range(100)}
    assert set((text.ASSETS / "demo.txt").read_text().rstrip("\n").split("\n---\n")) <= asked


def test_info_for_people_and_for_programs(call):
    code, out, err = call("info")
    assert (code, err) == (0, "")
    lines = dict(re.split(r"\s+", line, maxsplit=1) for line in out.splitlines())
    code, out, _ = call("info", "--json")
    facts = json.loads(out)
    # As it is installed, which may leave out the build that __version__ names.
    assert code == 0 and lines["torch"] == facts["versions"]["torch"] == metadata.version("torch")
    assert lines["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert lines["fastdllm"] == fastdllm.__version__ and lines["backend"] == facts["backend"]
    assert {"Dream", "llada"} <= set(facts["families"]) and lines["families"] == ", ".join(
        facts["families"]
    )
    if not torch.cuda.is_available():
        assert facts["device"] == "CPU" and facts["backend"].startswith("reference (")


def test_python_m_fastdllm():
    done = subprocess.run(
        [sys.executable, "-m", "fastdllm", "info", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "torch" in json.loads(done.stdout)["versions"]
