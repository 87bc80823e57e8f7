"""fastdllm/serve/ without a network: what a request's JSON asks for, or which parameter it is
refused by; how an answer's text grows.
"""

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastdllm
from fastdllm import Engine, EngineClosed, Factor, Neighbours, Quota, Threshold, text
from fastdllm.serve import asked as reading
from fastdllm.serve.errors import Refused
from fastdllm.serve.service import Service, service_of
from fastdllm.serve.settings import Settings
from fastdllm.serve.shapes import Shape
from fastdllm.serve.writing import Writing, cut, held

QUESTION = (
    "Tom has $500 and buys a lamp for $120 and a coat for $99. How many dollars does Tom have left?"
)
CHAT = {"messages": [{"role": "user", "content": QUESTION}]}
SETTINGS = Settings(model="tiny-llada", positions=256, gen_length=128, choices=4)


@pytest.fixture(scope="module")
def loaded():
    return text.load("tiny-llada", "cpu")


def read(loaded, body, settings=SETTINGS):
    reader = reading.read_chat if "messages" in body else reading.read_completion
    return reader(reading.parsed(json.dumps(body).encode()), loaded, settings)


def test_a_chat_is_read(loaded):
    body = {
        **CHAT,
        "model": "tiny-llada",
        "max_tokens": 64,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "stop": "####",
        "n": 2,
        "logprobs": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "steps": 4,
        "user": "somebody",
        "presence_penalty": 0.0,
        "tools": None,
    }
    asked = read(loaded, body)
    assert asked.prompts == [loaded.encode(QUESTION)]
    rule = asked.options.pop("rule")
    assert isinstance(rule, Quota) and rule.steps == 4
    assert asked.options == {"temperature": 0.5, "top_p": 0.9, "seed": 7, "gen_length": 64}
    assert asked.stops == ("####",) and asked.n == 2
    assert asked.logprobs and asked.stream and asked.usage and asked.chat


def test_what_is_not_said_is_the_servers(loaded):
    asked = read(loaded, CHAT)
    assert asked.options == {
        "temperature": 0.0,
        "top_p": None,
        "seed": None,
        "gen_length": 128,
        "rule": SETTINGS.rule,
    }
    parts = [{"type": "text", "text": QUESTION[:9]}, {"type": "text", "text": QUESTION[9:]}]
    spelled = read(loaded, {"messages": [{"role": "user", "content": parts}]})
    assert spelled.prompts == asked.prompts
    long = read(loaded, {"prompt": [5] * 200})
    assert long.options["gen_length"] == 56


@pytest.mark.parametrize("name, rule", [("threshold", Threshold), ("factor", Factor)])
def test_a_rule_of_the_requests_own(loaded, name, rule):
    chosen = read(loaded, CHAT | {name: 0.5}).options["rule"]
    assert isinstance(chosen, rule) and getattr(chosen, name, 0.5) == 0.5
    assert read(loaded, CHAT | {name: 0.5}).options["rule"] is chosen  # rows of one launch share it


def test_a_rule_may_be_written_out(loaded):
    written = {"rule": "Neighbours(0.8, distance=2)"}
    rule = read(loaded, CHAT | written).options["rule"]
    assert (type(rule), rule.anchor, rule.distance) == (Neighbours, 0.8, 2)
    assert read(loaded, CHAT | written).options["rule"] is rule


@pytest.mark.parametrize(
    "prompt, wanted",
    [
        ("Hello", 1),
        (["Hello", "Answer:"], 2),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        (["Hello", [7]], 2),
    ],
)
def test_prompts_are_text_or_ids(loaded, prompt, wanted):
    prompts = read(loaded, {"prompt": prompt}).prompts
    assert len(prompts) == wanted if isinstance(wanted, int) else prompts == wanted


