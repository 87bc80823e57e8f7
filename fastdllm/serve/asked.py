"""From a request's JSON to what is asked of the engine.

What is not understood and would change the answer is refused by its name; what changes nothing may
come. Numbers and rules mean what they mean on the command line (options.py).
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastdllm_kernels import score_of

from ..options import NUMBERS, RULES, Number, UsageError, choose_rule
from ..text import TextModel
from .errors import Refused, wrong
from .settings import Settings

MOST_STOPS, LONGEST_STOP = 16, 256
LONGEST_RULE = 128
# They describe the caller or how it is billed.
IDLE = frozenset(
    ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user")
)
# Any other value of these would change the answer.
NEUTRAL: dict[str, Any] = {
    "best_of": 1,
    "echo": False,
    "frequency_penalty": 0,
    "function_call": "none",
    "functions": [],
    "logit_bias": {},
    "modalities": ["text"],
    "presence_penalty": 0,
    "response_format": {"type": "text"},
    "suffix": "",
    "tool_choice": "none",
    "tools": [],
    "top_logprobs": 0,
}


@dataclass(frozen=True)
class Asked:
    """What a request asks for.

    prompts: token ids, each answered n times. options: of Engine.submit. stops: strings that end an
    answer. usage: whether a stream ends with the tokens and forwards it took. chat: which of the
    two shapes the answer has.
    """

    prompts: list[list[int]] = field(repr=False)
    options: dict[str, Any] = field(repr=False)
    chat: bool
    n: int = 1
    stops: tuple[str, ...] = field(default=(), repr=False)
    logprobs: bool = False
    stream: bool = False
    usage: bool = False


class Fields:
    """The parameters of a request, taken one by one."""

    def __init__(self, body: Mapping[str, Any]):
        self.left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str, read: Callable[[Any], Any], default: Any = None) -> Any:
        """What `read` makes of a parameter, which may be absent or null. 400 naming it where that
        raises UsageError or ValueError.
        """
        if name not in self.left:
            return default
        try:
            return read(self.left.pop(name))
        except (UsageError, ValueError) as error:
            raise wrong(name, str(error).removeprefix(f"{name}: ")) from None

    def refuse_rest(self) -> None:
        """400 where something is left that would change the answer."""
        for name, value in self.left.items():
            if name in IDLE or (name in NEUTRAL and value == NEUTRAL[name]):
                continue
            if name in NEUTRAL:
                expected = json.dumps(NEUTRAL[name])
                raise wrong(name, f"expected {expected}: nothing else is supported", "unsupported")
            raise wrong(name, "this parameter is not understood", "unsupported")


def parsed(body: bytes) -> dict[str, Any]:
    """The object in a request's body; 400 where there is none."""
    try:
        found = json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise wrong(None, "the body is not JSON") from None
    if not isinstance(found, dict):
        raise wrong(None, f"expected a JSON object, got {type(found).__name__}")
    return found


def _no_number(word):
    raise ValueError(word)


def read_chat(body: Mapping[str, Any], loaded: TextModel, settings: Settings) -> Asked:
    """What a chat completion asks for."""
    fields = Fields(body)
    logprobs = fields.take("logprobs", a_bool, False)
    messages = fields.take("messages", a_chat)
    if messages is None:
        raise wrong("messages", "expected a list of messages, got none")
    prompts = [_chat_tokens(messages, loaded)]
    return _asked(fields, "messages", prompts, settings, chat=True, logprobs=logprobs)


def read_completion(body: Mapping[str, Any], loaded: TextModel, settings: Settings) -> Asked:
    """What a completion asks for."""
    fields = Fields(body)
    logprobs = fields.take("logprobs", _no_alternatives)
    prompts = fields.take("prompt", lambda value: prompts_in(value, loaded))
    if prompts is None:
        raise wrong("prompt", "expected text or token ids, got none")
    named = logprobs is not None
    return _asked(fields, "prompt", prompts, settings, chat=False, logprobs=named)


