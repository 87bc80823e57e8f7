"""lm-eval (0.4): the model "fastdllm", for `fastdllm eval TASK --model_args NAME=VALUE,...` and for
scripts that register() it.

    fastdllm eval gsm8k --model_args pretrained=GSAI-ML/LLaDA-8B-Instruct,gen_length=256,cache=dual,threshold=0.9 \\
        --batch_size 8 --apply_chat_template

`Options` in lm_eval_options.py lists the arguments. gen_length goes before what a task asks for,
and `steps` are those of the whole generation. The argument names of the published LLaDA and Dream
scripts are taken too, and bring those scripts' defaults: no cache, one token a step, and one block
unless the cache is on. Chat templates are the tokenizer's, applied when lm-eval is asked to
(--apply_chat_template), whatever the model is called.
"""

import functools
import hashlib
import itertools
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch

import fastdllm

from .. import cli
from .lm_eval_options import NOT_IN_TEXT, Options, read_options


class Harness:
    """The model's half of the class that `register` makes; the other half is lm-eval's TemplateLM."""

    def __init__(self, **given):
        super().__init__()
        self.options = options = read_options(given)
        self.model, self.tokenizer = cli.load(options.pretrained, options.device, options.dtype)
        self._device = self.model.device
        config = self.model.config
        if options.mask_id not in (None, config.mask_id):
            raise ValueError(
                f"mask_id: expected the model's own, {config.mask_id}, got {options.mask_id}"
            )
        self.max_length = min(options.max_length or config.max_positions, config.max_positions)
        self.speed = Counter()  # answers, tokens, forwards, seconds

    @classmethod
    def create_from_arg_obj(cls, arg_dict, additional_config=None):
        """Where lm-eval's own flags say another device or batch size, the model's arguments win."""
        return cls(**{**(additional_config or {}), **arg_dict})

    @property
    def eot_token_id(self):
        return (
            self.model.config.stop_ids[0]
            if self.tokenizer.eos_token_id is None
            else self.tokenizer.eos_token_id
        )

    @property
    def prefix_token_id(self):
        return (
            self.eot_token_id
            if self.tokenizer.bos_token_id is None
            else self.tokenizer.bos_token_id
        )

    @property
    def tokenizer_name(self):
        return self.options.pretrained.replace("/", "__")

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"apply_chat_template: the tokenizer of {self.options.pretrained} has no chat template"
            )
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string, add_special_tokens=None, **_):
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:  # a chat template has written its own
            add_special_tokens = not (bos and string.startswith(bos))
        ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        add_bos = (
            self.options.add_bos_token
            and bos
            and add_special_tokens
            and ids[:1] != [self.tokenizer.bos_token_id]
        )
        return [self.tokenizer.bos_token_id, *ids] if add_bos else ids

    def generate_until(self, requests, disable_tqdm=False):
        from tqdm import tqdm

        store, size = Store(self.options), self.options.batch_size
        keys = [store.key(*request.args) for request in requests]
        missing = [i for i, key in enumerate(keys) if key not in store.found]
        groups = [
            list(group) for _, group in itertools.groupby(missing, lambda i: requests[i].args[1])
        ]
        batches = [
            group[first : first + size] for group in groups for first in range(0, len(group), size)
        ]
        for batch in tqdm(batches, desc="fastdllm", disable=disable_tqdm):
            contexts, settings = zip(*(requests[i].args for i in batch), strict=True)
            for i, text in zip(batch, self._answer(contexts, settings[0], batch[0]), strict=True):
                store.add(keys[i], text)
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        if self.options.show_speed:
            print(self.speed_report(), file=sys.stderr)
        return [store.found[key] for key in keys]

    def _answer(self, contexts, settings, index):
        """The answers to contexts that share their settings; row b draws as request `index` + b."""
        options, config = self.options, self.model.config
        limits = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        gen_length = options.gen_length or next(
            (settings[name] for name in limits if settings.get(name)), 256
        )
        block_length = options.block_length or gen_length
        until = settings.get("until") or []
        until = (
            []
            if options.escape_until
            else [until]
            if isinstance(until, str)
            else list(filter(None, until))
        )
        special = self.tokenizer.get_added_vocab()
        stops = {*config.stop_ids, *(special[text] for text in until if text in special)} - {
            config.mask_id
        }
        prompts = [self.tok_encode(context) or [self.prefix_token_id] for context in contexts]
        room = max(1, self.max_length - gen_length)
        asked = settings if settings.get("do_sample") else {}
        temperature = (
            (asked.get("temperature") or 0.0)
            if options.temperature is None
            else options.temperature
        )
        done = fastdllm.generate(
            self.model,
            [prompt[-room:] for prompt in prompts],
            gen_length=gen_length,
            block_length=block_length,
            cache=options.cache,
            rule=options.rule(gen_length, block_length),
            score=options.score,
            temperature=float(temperature),
            top_p=options.top_p or asked.get("top_p"),
            top_k=options.top_k or asked.get("top_k"),
            seed=options.seed + index,
            stop_ids=sorted(stops) if options.stop_early else (),
        )
        texts = []
        for tokens, length in zip(done.tokens, done.prompt_lengths, strict=True):
            written = list(
                itertools.takewhile(lambda token: token not in stops, tokens[length:].tolist())
            )
            text = self.tokenizer.decode(written, skip_special_tokens=True)
            texts.append(
                text[: min((text.find(stop) for stop in until if stop in text), default=None)]
            )
            self.speed["tokens"] += len(written)
        self.speed.update(answers=len(texts), forwards=int(done.nfe.sum()), seconds=done.seconds)
        return texts

    def speed_report(self) -> str:
        """One line on what was generated so far: tokens before the first end-of-text, no prompts,
        no resumed answers.
        """
        speed = self.speed
        return (
            f"{speed['answers']} answers, {speed['tokens']} tokens in {speed['seconds']:.1f} s "
            f"({speed['tokens'] / max(speed['seconds'], 1e-9):.1f} tokens/s), {speed['forwards']} forwards "
            f"({speed['tokens'] / max(speed['forwards'], 1):.2f} tokens a forward)"
        )

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        sums = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            # Two positions are for the context and for the end-of-text that Dream's estimate adds.
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 2, 1)
            sums.append(sum(self._estimate(*make_disjoint_window(window)) for window in windows))
        return sums

    def _loglikelihood_tokens(self, requests, disable_tqdm=False):
        from tqdm import tqdm

        results = []
        for _, context, target in tqdm(requests, desc="log-likelihoods", disable=disable_tqdm):
            target = target[-(self.max_length - 2) :]
            context = context[-max(1, self.max_length - len(target) - 1) :]
            greedy = self.options.is_check_greedy and self._is_greedy(context, target)
            results.append((self._estimate(context, target), greedy))
        return results

    @torch.no_grad()
    def _estimate(self, context, target) -> float:
        """A Monte Carlo estimate of the bound on log p(target | context), over mc_num draws of what
        is masked.

        The draws depend on the seed and the target's length alone, so the answers to one question
        share them.
        """
        options, config = self.options, self.model.config
        dream = config.family == "Dream"
        target = torch.tensor([*target, self.eot_token_id] if dream else target)
        generator = torch.Generator().manual_seed(options.seed)
        draw = bernoulli_masks if dream else counted_masks
        eps = (1e-3 if dream else 0.0) if options.sampling_eps is None else options.sampling_eps
        masks, weights = draw(options.mc_num, len(target), generator, eps)
        total = 0.0
        for mask, weight in zip(
            masks.split(options.batch_size), weights.split(options.batch_size), strict=True
        ):
            tokens = torch.cat(
                [torch.tensor(context).expand(len(mask), -1), target.where(~mask, config.mask_id)],
                dim=1,
            )
            hidden = self.model.hidden_states(tokens.to(self.model.device))
            row, at = mask.nonzero(as_tuple=True)
            source = (len(context) + at - config.logit_shift).clamp(min=0)
            for part in torch.arange(len(row)).split(1024):  # the vocabulary is wide
                logits = self.model.head(hidden[row[part], source[part]]).float()
                loss = torch.nn.functional.cross_entropy(
                    logits, target[at[part]].to(logits.device), reduction="none"
                )
                total -= (loss.cpu().double() * weight[row[part]]).sum().item()
        return total / options.mc_num

    def _is_greedy(self, context, target) -> bool:
        """Whether decoding one token a step, the surest first, gives the target."""
        length = len(target)
        done = fastdllm.generate(
            self.model,
            [context],
            gen_length=length,
            block_length=length,
            cache="none",
            rule=fastdllm.Quota(length),
            stop_ids=(),
        )
        return done.tokens[0][len(context) :].tolist() == list(target)