WRONG = [
    ("max_tokens", 0),
    ("max_tokens", 10**6),
    ("max_tokens", "64"),
    ("max_tokens", 6.5),
    ("max_completion_tokens", -1),
    ("temperature", -1),
    ("temperature", "hot"),
    ("temperature", True),
    ("top_p", 0),
    ("top_p", 1.1),
    ("seed", -1),
    ("seed", 2**63),
    ("n", 0),
    ("n", 5),
    ("stop", ""),
    ("stop", 3),
    ("stop", ["a"] * 17),
    ("stop", "a" * 257),
    ("logprobs", "yes"),
    ("top_logprobs", 3),
    ("stream", "yes"),
    ("stream_options", {"include_usage": True}),
    ("threshold", -0.1),
    ("factor", 0),
    ("steps", 0),
    ("steps", 2.5),
    ("rule", "Nothing(1)"),
    ("rule", "Frechet(2)"),
    ("rule", "os:getcwd"),
    ("rule", "Quota(" + "(" * 200),
    ("rule", 0.9),
    ("presence_penalty", 0.5),
    ("frequency_penalty", 1),
    ("logit_bias", {"5": 1}),
    ("response_format", {"type": "json_object"}),
    ("tools", [{"type": "function"}]),
    ("reasoning_effort", "high"),
    ("min_p", 0.1),
    ("messages", []),
    ("messages", "hello"),
    ("messages", [{"role": "user"}]),
    ("messages", [{"role": "user", "content": None}]),
    ("messages", ["hello"]),
    ("messages", [{"role": "tool", "content": "x"}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
    ("messages", [{"role": "user", "content": "x", "tool_calls": []}]),
    ("messages", [{"role": "user", "content": "many words " * 200}]),
    ("messages", [{"role": "user", "content": "\udc80"}]),
    ("prompt", ""),
    ("prompt", []),
    ("prompt", [[]]),
    ("prompt", [482]),
    ("prompt", [-1]),
    ("prompt", [1.5]),
    ("prompt", {"a": 1}),
    ("prompt", [5] * 256),
]


@pytest.mark.parametrize(
    "name, value", WRONG, ids=[f"{name}={value!r:.30}" for name, value in WRONG]
)
def test_what_is_not_understood_is_refused_by_its_name(loaded, name, value):
    body = {"prompt": value} if name == "prompt" else CHAT | {name: value}
    with pytest.raises(Refused) as refused:
        read(loaded, body)
    error = refused.value.body()["error"]
    assert refused.value.status == 400 and error["param"] == name
    assert error["message"].startswith(f"{name}: ") and error["type"] == "invalid_request_error"


def test_refusals_of_more_than_one_parameter(loaded):
    for body, param, status in (
        (CHAT | {"steps": 4, "threshold": 0.9}, "steps", 400),
        (CHAT | {"max_tokens": 4, "max_completion_tokens": 4}, "max_tokens", 400),
        (CHAT | {"rule": "Frechet(0.25)", "threshold": 0.9}, "rule", 400),
        (CHAT | {"rule": "EntropyBound(0.05)", "logprobs": True}, "logprobs", 400),
        (CHAT | {"model": "another"}, "model", 404),
        ({"prompt": ["a", "b"], "n": 3}, "n", 400),
        ({"prompt": "a", "logprobs": 2}, "logprobs", 400),
        ({"prompt": "a", "echo": True}, "echo", 400),
        ({"prompt": "a", "suffix": "b"}, "suffix", 400),
        ({}, "prompt", 400),
    ):
        with pytest.raises(Refused) as refused:
            read(loaded, body)
        assert (refused.value.param, refused.value.status) == (param, status)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'"text"', b"\xff", b'{"n": NaN}', b"[" * 10**5]
)
def test_a_body_that_is_no_json_object(body):
    with pytest.raises(Refused) as refused:
        reading.parsed(body)
    assert refused.value.status == 400


def test_an_answer_can_be_sent_back_as_it_came(loaded):
    turns = [*CHAT["messages"], {"role": "assistant", "content": "281"}, CHAT["messages"][0]]
    wanted = read(loaded, {"messages": turns}).prompts
    turns[1] = {**turns[1], "refusal": None, "tool_calls": None}
    assert read(loaded, {"messages": turns}).prompts == wanted


def test_a_template_runs_in_the_sandbox(loaded, monkeypatch):
    for template in (
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('no such role') }}",
        "{{ 1 / 0 }}",
    ):
        monkeypatch.setattr(loaded.tokenizer, "chat_template", template)
        with pytest.raises(Refused) as refused:
            read(loaded, CHAT)
        assert refused.value.param == "messages"


# Text.


class Words:
    """A TextModel whose token i is the i-th word; -1 ends the text."""

    def __init__(self, *words):
        self.words = words

    def written(self, tokens):
        return list(tokens[: tokens.index(-1)]) if -1 in tokens else list(tokens)

    def decode(self, tokens):
        return "".join(self.words[token] for token in tokens)


def test_a_stop_string_is_held_back_until_it_is_none():
    writing = Writing(Words("one ", "#", "#", "# two ", "###", "# three"), ["####"])
    steps = [writing.add(list(range(count + 1))) for count in range(6)]
    assert steps == ["one ", "", "", "### two ", "", ""]
    assert writing.stopped and writing.text == "one ### two " and writing.tokens() == [0, 1, 2, 3]
    assert writing.ends([0, 4, 5]) and not writing.ends([0, 1, 2])


def test_tokens_are_those_that_spell_the_text():
    writing = Writing(Words("ab", "cd", "ef"), ["d"])
    assert writing.add([0]) == "ab" and writing.tokens() == [0]
    assert writing.add([0, 1, 2, -1], last=True) == "c" and writing.tokens() == [0, 1]
    assert Writing(Words("x"), ["x"]).add([0], last=True) == ""


def test_the_end_gives_out_what_was_held():
    writing = Writing(Words("a", "#", "\ufffd"), ["##"])
    assert writing.add([0, 1]) == "a" and not writing.stopped
    assert writing.add([0, 1, 2]) == "#"
    assert writing.add([0, 1, 2, -1, -1], last=True) == "\ufffd"
    assert writing.stopped and writing.tokens() == [0, 1, 2]


