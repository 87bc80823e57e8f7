"""The command line: `fastdllm generate`, `fastdllm eval` and `fastdllm info`.

Exit codes: 0; 1 when something fails (a model that cannot be loaded); 2 when the call is wrong; 130
when interrupted. An error is one line on standard error, with a traceback only under --debug.
"""

import argparse
import json
import os
import platform
import sys
import traceback
from collections import namedtuple
from contextlib import suppress
from importlib import metadata
from itertools import takewhile
from pathlib import Path

import torch

import fastdllm
from fastdllm_kernels import backend

from . import display
from .arguments import CACHES
from .families import FAMILIES

ASSETS = Path(__file__).parent / "assets"
EMBEDDED = ("tiny-llada", "tiny-dream")
Setting = namedtuple("Setting", "cache rule words")  # how to decode, and the same for people


class UsageError(Exception):
    """The call is wrong: exit code 2."""


def main(argv=None) -> int:
    """Run the command line on `argv` (default: the process's arguments); returns the exit code."""
    args = argparse.Namespace(debug=False)
    with suppress(
        AttributeError
    ):  # a stream that cannot write some letter (or a mask) shows its escape instead
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _parser().parse_args(argv, namespace=args)
        args.command(args)
        sys.stdout.flush()
        return 0
    except SystemExit as end:  # --help has printed what there is to say
        return end.code
    except KeyboardInterrupt:
        return 130
    except (
        BrokenPipeError
    ):  # the reader has enough; keep the interpreter from flushing into the closed pipe
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        print(f"fastdllm: error: {_described(error)}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def generate(args):
    """Decode the prompts and show each run; with --compare, a vanilla run of each before."""
    setting = _setting(args)
    vanilla = Setting(
        "none", fastdllm.Quota(args.block_length), "vanilla: cache none, one token a step"
    )
    prompts = _prompts(args)
    model, tokenizer = load(args.model, args.device, args.dtype)
    plain = args.json or args.no_color or os.environ.get("NO_COLOR") or not sys.stdout.isatty()
    view = display.View(None if plain else display.terminal(), quiet=args.json)
    encoded = [_encode(tokenizer, prompt, args.raw) for prompt in prompts]
    if args.compare or model.device.type == "cuda":
        # Kernels compile and threads start on their first use: that belongs to no run's time.
        _decode(args, model, encoded[0], Setting(args.cache, fastdllm.Quota(2), "warm-up"))
    for prompt, ids in zip(prompts, encoded, strict=True):
        facts = {"prompt": prompt, "model": args.model, "setting": setting.words}
        if args.compare or len(prompts) > 1:
            view.line(prompt, "bold")
        if args.compare:
            facts["vanilla"] = _run(args, model, tokenizer, view, ids, vanilla)
        facts |= _run(args, model, tokenizer, view, ids, setting)
        if args.compare:
            facts |= display.compared(facts["vanilla"], facts)
            view.line(display.comparison(facts) + "\n", "bold")
        if args.json:
            print(json.dumps(facts), flush=True)


def evaluate(args):
    """Run lm-eval's own command line on a task, with the model "fastdllm" registered."""
    from .integrations import lm_eval

    lm_eval.main(args.task, args.arguments)


def info(args):
    """Print versions, device, backend and families."""
    versions = {"fastdllm": fastdllm.__version__, "python": platform.python_version()}
    for name in ("torch", "triton", "transformers"):
        versions[name] = None
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    facts = {"device": device, "backend": backend.describe(), "families": sorted(FAMILIES)}
    table = versions | facts | {"families": ", ".join(facts["families"])}
    lines = [f"{name:<13} {value or 'not installed'}" for name, value in table.items()]
    print(json.dumps({"versions": versions} | facts) if args.json else "\n".join(lines))


def _parser():
    parser = _Parser(prog="fastdllm", description=fastdllm.__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    about = commands.add_parser(
        "info", help="show versions, device and backend", allow_abbrev=False
    )
    task = commands.add_parser("eval", help="run lm-eval on a task", allow_abbrev=False)
    command = commands.add_parser(
        "generate", help="decode a prompt and show how", allow_abbrev=False
    )
    for parser_of, run in ((about, info), (task, evaluate), (command, generate)):
        parser_of.set_defaults(command=run)
        parser_of.add_argument(
            "--debug", action="store_true", help="show the traceback of an error"
        )
        if run is not evaluate:
            parser_of.add_argument(
                "--json",
                action="store_true",
                help="print JSON objects and nothing else, one a prompt",
            )
    task.add_argument(
        "task", metavar="TASK", help="a task of lm-eval, several with commas, or a task's YAML file"
    )
    task.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="lm-eval's arguments: --model_args ...",
    )
    at_least_0 = _value(float, lambda value: 0 <= value < float("inf"), "a number >= 0")
    above_0 = _value(float, lambda value: 0 < value < float("inf"), "a number > 0")
    at_least_1 = _value(int, lambda value: value >= 1, "an integer >= 1")
    share = _value(float, lambda value: 0 < value <= 1, "a number in (0, 1]")
    seed = _value(int, lambda value: 0 <= value < 2**63, "an integer in [0, 2**63)")
    add = command.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="the prompt; absent or '-': standard input")
    add("--demo", action="store_true", help="decode the embedded problems")
    add(
        "--model",
        default=EMBEDDED[0],
        help=f"{' or '.join(EMBEDDED)} (embedded), a folder or a hub id (%(default)s)",
    )
    add("--cache", choices=CACHES, default="dual", help="keys and values to reuse (%(default)s)")
    rule = command.add_mutually_exclusive_group()
    rule.add_argument(
        "--threshold", type=at_least_0, default=0.9, help="commit what is this sure (%(default)s)"
    )
    rule.add_argument(
        "--factor", type=above_0, help="commit the n surest with (n + 1)(1 - confidence) <= FACTOR"
    )
    rule.add_argument("--steps", type=at_least_1, help="spread each block over so many steps")
    add("--block-length", type=at_least_1, default=32, help="tokens per block (%(default)s)")
    add("--gen-length", type=at_least_1, default=128, help="tokens to decode (%(default)s)")
    add(
        "--temperature",
        type=at_least_0,
        default=0.0,
        help="0 takes the best token, above samples (%(default)s)",
    )
    add("--top-p", type=share, help="sample from this much of the probability")
    add("--top-k", type=at_least_1, help="sample from so many tokens")
    add("--seed", type=seed, help="of the sampling: same seed, same tokens")
    add(
        "--compare",
        action="store_true",
        help="decode one token a step without a cache first, and compare",
    )
    add(
        "--no-color",
        action="store_true",
        help="plain text, no frames (also: NO_COLOR, or no terminal)",
    )
    add("--raw", action="store_true", help="do not apply the tokenizer's chat template")
    add("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: float32 on a CPU, bfloat16 on a GPU",
    )
    return parser


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message):
        raise UsageError(f"{message} (see {self.prog} --help)")


