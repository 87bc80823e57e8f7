"""The command line's words: every command's options, and what they may hold."""

import argparse
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import fastdllm

from . import text
from .arguments import CACHES
from .checkpoint import AUTO, DTYPE_NAMES
from .options import COUNT, NUMBERS, RULES, Number, UsageError, read_device

DTYPES = (AUTO, *DTYPE_NAMES)
PORT = Number(int, "an integer in [0, 65535]", lambda number: 0 <= number < 65536)
NOT_NEGATIVE = Number(float, "a number >= 0", lambda number: 0 <= number < 1e9)


class _Parser(ArgumentParser):
    """An argument parser whose errors are one line, and which takes no abbreviated options."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def parser(commands: Mapping[str, Callable[[Namespace], None]]) -> ArgumentParser:
    """The parser of all commands; each sets `command` to what runs it."""
    whole = _Parser(prog="fastdllm", description=fastdllm.__doc__)
    add = whole.add_subparsers(metavar="COMMAND", required=True).add_parser
    for name, (words, add_options) in COMMANDS.items():
        command = add(name, help=words)
        command.set_defaults(command=commands[name])
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        add_options(command)
    return whole


def _add_info(command: ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print one JSON object")


def _add_eval(command: ArgumentParser) -> None:
    command.add_argument(
        "task", metavar="TASK", help="a task of lm-eval, several with commas, or a task's YAML file"
    )
    command.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="lm-eval's arguments: --model_args ...",
    )


def _add_generate(command: ArgumentParser) -> None:
    command.add_argument(
        "--json", action="store_true", help="print JSON objects and nothing else, one a prompt"
    )
    _add_prompt(command)
    _add_model(command)
    _add_decoding(command)
    _add_sampling(command)
    _add_display(command)


def _add_chat(command: ArgumentParser) -> None:
    command.add_argument(
        "--system", metavar="TEXT", help="a message of the system before the first"
    )
    _add_model(command)
    _add_decoding(command)
    _add_sampling(command)
    _add_positions(command)
    _add_no_color(command)


def _add_serve(command: ArgumentParser) -> None:
    _add_model(command)
    _add_decoding(command)
    command.set_defaults(gen_length=256)
    _add_engine(command)
    _add_count(command, "queue", 256, "requests that may wait")
    add = command.add_argument
    add("--host", default="127.0.0.1", help="the address to listen on (%(default)s)")
    add("--port", type=_option(PORT.read), default=8000, help="(%(default)s)")
    add("--name", help="the model's name for clients; default: as --model says")
    add("--api-key-env", metavar="NAME", help="the variable that holds the key clients must show")
    add(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this origin ask (CORS); may be repeated; default: none",
    )
    _add_count(command, "body-bytes", 1 << 20, "the largest request")
    add(
        "--drain-seconds",
        type=_option(NOT_NEGATIVE.read),
        default=30.0,
        metavar="S",
        help="what running requests get to end after SIGTERM (%(default)s)",
    )


def _add_batch(command: ArgumentParser) -> None:
    add = command.add_argument
    add("input", type=Path, metavar="IN.jsonl", help="a record a line: id, prompt or messages, ...")
    add("--output", type=Path, required=True, metavar="OUT.jsonl", help="results are appended here")
    add("--in-order", action="store_true", help="append results in the order of the records")
    add("--quiet", action="store_true", help="tell of nothing but broken lines")
    add("--ray", action="store_true", help="several processes, each with an engine, through Ray")
    _add_count(command, "workers", 1, "with --ray: processes")
    add(
        "--gpus-per-worker",
        type=_option(NOT_NEGATIVE.read),
        default=0.0,
        metavar="N",
        help="with --ray (%(default)s)",
    )
    _add_model(command)
    _add_decoding(command)
    _add_engine(command)
    command.set_defaults(gen_length=256)


def _add_engine(command: ArgumentParser) -> None:
    _add_count(command, "rows", 8, "requests decoded at once")
    _add_positions(command)


def _add_positions(command: ArgumentParser) -> None:
    words = "tokens of a prompt and its answer; at most the model's"
    _add_count(command, "positions", 2048, words)


def _add_count(command: ArgumentParser, name: str, default: int, words: str) -> None:
    command.add_argument(
        f"--{name}",
        type=_option(COUNT.read),
        default=default,
        metavar="N",
        help=f"{words} (%(default)s)",
    )


def _add_prompt(command: ArgumentParser) -> None:
    add = command.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="the prompt; absent or '-': standard input")
    add("--demo", action="store_true", help="decode the embedded problems")
    add("--raw", action="store_true", help="do not apply the tokenizer's chat template")


def _add_model(command: ArgumentParser) -> None:
    embedded = " or ".join(text.EMBEDDED)
    command.add_argument(
        "--model",
        default=text.EMBEDDED[0],
        help=f"{embedded} (embedded), a folder or a hub id (%(default)s)",
    )
    command.add_argument(
        "--device",
        type=_option(read_device),
        help="cpu, cuda or cuda:N; default: a GPU where there is one",
    )
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        metavar="DTYPE",
        help=f"{', '.join(DTYPES)} (auto: as stored); default: float32 on a CPU, bfloat16 on a GPU",
    )


def _add_decoding(command: ArgumentParser) -> None:
    add = command.add_argument
    add("--cache", choices=CACHES, default="dual", help="keys and values to reuse (%(default)s)")
    add_rule = command.add_mutually_exclusive_group().add_argument
    for name, option in RULES.items():
        add_rule(f"--{name}", type=_option(NUMBERS[name].read), help=option.help)
    add_rule("--rule", help="any rule as Python would call it: 'Quota(8, \"dream\")', module:name")
    block, length = NUMBERS["block_length"], NUMBERS["gen_length"]
    add(
        "--block-length",
        type=_option(block.read),
        default=32,
        help="tokens per block (%(default)s)",
    )
    add(
        "--gen-length",
        type=_option(length.read),
        default=128,
        help="tokens to decode (%(default)s)",
    )


def _add_sampling(command: ArgumentParser) -> None:
    def add(name: str, **options: Any) -> None:
        read = NUMBERS[name.replace("-", "_")].read
        command.add_argument(f"--{name}", type=_option(read), **options)

    add(
        "temperature",
        default=0.0,
        help="0 takes the best token, above samples (%(default)s)",
    )
    add("top-p", help="sample from this much of the probability")
    add("top-k", help="sample from so many tokens; 0 or -1: from all")
    add("seed", help="of the sampling: same seed, same tokens")


def _add_display(command: ArgumentParser) -> None:
    command.add_argument(
        "--compare",
        action="store_true",
        help="decode one token a step without a cache first, and compare",
    )
    _add_no_color(command)


def _add_no_color(command: ArgumentParser) -> None:
    command.add_argument(
        "--no-color",
        action="store_true",
        help="plain text, no frames (also: NO_COLOR, or no terminal)",
    )


def _option(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """An argparse type of a reader from options.py, whose errors argparse shows as they are."""

    def parse(written: str) -> Any:
        try:
            return read(written)
        except UsageError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


COMMANDS: dict[str, tuple[str, Callable[[ArgumentParser], None]]] = {
    "info": ("show versions, device and backend", _add_info),
    "eval": ("run lm-eval on a task", _add_eval),
    "generate": ("decode a prompt and show how", _add_generate),
    "chat": ("answer one question after another", _add_chat),
    "batch": ("answer the records of a file", _add_batch),
    "serve": ("answer OpenAI's API over HTTP", _add_serve),
}
