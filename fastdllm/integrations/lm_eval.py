"""lm-eval (0.4): the model "fastdllm", for `fastdllm eval` and for scripts that register() it.

    fastdllm eval gsm8k --batch_size 8 --apply_chat_template \\
        --model_args pretrained=GSAI-ML/LLaDA-8B-Instruct,gen_length=256,cache=dual,threshold=0.9

`Options` in lm_eval_options.py lists the arguments. gen_length goes before what a task asks for,
and `steps` are those of the whole generation. The argument names of the published LLaDA and Dream
scripts are taken too, and bring those scripts' defaults: no cache, one token a step, and one block
unless the cache is on. Chat templates are the tokenizer's, applied when lm-eval is asked to
(--apply_chat_template), whatever the model is called.
"""

import argparse
import functools
import itertools
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

import fastdllm

from .. import text
from ..model import DiffusionTransformer
from ..options import UsageError, named, read_device
from .lm_eval_options import Asked, read_options
from .lm_eval_store import Store

log = logging.getLogger(__name__)
CERTAIN = (0.0, True)  # the log-likelihood of no tokens at all, and that they are the greedy ones
Ids = list[int]


class Harness:
    """The model's half of the class that `register` makes.

    The other half is lm-eval's TemplateLM, which asks it for answers (`generate_until`) and for
    log-likelihoods. A request is lm-eval's Instance: its `args` are (context, settings), (context,
    continuation) or (text,).
    """

    cache_hook: Any  # lm-eval's

    def __init__(self, **given: Any):
        super().__init__()
        self.options = read_options(given)
        self.text = text.load(self.options.pretrained, self.options.device, self.options.dtype)
        self._device = self.model.device
        config = self.model.config
        if self.options.mask_id not in (None, config.mask_id):
            raise UsageError(
                f"mask_id: expected the model's own, {config.mask_id}, got {self.options.mask_id}"
            )
        self.max_length = _positions(self.options.max_length, config.max_positions)
        self.speed: dict[str, Any] = Counter()  # answers, tokens, forwards, seconds

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> "Harness":
        """A model from --model_args and from lm-eval's own flags, which give way to them.

        lm-eval says cuda:0 where its user says no device: without a GPU the CPU is taken.
        """
        flags = dict(additional_config or {})
        device = flags.get("device")
        if arg_dict.get("device") is None and device is not None:
            if str(device).startswith("cuda") and not torch.cuda.is_available():
                log.warning("device: torch sees no GPU, so the model runs on the CPU")
                flags["device"] = "cpu"
        return cls(**{**flags, **{k: v for k, v in arg_dict.items() if v is not None}})

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: Mapping[str, Any] | None = None
    ) -> "Harness":
        """The same from --model_args as one text."""
        from lm_eval.utils import simple_parse_args_string

        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def model(self) -> DiffusionTransformer:
        return self.text.model

    @property
    def tokenizer(self) -> Any:
        return self.text.tokenizer

    @property
    def eot_token_id(self) -> int:
        if self.tokenizer.eos_token_id is None:
            return self.model.config.stop_ids[0]
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands where there is no context."""
        if self.tokenizer.bos_token_id is None:
            return self.eot_token_id
        return self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.options.pretrained.replace("/", "__")

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if not self.tokenizer.chat_template:
            raise ValueError(
                "apply_chat_template: the tokenizer of "
                f"{self.options.pretrained} has no chat template"
            )
        return self.text.chat(chat_history, add_generation_prompt=add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> Ids:
        bos, bos_id = self.tokenizer.bos_token, self.tokenizer.bos_token_id
        if add_special_tokens is None:  # a chat template has written its own
            add_special_tokens = not (bos and string.startswith(bos))
        ids = self.text.tokens(string, add_special_tokens=add_special_tokens)
        if self.options.add_bos_token and bos and add_special_tokens and ids[:1] != [bos_id]:
            return [bos_id, *ids]
        return ids

    # Answers.

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The answers to requests of (context, settings), in their order."""
        from tqdm import tqdm

        store = Store(self.options)
        keys = [store.key(*request.args) for request in requests]
        missing = [index for index, key in enumerate(keys) if key not in store.found]
        asked = {index: self.options.asked(requests[index].args[1]) for index in missing}
        prompts = self._prompts([requests[index].args[0] for index in missing], asked.values())
        prompt_of = dict(zip(missing, prompts, strict=True))
        batches = list(self._batches(asked))
        for batch in tqdm(batches, desc="fastdllm", disable=disable_tqdm):
            first = batch[0]
            texts = self._answer([prompt_of[index] for index in batch], asked[first], first)
            for index, answer in zip(batch, texts, strict=True):
                store.add(keys[index], answer)
                self.cache_hook.add_partial("generate_until", requests[index].args, answer)
        if self.options.show_speed:
            print(self.speed_report(), file=sys.stderr)
        return [store.found[key] for key in keys]

    def _prompts(self, contexts, asked):
        """The contexts as ids, each cut to what max_length leaves it; UsageError for no room."""
        rooms = []
        for one in asked:
            room = self.max_length - one.gen_length
            if room < 1:
                raise UsageError(
                    f"max_length: expected room for a prompt beside {one.gen_length} tokens to "
                    f"generate, got {self.max_length}"
                )
            rooms.append(room)
        prompts = [self.tok_encode(context) or [self.prefix_token_id] for context in contexts]
        return self._cut("prompts", prompts, rooms)

    def _cut(self, what: str, sequences: Sequence[Ids], rooms: Sequence[int]) -> list[Ids]:
        """The ends of the sequences, as long as there is room for; says how much that loses."""
        long = [
            (len(ids), room) for ids, room in zip(sequences, rooms, strict=True) if len(ids) > room
        ]
        if long:
            log.warning(
                "max_length %s: %s of %s %s lose their beginning, %s of %s tokens",
                self.max_length,
                len(long),
                len(sequences),
                what,
                sum(length - room for length, room in long),
                sum(map(len, sequences)),
            )
        return [ids[-room:] for ids, room in zip(sequences, rooms, strict=True)]

    def _batches(self, asked: Mapping[int, Asked]) -> Iterator[list[int]]:
        """Requests that follow each other and ask for the same, batch_size of them at most."""
        size = self.options.batch_size
        # Along a run of neighbours the index and the place go up together.
        places = enumerate(asked)
        runs = itertools.groupby(places, lambda pair: (pair[1] - pair[0], asked[pair[1]]))
        for _, run in runs:
            indexes = [index for _, index in run]
            for first in range(0, len(indexes), size):
                yield indexes[first : first + size]

    def _answer(self, prompts: list[Ids], asked: Asked, index: int) -> list[str]:
        """The answers to prompts that ask for the same; row b draws as request `index` + b."""
        options, config = self.options, self.model.config
        special = self.tokenizer.get_added_vocab()
        stops = {*config.stop_ids, *(special[stop] for stop in asked.until if stop in special)}
        stops.discard(config.mask_id)
        done = fastdllm.generate(
            self.model,
            prompts,
            gen_length=asked.gen_length,
            block_length=asked.block_length,
            cache=options.cache,
            rule=options.commit_rule(asked.gen_length, asked.block_length),
            score=options.score,
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            seed=options.seed + index,
            stop_ids=sorted(stops) if options.stop_early else (),
        )
        answers = []
        for tokens, length in zip(done.tokens, done.prompt_lengths, strict=True):
            written = self.text.written(tokens[length:].tolist(), stops)
            answer = self.text.decode(written)
            ends = [answer.find(stop) for stop in asked.until if stop in answer]
            answers.append(answer[: min(ends, default=None)])
            self.speed["tokens"] += len(written)
        self.speed["answers"] += len(answers)
        self.speed["forwards"] += int(done.nfe.sum())
        self.speed["seconds"] += done.seconds
        return answers

    def speed_report(self) -> str:
        """One line on what was generated so far.

        Tokens are those before the first end of text; prompts and resumed answers do not count.
        """
        speed = self.speed
        tokens_per_second = speed["tokens"] / max(speed["seconds"], 1e-9)
        tokens_per_forward = speed["tokens"] / max(speed["forwards"], 1)
        return (
            f"{speed['answers']} answers, {speed['tokens']} tokens in {speed['seconds']:.1f} s "
            f"({tokens_per_second:.1f} tokens/s), {speed['forwards']} forwards "
            f"({tokens_per_forward:.2f} tokens a forward)"
        )

    # Log-likelihoods.

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether it is the greedy one) for each request."""
        pairs = [(request.args, *self._pair(*request.args)) for request in requests]
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def _pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """The ids of a context and of its continuation, split where lm-eval splits.

        Both are encoded as one text, spaces between them going with the continuation. Without a
        context the prefix token stands for it.
        """
        if not continuation:
            return self.tok_encode(context), []
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        if not bare:
            target = self.tok_encode(continuation, add_special_tokens=False)
            if target[:1] == [self.prefix_token_id]:
                return target[:1], target[1:]
            return [self.prefix_token_id], target
        ids = self.tok_encode(bare)
        target = self.tok_encode(bare + continuation)[len(ids) :]
        if not target:  # one token holds the context's end and the continuation
            target = self.tok_encode(continuation, add_special_tokens=False)
        return ids, target

    @property
    def _target_room(self) -> int:
        """The longest target: one position is for a context, one for Dream's end of text."""
        return self.max_length - 2

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of each whole text, in windows where it is longer than the model's positions."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        sums = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self._target_room, 1)
            parts = [self._estimate(*make_disjoint_window(window)) for window in windows]
            sums.append(float(sum(parts)))
        return sums

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Ids, Ids]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log p(target | context), whether it is the greedy one) for (_, context, target)."""
        from tqdm import tqdm

        targets = [target for _, _, target in requests]
        longest = max(map(len, targets), default=0)
        if longest > self._target_room:
            raise UsageError(
                f"max_length: expected room for a continuation of {longest} tokens and two more, "
                f"got {self.max_length}"
            )
        contexts = [context or [self.prefix_token_id] for _, context, _ in requests]
        rooms = [self.max_length - len(target) - 1 for target in targets]
        contexts = self._cut("contexts", contexts, rooms)
        pairs = list(zip(contexts, targets, strict=True))
        results = []
        for context, target in tqdm(pairs, desc="log-likelihoods", disable=disable_tqdm):
            if not target:
                results.append(CERTAIN)
                continue
            greedy = self.options.is_check_greedy and self._is_greedy(context, target)
            results.append((self._estimate(context, target), greedy))
        return results

    @torch.no_grad()
    def _estimate(self, context: Ids, target: Ids) -> float:
        """A Monte Carlo estimate of the bound on log p(target | context).

        The mean of mc_num draws of what is masked. They depend on the seed and the target's length
        alone, so that the answers to one question share them.
        """
        options, dream = self.options, self.model.config.family == "Dream"
        ids = torch.tensor([*target, self.eot_token_id] if dream else target)
        generator = torch.Generator().manual_seed(options.seed)
        eps = options.sampling_eps
        if eps is None:
            eps = 1e-3 if dream else 0.0
        draw = bernoulli_masks if dream else counted_masks
        masks, weights = draw(options.mc_num, len(ids), generator, eps)
        total = 0.0
        for mask, weight in zip(
            masks.split(options.batch_size), weights.split(options.batch_size), strict=True
        ):
            total -= self._weighted_loss(context, ids, mask, weight)
        return total / options.mc_num

    def _weighted_loss(self, context, target, mask, weight):
        """The sum over draws of weight [draws] times the cross-entropy at mask [draws, length]."""
        config, device = self.model.config, self.model.device
        prefix = torch.tensor(context).expand(len(mask), -1)
        tokens = torch.cat([prefix, target.where(~mask, config.mask_id)], dim=1)
        hidden = self.model.hidden_states(tokens.to(device))
        row, at = mask.nonzero(as_tuple=True)
        source = (len(context) + at - config.logit_shift).clamp(min=0)
        total = 0.0
        for part in torch.arange(len(row)).split(1024):  # the vocabulary is wide
            logits = self.model.head(hidden[row[part], source[part]]).float()
            wanted = target[at[part]].to(device)
            loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
            total += (loss.cpu().double() * weight[row[part]]).sum().item()
        return total

    def _is_greedy(self, context: Ids, target: Ids) -> bool:
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


def _positions(wanted: int | None, available: int) -> int:
    """The model's positions, or fewer where the user says so."""
    if wanted is not None and wanted > available:
        log.warning("max_length: %s is more than the model's %s positions", wanted, available)
    return available if wanted is None else min(wanted, available)


