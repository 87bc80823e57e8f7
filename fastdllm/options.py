"""Options as people write them: numbers, devices, dtypes, and the rule that they choose.

The command line and lm-eval read theirs here, so that a word means the same in both. What is not
taken raises UsageError, "expected ..., got ..."; whoever knows the option's name puts it in front.
"""

import ast
import importlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, NamedTuple

import torch

from fastdllm_kernels import Quota, Threshold, rules
from fastdllm_kernels.rules import FLOAT32, LARGEST_COUNT, SMALLEST_FLOAT32

from .checkpoint import dtype_named


class UsageError(ValueError):
    """The call is wrong, not what was called: exit code 2 on the command line."""


def named(name: str, read: Callable[[Any], Any], value: Any) -> Any:
    """What `read` makes of the value of the option `name`, which goes into its UsageError."""
    try:
        return read(value)
    except UsageError as error:
        raise UsageError(f"{name}: {error}") from None


@dataclass(frozen=True)
class Number:
    """A numeric option.

    kind: int or float. wanted: what may be given, in words. accepts: whether a number may be given.
    float32: kernels compute with it in float32, which must neither overflow nor make it 0.
    """

    kind: type[int] | type[float]
    wanted: str
    accepts: Callable[[float], bool]
    float32: bool = False

    def read(self, value: Any) -> Any:
        """The number that `value` is or, as text, says; UsageError for any other."""
        number = self._parsed(value)
        if number is None or not self.accepts(number):
            raise UsageError(f"expected {self.wanted}, got {value!r}")
        if self.float32 and number and not SMALLEST_FLOAT32 <= abs(number) <= FLOAT32.max:
            raise UsageError(f"expected {self.wanted} that float32 holds, got {value!r}")
        return number

    def _parsed(self, value):
        """The value as a number of the kind, or None."""
        if isinstance(value, bool):
            return None
        try:
            number = self.kind(value)
        except (TypeError, ValueError, OverflowError):
            return None
        if not isinstance(value, str) and number != value:
            return None  # int() drops a fraction
        return number


COUNT = Number(int, "an integer >= 1", lambda number: number >= 1)
# Negative entropies are below 0, and so is a threshold for them.
ENTROPY_THRESHOLD = Number(float, "a number", lambda number: not math.isnan(number), float32=True)
NUMBERS: dict[str, Number] = {
    "threshold": Number(float, "a number >= 0", lambda number: number >= 0, float32=True),
    "factor": Number(float, "a number > 0", lambda number: number > 0, float32=True),
    "steps": Number(
        int, f"an integer in [1, {LARGEST_COUNT}]", lambda number: 1 <= number <= LARGEST_COUNT
    ),
    "gen_length": COUNT,
    "block_length": COUNT,
    "temperature": Number(float, "a number >= 0", lambda number: 0 <= number < math.inf),
    "top_p": Number(float, "a number in (0, 1]", lambda number: 0 < number <= 1),
    "top_k": Number(int, "an integer >= 1, or 0 or -1 for none", lambda number: number >= -1),
    "seed": Number(int, "an integer in [0, 2**63)", lambda number: 0 <= number < 2**63),
}


def read_device(value: Any) -> str:
    """A device that torch has here: "cpu", "cuda" or "cuda:N"."""
    parts = re.fullmatch(r"(cpu|cuda)(?::(\d+))?", value) if isinstance(value, str) else None
    if parts is None or (parts[1] == "cpu" and parts[2]):
        raise UsageError(f"expected cpu, cuda or cuda:N, got {value!r}")
    if parts[1] == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise UsageError(f"expected cpu, since torch sees no GPU here, got {value!r}")
        if int(parts[2] or 0) >= count:
            raise UsageError(f"expected cuda:0 to cuda:{count - 1}, got {value!r}")
    return value