def counted_masks(draws, length, generator, eps=0.0):
    """LLaDA's noise: n of the `length` tokens masked, n uniform in 1 .. length and spread evenly
    over the draws.

    Returns masks [draws, length] bool and weights [draws], length / n.
    """
    first = torch.randint(length, (), generator=generator)
    count = (first + torch.arange(draws) * length // draws) % length + 1
    rank = torch.rand(draws, length, generator=generator).argsort(1).argsort(1)
    return rank < count[:, None], length / count.double()


def bernoulli_masks(draws, length, generator, eps=1e-3):
    """Dream's noise: each token masked with probability p, p uniform in (eps, 1) and spread evenly
    over the draws.

    The last token (the end-of-text behind the target) stays. Returns masks [draws, length] bool and
    weights [draws], 1 / p.
    """
    t = (torch.rand((), generator=generator, dtype=torch.float64) + torch.arange(draws) / draws) % 1
    p = (1 - eps) * t + eps
    masks = torch.rand(draws, length, generator=generator) < p[:, None]
    masks[:, -1] = False
    return masks, 1 / p


class Store:
    """Answers kept in a folder, found again by the prompt and by all that decides the text."""

    def __init__(self, options: Options):
        self.settings = {
            name: value for name, value in asdict(options).items() if name not in NOT_IN_TEXT
        }
        self.found, self.times = {}, Counter()
        self.file = options.resume and Path(options.resume) / "answers.jsonl"
        if not self.file:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text(encoding="utf-8").split("\n")[:-1] if self.file.exists() else []
        self.found = dict(map(json.loads, lines))
        # A run that was killed may have left half a line.
        self.file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def key(self, context, settings) -> str:
        """The name of this request; one asked for several times has several."""
        text = json.dumps([context, settings, self.settings], sort_keys=True)
        self.times[text] += 1
        return hashlib.sha256(f"{text} {self.times[text]}".encode()).hexdigest()

    def add(self, key: str, text: str) -> None:
        self.found[key] = text
        if self.file:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, text]) + "\n")


@functools.cache
def register() -> type:
    """Give lm-eval the model "fastdllm"; returns its class. ImportError where lm-eval is missing."""
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise ImportError(f"lm-eval is not installed (pip install lm-eval): {error}") from error

    @register_model("fastdllm")
    class FastDLLM(Harness, TemplateLM):
        """LLaDA or Dream, decoded and scored by fastdllm; see `Options`."""

    return FastDLLM


def main(task: str, arguments) -> None:
    """Run lm-eval's command line on `task` with this model and lm-eval's own further arguments."""
    register()
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm-eval", "--model", "fastdllm", "--tasks", task, *arguments]
    cli_evaluate()