def _asked(fields, source, prompts, settings, **others) -> Asked:
    """The rest of a request, which both kinds share. source: what holds its prompt."""
    _check_model(fields.take("model", a_text), settings)
    n = fields.take("n", number(NUMBERS["gen_length"]), 1)
    if n * len(prompts) > settings.choices:
        most = settings.choices
        raise wrong("n", f"expected at most {most} answers to a request, got {n * len(prompts)}")
    stream = fields.take("stream", a_bool, False)
    if "stream_options" in fields.left and not stream:
        raise wrong("stream_options", "expected it with stream only")
    usage = fields.take("stream_options", _includes_usage, False)
    stops = fields.take("stop", stop_strings, ())
    options = _options(fields, settings)
    if others["logprobs"] and score_of(options["rule"]) != "confidence":
        raise wrong("logprobs", "expected a rule that reads confidences beside it")
    options["gen_length"] = _gen_length(fields, source, prompts, settings)
    fields.refuse_rest()
    return Asked(prompts, options, n=n, stops=stops, stream=stream, usage=usage, **others)


def _options(fields, settings) -> dict[str, Any]:
    """How to decode: the keywords of Engine.submit but for gen_length."""
    options = {
        name: fields.take(name, number(NUMBERS[name]), default)
        for name, default in (("temperature", 0.0), ("top_p", None), ("seed", None))
    }
    if options["top_p"] == 1:
        options["top_p"] = None  # all of the probability: the filter is off
    chosen = {name: fields.take(name, number(NUMBERS[name])) for name in RULES}
    chosen["rule"] = fields.take("rule", a_rule)
    given = [name for name, value in chosen.items() if value is not None]
    options["rule"] = settings.rule
    try:
        if len(given) == 1:
            options["rule"] = _rule(given[0], chosen[given[0]])
        elif given:
            choose_rule(chosen)
    except UsageError as error:
        at_fault = given[:2][-1]
        raise wrong(at_fault, str(error).removeprefix(f"{at_fault}: ")) from None
    return options


@functools.lru_cache(256)
def _rule(name, value):
    """The rule of one option: the same object for the same number, which rows can then share."""
    return choose_rule({name: value}).rule


def _gen_length(fields, source, prompts, settings) -> int:
    """How many tokens to decode; 400 where prompt and answer do not fit."""
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in fields.left]
    if len(names) > 1:
        raise wrong(names[1], f"expected one limit, but {names[0]} is given too")
    longest, positions = max(map(len, prompts)), settings.positions
    if longest >= positions:
        message = f"the prompt has {longest} tokens; with an answer {positions} fit"
        raise wrong(source, message, "context_length_exceeded")
    if not names:
        return min(settings.gen_length, positions - longest)
    gen_length = fields.take(names[0], number(NUMBERS["gen_length"]))
    if longest + gen_length > positions:
        message = f"prompt and answer need {longest + gen_length} positions, {positions} fit"
        raise wrong(names[0], message, "context_length_exceeded")
    return gen_length


def _check_model(name, settings):
    if name not in (None, settings.model):
        message = f"model: expected {settings.model!r}, got {name!r}"
        raise Refused(404, message, param="model", code="model_not_found")


def _chat_tokens(messages, loaded) -> list[int]:
    """The messages' tokens, by the tokenizer's template, in transformers' sandbox."""
    try:
        text = loaded.chat(messages)
    except Exception as error:  # whatever a template raises
        message = str(error).removeprefix("messages: ")
        raise wrong("messages", f"the chat template refuses them: {message}") from None
    tokens = loaded.tokens(text, add_special_tokens=False)
    if not tokens:
        raise wrong("messages", "expected text, got none")
    return tokens


def number(kind: Number) -> Callable[[Any], Any]:
    """A reader of a JSON number; a text that spells one is none."""

    def read(value: Any) -> Any:
        if isinstance(value, str):
            raise UsageError(f"expected {kind.wanted}, got a text")
        return kind.read(value)

    return read


