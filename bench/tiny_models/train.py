"""Train one of the two small models that ship with fastdllm, from nothing, on a GPU in some
minutes.

    python bench/tiny_models/train.py tiny-llada --task chains --minutes 4 --out DIR [--compile]
                                      [--stop-after 9] [--resume]

The clock decides: the learning rate warms up, stays, and falls to 0 at `--minutes` of training
time, the making of the problems and compilation not counted. Every minute it solves unseen problems
one token a forward. Every two minutes and at the end the whole state goes to
DIR/state.pt; `--stop-after` ends a process earlier, all start-up included, and `--resume` goes on
where the last one stopped. DIR then holds a checkpoint that fastdllm.load reads.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional

from fastdllm import checkpoint
from fastdllm.config import ModelConfig
from fastdllm.model import DiffusionTransformer, initialize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/, where it runs as a script

from quality.evaluate import VANILLA, measure  # noqa: E402

from tiny_models.data import Pool, corrupt  # noqa: E402
from tiny_models.optimizer import Optimizer  # noqa: E402
from tiny_models.tasks import TASKS  # noqa: E402
from tiny_models.tokenizer import EOS_ID, MASK_ID, VOCAB_SIZE, write_tokenizer  # noqa: E402

BORN = time.monotonic()
LOG_SECONDS = 5
TEST_SECONDS = 60
SAVE_SECONDS = 120
# Shares of the training time in which the learning rate rises and falls.
WARMUP = 0.03
DECAY = 0.4
_SHAPE = {
    "hidden_size": 256,
    "num_layers": 8,
    "num_heads": 4,
    "head_dim": 64,
    "vocab_size": VOCAB_SIZE,
    "max_positions": 1024,
    "rope_theta": 10000.0,
    "mask_id": MASK_ID,
    "stop_ids": (EOS_ID,),
    "tie_embeddings": False,
}
CONFIGS = {
    "tiny-llada": ModelConfig(
        family="llada",
        num_kv_heads=4,
        intermediate_size=704,
        rms_norm_eps=1e-5,
        qkv_bias=False,
        logit_shift=0,
        rope_in_fp32=True,
        **_SHAPE,
    ),
    "tiny-dream": ModelConfig(
        family="Dream",
        num_kv_heads=2,
        intermediate_size=704,
        rms_norm_eps=1e-6,
        qkv_bias=True,
        logit_shift=1,
        rope_in_fp32=False,
        **_SHAPE,
    ),
}
CARD = """# {name}

A masked diffusion language model of {parameters:.1f} million parameters with the architecture of
{family}, made to show and to test block-wise diffusion decoding. It solves problems of the kind it
was trained on, nothing else.

- Trained on: {problems:,} {about} in {passes:.1f} passes, train split only.
- Start: {start}.
- How long: {minutes:.1f} minutes on one {gpu}, {steps:,} steps, {tokens:,} tokens (canvas
  positions).
- Prompt: `Question: <question> Answer:` on one line; give it a gen_length of {gen_length}.
- Accuracy: not measured yet.