def counted_masks(
    draws: int, length: int, generator: torch.Generator, eps: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """LLaDA's noise: n of the `length` tokens masked, n uniform in 1 .. length.

    n is spread evenly over the draws. eps is not used. Returns masks [draws, length] bool and
    weights [draws] float64, length / n.
    """
    first = torch.randint(length, (), generator=generator)
    count = (first + torch.arange(draws) * length // draws) % length + 1
    rank = torch.rand(draws, length, generator=generator).argsort(1).argsort(1)
    return rank < count[:, None], length / count.double()


def bernoulli_masks(
    draws: int, length: int, generator: torch.Generator, eps: float = 1e-3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dream's noise: each token masked with probability p, p uniform in (eps, 1).

    p is spread evenly over the draws. The last token (the end of text behind the target) stays.
    Returns masks [draws, length] bool and weights [draws] float64, 1 / p.
    """
    first = torch.rand((), generator=generator, dtype=torch.float64)
    t = (first + torch.arange(draws) / draws) % 1
    p = (1 - eps) * t + eps
    masks = torch.rand(draws, length, generator=generator) < p[:, None]
    masks[:, -1] = False
    return masks, 1 / p


@functools.cache
def register() -> type[Harness]:
    """Give lm-eval the model "fastdllm"; returns its class. ImportError without lm-eval."""
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
    except ImportError as error:
        raise ImportError(f"lm-eval is not installed (pip install lm-eval): {error}") from error

    @register_model("fastdllm")
    class FastDLLM(Harness, TemplateLM):
        """LLaDA or Dream, decoded and scored by fastdllm; see `Options`."""

    return FastDLLM


def main(task: str, arguments: Sequence[str]) -> None:
    """Run lm-eval's command line on `task` with this model and lm-eval's own further arguments."""
    register()
    from lm_eval.__main__ import cli_evaluate

    _check_device(arguments)
    sys.argv = ["lm-eval", "--model", "fastdllm", "--tasks", task, *arguments]
    cli_evaluate()


def _check_device(arguments: Sequence[str]) -> None:
    """UsageError for a --device that is not here, in any form that lm-eval's parser takes.

    What comes to `create_from_arg_obj` may be lm-eval's default as well.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", nargs="?")
    device = parser.parse_known_args(list(arguments))[0].device
    if device is not None:
        named("--device", read_device, device)