def a_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"expected true or false, got {_kind(value)}")
    return value


def a_text(value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"expected a text, got {_kind(value)}")
    return value


def a_rule(value: Any) -> str:
    """A rule of this project's own, written out: one of a module would run what that holds."""
    text = a_text(value)
    if ":" in text or len(text) > LONGEST_RULE:
        raise UsageError(f"expected a rule such as Frechet(0.25), got {text[:LONGEST_RULE]!r}")
    return text


def a_chat(value: Any) -> list[dict[str, str]]:
    """Messages of a role and a text each, which may come in parts."""
    if not isinstance(value, list) or not value:
        raise UsageError(f"expected a list of messages, got {_kind(value)}")
    return [_message(index, message) for index, message in enumerate(value)]


def _message(index, message):
    # An answer that is sent back names what it has none of, such as a refusal.
    given = message.items() if isinstance(message, dict) else ()
    message = {name: value for name, value in given if value is not None}
    if not {"role", "content"} <= message.keys():
        raise UsageError(f"[{index}]: expected role and content")
    unknown = sorted(message.keys() - {"role", "content", "name"})
    if unknown:
        raise UsageError(f"[{index}]: {unknown[0]} is not understood")
    role, content = message["role"], message["content"]
    if role not in ("system", "developer", "user", "assistant"):
        raise UsageError(f"[{index}]: expected a role of system, user or assistant")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        plain = isinstance(part, dict) and part.keys() == {"type", "text"}
        if not plain or part["type"] != "text" or not isinstance(part["text"], str):
            raise UsageError(f"[{index}]: expected a content of text alone")
    return {**message, "content": "".join(part["text"] for part in parts)}


def prompts_in(value: Any, loaded: TextModel) -> list[list[int]]:
    """The prompts as token ids: of a text, of several, of ids, or of several lists of ids."""
    several = isinstance(value, list) and bool(value) and not isinstance(value[0], int)
    found = [_prompt(prompt, loaded) for prompt in (value if several else [value])]
    if not all(found):
        raise UsageError("expected text or token ids, got an empty prompt")
    return found


def _prompt(prompt, loaded):
    if isinstance(prompt, str):
        return loaded.tokens(prompt)
    vocabulary = loaded.model.config.vocab_size
    if not isinstance(prompt, list) or any(type(token) is not int for token in prompt):
        raise UsageError(f"expected text or token ids, got {_kind(prompt)}")
    if any(not 0 <= token < vocabulary for token in prompt):
        raise UsageError(f"expected ids in [0, {vocabulary})")
    return prompt


def stop_strings(value: Any) -> tuple[str, ...]:
    """The strings that end an answer: one, or a list of a few."""
    stops: Sequence[Any] = value if isinstance(value, list) else [value]
    if len(stops) > MOST_STOPS:
        raise UsageError(f"expected at most {MOST_STOPS} strings, got {len(stops)}")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= LONGEST_STOP:
            raise UsageError(f"expected strings of 1 to {LONGEST_STOP} characters")
    return tuple(stops)


def _includes_usage(value):
    if not isinstance(value, dict):
        raise UsageError(f"expected an object, got {_kind(value)}")
    unknown = sorted(value.keys() - {"include_usage", "include_obfuscation"})
    if unknown or value.get("include_obfuscation"):
        raise UsageError(f"{(unknown or ['include_obfuscation'])[0]} is not understood")
    return a_bool(value.get("include_usage", False))


def _no_alternatives(value):
    """The legacy count of alternatives to each token, of which none are kept."""
    if isinstance(value, bool) or value != 0:
        raise UsageError("expected 0: of the committed token, without alternatives")
    return 0


def _kind(value: Any) -> str:
    """What a JSON value is, in words; never the value, which may be private."""
    words = {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
    if value is None:
        return "null"
    return words.get(type(value), "a number")