def test_nothing_is_taken_back():
    class Changing(Words):
        def decode(self, tokens):
            return ["a", "b c", "a b"][len(tokens) - 1]

    writing = Writing(Changing())
    assert [writing.add([0] * count) for count in (1, 2, 3)] == ["a", "", " b"]


def test_cut_and_held():
    assert cut("a stop b end", ["end", "stop"]) == ("a ", True)
    assert cut("a", []) == ("a", False)
    assert held("abcab", ["abx", "cabd"]) == 3
    assert held("abc", ["x"]) == 0


# Answers, without HTTP.


async def pieces_of(service, asked):
    return [piece async for piece in service.answers(asked)]


@pytest.mark.parametrize("stream", [False, True])
def test_answers_are_those_of_generate(loaded, stream):
    asked = read(loaded, CHAT | {"stream": stream, "n": 2, "logprobs": True})
    done = fastdllm.generate(loaded.model, asked.prompts, gen_length=128)
    written = loaded.written(done.tokens[0][len(asked.prompts[0]) :])
    with Engine(loaded.model, rows=2, positions=256) as engine:
        service = Service(loaded, engine, SETTINGS)
        pieces = asyncio.run(pieces_of(service, asked))
        shape = Shape(asked, loaded, SETTINGS)
        for index in (0, 1):
            mine = [piece for piece in pieces if piece.answer.index == index]
            assert "".join(piece.text for piece in mine) == loaded.decode(written)
            assert [token for piece in mine for _, token in piece.tokens] == written
            assert mine[-1].last and mine[-1].answer.finish_reason == "stop"
            assert len(mine) == 1 or stream
        answers = [piece.answer for piece in pieces if piece.last]
        spent = shape.last_chunk(answers)
        assert spent["forwards"] == 2 * int(done.nfe) and spent["choices"] == []
        assert spent["usage"]["completion_tokens"] == 2 * len(written)
        service.close()


def test_logprobs_are_of_the_distribution_that_committed(loaded):
    """Against the model's own plain forward of the canvas as it was: the first forward's tokens."""
    asked = read(loaded, CHAT | {"logprobs": True, "threshold": 0.5})
    events = []
    options = {"gen_length": 128, "rule": Threshold(0.5), "on_step": events.append}
    fastdllm.generate(loaded.model, asked.prompts, **options)
    prompt = asked.prompts[0]
    canvas = torch.tensor([prompt + [loaded.model.config.mask_id] * 128])
    logits = loaded.model.logits(canvas)[0].log_softmax(-1)
    with Engine(loaded.model, rows=1, positions=256) as engine:
        service = Service(loaded, engine, SETTINGS)
        (piece,) = asyncio.run(pieces_of(service, asked))
        service.close()
    found = {place: piece.answer.logprob(place) for place, _ in piece.tokens}
    first = events[0]
    places = (first.positions - len(prompt)).tolist()
    assert len(places) > 5
    for place, token in zip(places, first.token_ids.tolist(), strict=True):
        assert found[place] == pytest.approx(float(logits[len(prompt) + place, token]), abs=1e-4)


def test_a_full_line_takes_none_of_several(loaded):
    hold = threading.Event()
    with Engine(loaded.model, rows=1, positions=256, queue=2) as engine:
        service = Service(loaded, engine, SETTINGS)
        busy = engine.submit([5], gen_length=4, on_step=lambda event: hold.wait(10))
        with pytest.raises(Refused) as refused:
            asyncio.run(pieces_of(service, read(loaded, {"prompt": [5], "n": 4})))
        assert refused.value.status == 429 and int(refused.value.headers["Retry-After"]) >= 1
        hold.set()
        busy.result(10)
        assert engine.stats()["waiting"] == 0
        service.close()


def test_more_answers_than_the_line_takes_are_no_matter_of_time(loaded):
    service = service_of(loaded, SETTINGS, rows=1, cache="dual", queue=2)
    with pytest.raises(Refused) as refused:
        read(loaded, {"prompt": [5], "n": 3}, service.settings)
    assert refused.value.status == 400 and refused.value.param == "n"
    service.close()


def test_a_service_that_ends_does_not_wait_for_its_warm_up(loaded, monkeypatch):
    began = threading.Event()

    def endless(forward, schedule, tell, **options):
        for number in range(1000):
            began.set()
            tell("capturing forwards", number, 1000)
            time.sleep(0.01)

    monkeypatch.setattr("fastdllm.engine.warm_forward", endless)
    service = service_of(loaded, SETTINGS, rows=1, cache="dual", queue=2)
    with ThreadPoolExecutor(1) as threads:
        warming = threads.submit(service.warm_up)
        assert began.wait(10)
        service.close()
        with pytest.raises(EngineClosed):
            warming.result(1)
    assert not service.ready