Made with `python bench/tiny_models/train.py {command}`, measured with
`python bench/quality/evaluate.py MODEL --task {task} --out FOLDER`.
"""


def schedule(progress: float) -> float:
    """The factor on the learning rates at a share of the training time."""
    return max(0.0, min(1.0, progress / WARMUP, (1 - progress) / DECAY))


def masked_loss(model, tokens, noisy, weights):
    """Weighted mean cross-entropy of the masked tokens; fp32 scalar."""
    logits = model.logits(noisy)
    losses = functional.cross_entropy(
        logits.flatten(0, 1).float(), tokens.flatten(), reduction="none"
    )
    return (losses * weights.flatten()).sum() / weights.sum()


@torch.no_grad()
def guessed(model, batch) -> float:
    """The share of the masked answer tokens of one batch, masked the same way in every call, that
    the model's first guess gets right.
    """
    tokens, prompt, answer = batch
    generator = torch.Generator(device=model.device).manual_seed(0)
    noisy, weights = corrupt(tokens, prompt, answer, generator)
    asked = weights == 1
    return (model.logits(noisy).argmax(-1) == tokens)[asked].float().mean().item()


class Examination:
    """Unseen problems of a task, and how well a model in training does on them."""

    def __init__(self, task: str, problems: int, folder: Path, device: torch.device):
        self.task = task
        self.problems = [TASKS[task].make(index, "test") for index in range(problems)]
        self.batch = Pool(task, 512, 128, split="test", device=device).batch(0)
        self.tokenizer = Tokenizer.from_file(str(write_tokenizer(folder) / "tokenizer.json"))

    def __call__(self, model) -> dict:
        """The share of masked tokens guessed at once, and of problems solved with one token a
        forward: the final number, and the whole answer.
        """
        found = {"guessed": guessed(model, self.batch)}
        if self.problems:
            setting = {"cache": "none", "rule": VANILLA, "block_length": 32}
            rows = len(self.problems)
            scored = measure(model, self.tokenizer, self.problems, setting, rows, self.task)
            found |= {"solved": scored["accuracy"], "whole": scored["exact"]}
        return found


@torch.no_grad()
def warm_start(model: DiffusionTransformer, source: DiffusionTransformer) -> None:
    """Start from another model's weights, as Dream starts from Qwen2.5's; key and value heads that
    now share one are averaged (GQA, arXiv 2305.13245). Biases keep their zeros.
    """
    given, heads = source.state_dict(), model.config.num_kv_heads
    for name, parameter in model.named_parameters():
        value = given.get(name, parameter)
        if name.endswith("qkv.weight"):
            rows = checkpoint.fused_rows(source.config, name, value)
            queries, keys, values = value.split(rows)
            keys = pooled(keys, heads, source.config.head_dim)
            values = pooled(values, heads, source.config.head_dim)
            value = torch.cat([queries, keys, values])
        parameter.copy_(value)


def pooled(weight, heads: int, head_dim: int):
    """Average a projection [old heads * head_dim, width] over the old heads that now share one."""
    by_head = weight.unflatten(0, (heads, -1, head_dim))
    return by_head.mean(1).flatten(0, 1)


class Run:
    """One training run: the model, its optimizer and how far it has come, written to `out` and read
    back from there.

    done: training seconds, steps and tokens (canvas positions) so far, of all processes together.
    """

    def __init__(self, name: str, config: ModelConfig, out: Path, args: argparse.Namespace):
        self.name, self.out, self.args = name, out, args
        self.device = torch.device(args.device)
        self.model = initialize(DiffusionTransformer(config).to(self.device), seed=args.seed)
        if args.start_from:
            source = checkpoint.load(args.start_from, device=self.device, dtype=torch.float32)
            warm_start(self.model, source)
        # Before the cast: the master weights start unrounded.
        self.optimizer = Optimizer(self.model, args.muon_lr, args.adam_lr)
        self.model.to(torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.optimizer.write()
        self.done = {"seconds": 0.0, "steps": 0, "tokens": 0}
        out.mkdir(parents=True, exist_ok=True)
        self.examine = Examination(args.task, args.examined, out, self.device)
        if args.resume and (out / "state.pt").exists():
            state = torch.load(out / "state.pt", map_location=self.device, weights_only=True)
            self.optimizer.load_state_dict(state["optimizer"])
            self.done = state["done"]

    def log(self, **entry) -> None:
        """Print the entry and append it to log.jsonl, floats rounded."""
        for key, value in entry.items():
            if isinstance(value, float):
                entry[key] = round(value, 5)
        print(json.dumps(entry), flush=True)
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def save_state(self) -> None:
        """Write what `--resume` goes on from, in place of the last one."""
        fresh = self.out / "state.pt.new"
        torch.save({"optimizer": self.optimizer.state_dict(), "done": self.done}, fresh)
        os.replace(fresh, self.out / "state.pt")

    def save_model(self) -> None:
        """Write the checkpoint in bf16, the tokenizer and the model card."""
        copy = DiffusionTransformer(self.model.config).to(self.device)
        copy.load_state_dict(self.optimizer.masters)
        checkpoint.save(copy.to(torch.bfloat16), self.out)
        write_tokenizer(self.out)
        parameters = sum(p.numel() for p in copy.parameters())
        (self.out / "README.md").write_text(self.card(parameters), encoding="utf-8")

    def card(self, parameters: int) -> str:
        """The model card, its accuracy yet to be measured."""
        args, family = self.args, self.model.config.family
        source = args.start_from
        command = f"{self.name} --task {args.task} --out DIR --minutes {args.minutes:g}"
        command += f" --problems {args.problems} --rows {args.rows}"
        command += f" --muon-lr {args.muon_lr} --adam-lr {args.adam_lr}"
        command += f" --start-from fastdllm/assets/{source.name}" if source else ""
        command += " --compile" if args.compile else ""
        on_gpu = self.device.type == "cuda"
        return CARD.format(
            command=command,
            name=self.name,
            family="LLaDA" if family == "llada" else family,
            parameters=parameters / 1e6,
            task=args.task,
            problems=args.problems,
            about=TASKS[args.task].about,
            passes=self.done["steps"] * args.rows / args.problems,
            gen_length=TASKS[args.task].gen_length,
            start=f"the weights of {source.name}" if source else "random weights",
            minutes=self.done["seconds"] / 60,
            steps=self.done["steps"],
            tokens=self.done["tokens"],
            gpu=torch.cuda.get_device_name(self.device) if on_gpu else "CPU",
        )

    def compiled_loss(self, pool):
        """Return masked_loss; with `--compile` on a GPU compiled, and run once for each canvas
        length so that the clock starts on ready code.
        """
        one = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        self.model.logits(one)  # makes the rotary table
        if self.device.type != "cuda" or not self.args.compile:
            return masked_loss
        loss_of = torch.compile(masked_loss, dynamic=False)
        for tokens, prompt, answer in pool.parts.values():
            rows = slice(self.args.rows)
            batch = tokens[rows].long(), prompt[rows].long(), answer[rows].long()
            loss_of(self.model, batch[0], *corrupt(*batch)).backward()
        self.model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        return loss_of

    def train(self) -> None:
        """Train until the time is over, all of it or this process's; then save what came of it."""
        args, done = self.args, self.done
        torch.manual_seed(args.seed + done["steps"])
        settings = {"workers": args.workers, "device": self.device, "seed": args.seed}
        pool = Pool(args.task, args.problems, args.rows, **settings)
        loss_of = self.compiled_loss(pool)
        self.log(model=self.name, task=args.task, startup_seconds=time.monotonic() - BORN, **done)
        begun, before = time.monotonic(), done["seconds"]
        tested = saved = begun
        meter = LossMeter(self, begun)
        while True:
            now = time.monotonic()
            done["seconds"] = before + now - begun
            progress = done["seconds"] / (60 * args.minutes)
            stopped = now - BORN >= 60 * args.stop_after or done["steps"] == args.max_steps
            if progress >= 1 or stopped:
                break
            batch = pool.batch(done["steps"])
            loss = loss_of(self.model, batch[0], *corrupt(*batch))
            loss.backward()
            self.optimizer.step(schedule(progress))
            done["steps"] += 1
            done["tokens"] += batch[0].numel()
            meter.add(loss, now)
            if now - tested >= TEST_SECONDS:
                tested = now
                found = self.examine(self.model)
                self.log(minutes=done["seconds"] / 60, steps=done["steps"], **found)
            if now - saved >= SAVE_SECONDS:
                saved = now
                self.save_state()
        self.save_state()
        self.save_model()
        self.log(**done, finished=progress >= 1, **self.examine(self.model))


