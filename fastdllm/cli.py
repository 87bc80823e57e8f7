"""The command line: `fastdllm generate`, `chat`, `serve`, `batch`, `eval` and `info`.

Exit codes: 0; 1 when something fails (a model that cannot be loaded); 2 when the call is wrong; 130
when interrupted. An error is one line on standard error, with a traceback only under --debug.
"""

import io
import json
import os
import platform
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import (
    ExitStack,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

import fastdllm
from fastdllm_kernels import backend

from . import display, text
from .families import FAMILIES
from .options import UsageError, choose_rule
from .parallel import launched_mesh
from .parser import parser

INTERRUPTED = 130


@dataclass(frozen=True)
class Setting:
    """How to decode, and the same in words."""

    cache: str
    rule: Any
    words: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv` (default: the process's arguments); returns the exit code."""
    args = Namespace(debug=False)
    with _streams():
        try:
            parser(COMMANDS).parse_args(argv, namespace=args)
            args.command(args)
            sys.stdout.flush()
            return 0
        except SystemExit as end:  # --help has printed what there is to say
            return _exit_code(end)
        except KeyboardInterrupt:
            return INTERRUPTED
        except BrokenPipeError:  # the reader has enough
            _drop_output()
            return 0
        except Exception as error:
            if args.debug:
                traceback.print_exc()
            print(f"fastdllm: error: {text.one_line(error)}", file=sys.stderr)
            return 2 if isinstance(error, UsageError) else 1


def generate(args: Namespace) -> None:
    """Decode the prompts and show each run; with --compare, a vanilla run of each before.

    Processes that torchrun started decode with one model together, and the first shows the runs.
    """
    mesh = launched_mesh(args.device)
    if mesh is None:
        _generate(args)
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        with redirect_stdout(nowhere) if mesh.get_local_rank() else nullcontext():
            _generate(args, mesh)
    torch.distributed.destroy_process_group()


def _generate(args: Namespace, mesh: DeviceMesh | None = None) -> None:
    rule, words = choose_rule(vars(args))
    setting = Setting(args.cache, rule, f"Fast-dLLM: cache {args.cache}, {words}")
    prompts = _prompts(args)
    loaded = text.load(args.model, args.device, args.dtype, mesh)
    encoded = [_encode(loaded, prompt, args.raw) for prompt in prompts]
    # No frames on several ranks: they would be told of steps on the first alone.
    view = _view(args.no_color or mesh is not None, args.json)
    if args.compare or loaded.model.device.type == "cuda":
        # Kernels compile and threads start on their first use: that belongs to no run's time.
        _decode(args, loaded, encoded[0], Setting(args.cache, fastdllm.Quota(2), "warm-up"))
    for prompt, ids in zip(prompts, encoded, strict=True):
        facts = {"prompt": prompt, "model": args.model, "setting": setting.words}
        if args.compare or len(prompts) > 1:
            view.line(prompt, "bold")
        if args.compare:
            facts |= _compare(args, loaded, view, ids, setting)
        else:
            facts |= _run(args, loaded, view, ids, setting)
        if args.json:
            print(json.dumps(facts), flush=True)


def evaluate(args: Namespace) -> None:
    """Run lm-eval's own command line on a task, with the model "fastdllm" registered."""
    from .integrations import lm_eval

    lm_eval.main(args.task, args.arguments)


def chat(args: Namespace) -> None:
    """Answer one question after another, at a terminal or from standard input."""
    from .chat import Chat

    rule = choose_rule(vars(args)).rule
    loaded = text.load(args.model, args.device, args.dtype)
    positions = min(args.positions, loaded.model.config.max_positions)
    names = ("gen_length", "temperature", "top_p", "top_k", "seed")
    options = {"rule": rule} | {name: getattr(args, name) for name in names}
    engine = fastdllm.Engine(
        loaded.model,
        rows=1,
        positions=positions,
        block_length=args.block_length,
        cache=args.cache,
    )
    with engine:
        Chat(loaded, engine, _view(args.no_color), options, args.system).run(_read_line)


def _read_line() -> str:
    """The next line of standard input; EOFError after the last."""
    if sys.stdin is None:
        raise EOFError
    return input("> " if sys.stdin.isatty() else "")


def serve(args: Namespace) -> None:
    """Answer OpenAI's API over HTTP until told to end."""
    from .serve import server

    settings = {
        "name": args.name,
        "rule": choose_rule(vars(args)).rule,
        "body_bytes": args.body_bytes,
        "key": _key(args.api_key_env),
        "origins": tuple(args.allow_origin),
        "drain_seconds": args.drain_seconds,
    }
    make = partial(_service, args, queue=args.queue, **settings)
    server.run(make, args.host, args.port)


def batch(args: Namespace) -> None:
    """Answer the records of a file, going on where an earlier run ended."""
    from . import batch

    queue = batch.AHEAD * args.rows
    make = partial(_service, args, queue=queue, rule=choose_rule(vars(args)).rule)
    if args.ray:
        from .integrations import ray

        results = ray.results(make, args.workers, args.rows, args.gpus_per_worker)
    else:
        results = batch.with_engine(make)
    counts = batch.run(args.input, args.output, results, in_order=args.in_order, quiet=args.quiet)
    if counts.broken:
        raise SystemExit(1)


def _service(args: Namespace, **settings: Any) -> Any:
    """The Service of a model that the command line names. settings: others of loaded_service."""
    from .serve.service import loaded_service

    return loaded_service(
        args.model,
        device=args.device,
        dtype=args.dtype,
        rows=args.rows,
        positions=args.positions,
        cache=args.cache,
        gen_length=args.gen_length,
        block_length=args.block_length,
        **settings,
    )


def _key(name: str | None) -> str | None:
    """The key in a variable of the environment, where one is named."""
    if name is None:
        return None
    if not os.environ.get(name):
        raise UsageError(f"--api-key-env: expected a variable with the key, got {name}, not set")
    return os.environ[name]


def info(args: Namespace) -> None:
    """Print versions, device, backend and families."""
    versions: dict[str, str | None] = {
        "fastdllm": fastdllm.__version__,
        "python": platform.python_version(),
    }
    for name in ("torch", "triton", "transformers"):
        versions[name] = None
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    families = sorted(FAMILIES)
    facts = {"device": device, "backend": backend.describe()}
    if args.json:
        print(json.dumps({"versions": versions} | facts | {"families": families}))
        return
    for name, value in (versions | facts | {"families": ", ".join(families)}).items():
        print(f"{name:<13} {value or 'not installed'}")


COMMANDS: dict[str, Callable[[Namespace], None]] = {
    "info": info,
    "eval": evaluate,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "batch": batch,
}


@contextmanager
def _streams() -> Iterator[None]:
    """Standard output and error that can be written to inside.

    A stream that was closed is None in Python: what is written goes nowhere. One that cannot write
    some letter (or a mask) shows its escape instead.
    """
    with ExitStack() as stack:
        for stream, redirect in ((sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)):
            if stream is None:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(redirect(nowhere))
            elif isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        yield


def _exit_code(end: SystemExit) -> int:
    """The code of a SystemExit, whose own may be None or a message."""
    if end.code is None or isinstance(end.code, int):
        return end.code or 0
    print(end.code, file=sys.stderr)
    return 1


def _drop_output() -> None:
    """Let what is still to be flushed go nowhere, not into the closed pipe."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _prompts(args: Namespace) -> list[str]:
    if args.demo:
        if args.prompt is not None:
            raise UsageError("--demo brings its own prompts: leave PROMPT out")
        problems = (text.ASSETS / "demo.txt").read_text(encoding="utf-8")
        return [problem.strip("\n") for problem in problems.split("\n---\n")]
    prompt = _standard_input(args.prompt) if args.prompt in (None, "-") else args.prompt
    if not prompt.strip():
        raise UsageError("the prompt is empty")
    try:
        text.check_text("PROMPT", prompt)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return [prompt]


def _standard_input(prompt: str | None) -> str:
    """The prompt from standard input; at a terminal only where "-" asks for that."""
    if sys.stdin is None or (prompt is None and sys.stdin.isatty()):
        raise UsageError("no prompt: give PROMPT, pipe one in, or try --demo")
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not text: {error}") from error


def _encode(loaded: text.TextModel, prompt: str, raw: bool) -> list[int]:
    ids = loaded.encode(prompt, raw=raw)
    if not ids:
        raise UsageError(f"the prompt has no tokens: {prompt!r}")
    return ids


def _view(no_color: bool, json: bool = False) -> display.View:
    """Frames at a terminal that has colours, plain text elsewhere, nothing beside JSON."""
    colourless = no_color or os.environ.get("NO_COLOR") or not sys.stdout.isatty()
    console = None if json or colourless else display.terminal()
    return display.View(console, quiet=json)


def _decode(
    args: Namespace,
    loaded: text.TextModel,
    ids: list[int],
    setting: Setting,
    on_step: Callable[[fastdllm.StepEvent], None] | None = None,
) -> fastdllm.Generation:
    try:
        return fastdllm.generate(
            loaded.model,
            [ids],
            gen_length=args.gen_length,
            block_length=args.block_length,
            cache=setting.cache,
            rule=setting.rule,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            seed=args.seed,
            on_step=on_step,
        )
    except (TypeError, ValueError) as error:
        if str(error).startswith("logits"):  # NaN: the model's fault
            raise RuntimeError(str(error)) from error
        raise UsageError(str(error)) from error  # all else came from the command line


def _compare(
    args: Namespace, loaded: text.TextModel, view: display.View, ids: list[int], setting: Setting
) -> dict[str, Any]:
    """Decode one prompt the vanilla way and then as `setting` says; returns what both came to."""
    one_a_step = fastdllm.Quota(min(args.block_length, args.gen_length))
    plain = Setting("none", one_a_step, "vanilla: cache none, one token a step")
    runs = []
    for way in (plain, setting):
        view.line(way.words, "cyan")
        runs.append(_run(args, loaded, view, ids, way))
    vanilla, fast = runs
    facts = {"vanilla": vanilla} | fast | display.compared(vanilla, fast)
    view.line(display.comparison(facts) + "\n", "bold")
    return facts


def _run(
    args: Namespace, loaded: text.TextModel, view: display.View, ids: list[int], setting: Setting
) -> dict[str, Any]:
    """Decode one prompt in `view` and return what it came to.

    Only tokens before the first end of text count, and the time that was spent in frames does not.
    """
    stop_ids = loaded.model.config.stop_ids
    with view.frames(loaded.tokenizer, len(ids), args.gen_length, stop_ids) as frames:
        on_step = None if frames is None else frames.on_step
        generation = _decode(args, loaded, ids, setting, on_step)
    seconds = generation.seconds - (0.0 if frames is None else frames.seconds)
    run = display.run_of(loaded, generation, seconds)
    view.answer(run["text"], frames)
    view.line(display.summary(run), "dim")
    return run