def read_word(known: Iterable[str]) -> Callable[[Any], str]:
    """A reader of one of the `known` words."""
    words = tuple(known)

    def read(value: Any) -> str:
        if not isinstance(value, str) or value not in words:
            raise UsageError(f"expected one of {', '.join(words)}, got {value!r}")
        return value

    return read


def read_dtype(value: Any) -> Any:
    """A dtype, or the name of one, that `fastdllm.load` takes."""
    try:
        dtype_named(value)
    except ValueError as error:
        raise UsageError(str(error).removeprefix("dtype: ")) from None
    return value


# Rules.


class RuleOption(NamedTuple):
    """An option that chooses a rule by its one number: how to make it, and words about it."""

    make: Callable[[Any], Any]
    words: str
    help: str


# Any other rule is written out: see `read_rule`.
RULES: dict[str, RuleOption] = {
    "threshold": RuleOption(Threshold, "threshold {:g}", "commit what is this sure (0.9)"),
    "factor": RuleOption(
        rules.Factor,
        "factor {:g}",
        "commit the n surest with (n + 1)(1 - confidence) <= FACTOR",
    ),
    "steps": RuleOption(Quota, "{} steps a block", "spread each block over so many steps"),
}
DEFAULT_RULE = ("threshold", 0.9)


class ChosenRule(NamedTuple):
    """A rule as `generate` takes it, and the same in words."""

    rule: Any
    words: str


def choose_rule(given: Mapping[str, Any]) -> ChosenRule:
    """The rule that options choose, each a name in RULES or "rule"; None is not given.

    UsageError where two choose one.
    """
    names = [name for name in (*RULES, "rule") if given.get(name) is not None]
    if len(names) > 1:
        raise UsageError(f"{names[1]}: expected one rule, but {names[0]} is given too")
    if names == ["rule"]:
        return ChosenRule(named("rule", read_rule, given["rule"]), given["rule"])
    name, value = (names[0], given[names[0]]) if names else DEFAULT_RULE
    option = RULES[name]
    return ChosenRule(_made(option.make, value), option.words.format(value))


def read_rule(text: Any) -> Any:
    """A rule written as Python would call it: 'Factor(1.0)', 'Quota(steps=8, schedule="dream")'.

    Names are those of fastdllm_kernels.rules. 'module:Name(...)' is one of the user's own, imported
    from there, and 'module:name' a function that is the rule.
    """
    written = text if isinstance(text, str) else ""
    parts = re.fullmatch(r"(?:([\w.]+):)?(\w+)\s*(\(.*\))?\s*", written)
    if parts is None:
        raise UsageError(f"expected a rule such as Threshold(0.9), got {text!r}")
    module, name, call = parts.groups()
    found = _from_module(module, name) if module else _own_rules().get(name)
    if found is None:
        raise UsageError(f"expected {', '.join(_own_rules())} or module:name, got {text!r}")
    if call is None and not isinstance(found, type):
        return found
    arguments, keywords = _arguments(call or "()", text)
    return _made(found, *arguments, **keywords)


def _own_rules():
    """The rules of fastdllm_kernels by their names: the dataclasses there that have a commit."""
    return {
        name: value
        for name, value in vars(rules).items()
        if isinstance(value, type) and is_dataclass(value) and hasattr(value, "commit")
    }


def _from_module(module, name):
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise UsageError(
            f"expected a module that can be imported, got {module} ({error})"
        ) from None


def _arguments(call, text):
    """The positional and keyword arguments of a call, all literals."""
    try:
        tree = ast.parse(f"rule{call}", mode="eval").body
        if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
            raise ValueError("not one call")
        arguments = [ast.literal_eval(argument) for argument in tree.args]
        keywords = {str(word.arg): ast.literal_eval(word.value) for word in tree.keywords}
    except (SyntaxError, ValueError):
        raise UsageError(f"expected numbers and texts in the parentheses, got {text!r}") from None
    return arguments, keywords


def _made(make, *arguments, **keywords):
    try:
        return make(*arguments, **keywords)
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(str(error)) from error