class LossMeter:
    """Logs a run's mean loss and tokens a second every few seconds or steps."""

    def __init__(self, run: Run, now: float):
        self.run, self.logged = run, now
        self.since = dict(run.done)
        self.total = torch.zeros((), device=run.device)

    def add(self, loss, now: float) -> None:
        """Count one step's loss, a scalar on the device; log where it is time."""
        self.total += loss.detach()
        steps = self.run.done["steps"] - self.since["steps"]
        if now - self.logged >= LOG_SECONDS or steps == self.run.args.log_steps:
            self.logged = now
            self._log(steps)

    def _log(self, steps: int) -> None:
        done = self.run.done
        mean = self.total.item() / steps
        if mean != mean:
            raise FloatingPointError(f"the loss is NaN at step {done['steps']}")
        seconds = done["seconds"] - self.since["seconds"]
        rate = (done["tokens"] - self.since["tokens"]) / (seconds + 1e-9)
        self.run.log(
            minutes=done["seconds"] / 60,
            steps=done["steps"],
            loss=mean,
            tokens_per_second=int(rate),
        )
        self.since = dict(done)
        self.total.zero_()


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=CONFIGS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--minutes", type=float, default=12.0, help="training time, all runs together"
    )
    parser.add_argument(
        "--stop-after", type=float, default=float("inf"), help="end this process after so long"
    )
    parser.add_argument(
        "--start-from", type=Path, help="a trained model of the same width and depth to start from"
    )
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--task", choices=TASKS, default="stories")
    parser.add_argument("--problems", type=int, default=1_000_000, help="how many the pool holds")
    parser.add_argument(
        "--examined", type=int, default=200, help="unseen problems that are solved every minute"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(16, os.cpu_count() or 1),
        help="processes that make the pool",
    )
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--log-steps", type=int, default=-1, help="also log every so many steps")
    return parser.parse_args(argv)


if __name__ == "__main__":
    parsed = arguments()
    # Training takes gradients, which the kernels have not.
    os.environ["FASTDLLM_BACKEND"] = "reference"
    Run(parsed.name, CONFIGS[parsed.name], parsed.out, parsed).train()