def _value(kind, accepts, wanted):
    """An argparse type: a `kind` that `accepts` takes, or an error that says what was `wanted`."""

    def parse(text):
        with suppress(ValueError):
            if accepts(kind(text)):
                return kind(text)
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")

    return parse


def _prompts(args):
    if args.demo:
        if args.prompt is not None:
            raise UsageError("--demo brings its own prompts: leave PROMPT out")
        return [
            part.strip("\n")
            for part in (ASSETS / "demo.txt").read_text(encoding="utf-8").split("\n---\n")
        ]
    prompt = args.prompt
    if prompt in (None, "-"):
        if sys.stdin is None or (prompt is None and sys.stdin.isatty()):
            raise UsageError("no prompt: give PROMPT, pipe one in, or try --demo")
        try:
            prompt = sys.stdin.read().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise UsageError(f"standard input is not text: {error}") from error
    if not prompt.strip():
        raise UsageError("the prompt is empty")
    return [prompt]


def _setting(args):
    rule, words = fastdllm.Threshold(args.threshold), f"threshold {args.threshold:g}"
    if args.factor is not None:
        rule, words = fastdllm.Factor(args.factor), f"factor {args.factor:g}"
    if args.steps is not None:
        rule, words = fastdllm.Quota(args.steps), f"{args.steps} steps a block"
    return Setting(args.cache, rule, f"Fast-dLLM: cache {args.cache}, {words}")


def load(name, device=None, dtype=None):
    """The model and its tokenizer, both from `name`: an embedded model, a folder or a hub id."""
    source = str(ASSETS / name) if name in EMBEDDED else name
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"))
    try:
        model = fastdllm.load(source, device=device, dtype=dtype)
        return model, _tokenizer(source, model.config.family)
    except Exception as error:
        raise RuntimeError(f"cannot load {name}: {_described(error)}") from error


def _tokenizer(source, family):
    from transformers import AutoTokenizer, logging

    logging.set_verbosity_error()  # it would warn that it does not know the model's type
    options = {"local_files_only": Path(source).is_dir(), "trust_remote_code": False}
    if family == "Dream" and not (Path(source) / "tokenizer.json").is_file():
        # Dream publishes Qwen2's tokenizer as Python code, which is not run here: the files beside
        # it are Qwen2's.
        options["tokenizer_type"] = "qwen2"
    return AutoTokenizer.from_pretrained(source, **options)


def _encode(tokenizer, prompt, raw):
    if raw or not tokenizer.chat_template:
        return tokenizer(prompt).input_ids
    chat = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids


def _decode(args, model, ids, setting, on_step=None):
    names = ("gen_length", "block_length", "temperature", "top_p", "top_k", "seed")
    options = {name: getattr(args, name) for name in names}
    try:
        return fastdllm.generate(
            model, [ids], cache=setting.cache, rule=setting.rule, on_step=on_step, **options
        )
    except (
        TypeError,
        ValueError,
    ) as error:  # what it refuses came from the command line, but for NaN in the logits
        raise (RuntimeError if str(error).startswith("logits") else UsageError)(
            str(error)
        ) from error


def _run(args, model, tokenizer, view, ids, setting):
    """Decode one prompt in `view` and return what it came to; only tokens before the first
    end-of-text count.
    """
    if args.compare:
        view.line(setting.words, "cyan")
    stop_ids = model.config.stop_ids
    with view.frames(tokenizer, len(ids), args.gen_length, stop_ids) as frames:
        generation = _decode(args, model, ids, setting, frames and frames.on_step)
    written = list(
        takewhile(lambda token: token not in stop_ids, generation.tokens[0][len(ids) :].tolist())
    )
    refreshes, cached_steps = int(generation.refreshes[0]), int(generation.cached_steps[0])
    seconds = generation.seconds - (frames.seconds if frames else 0)
    text, tokens, forwards = (
        tokenizer.decode(written, skip_special_tokens=True),
        len(written),
        refreshes + cached_steps,
    )
    run = {
        "text": text,
        "tokens": tokens,
        "forwards": forwards,
        "refreshes": refreshes,
        "cached_steps": cached_steps,
    }
    run |= {
        "tokens_per_forward": tokens / forwards,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
    }
    view.answer(text, frames)
    view.line(display.summary(run), "dim")
    return run


def _described(error):
    """An error as one line, with its type where the message alone would not do."""
    message = " ".join(str(error).split())
    if message and isinstance(error, (UsageError, OSError, ValueError, RuntimeError)):
        return message
    return f"{type(error).__name__}: {message}".removesuffix(": ")
