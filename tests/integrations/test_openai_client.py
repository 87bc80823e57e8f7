"""The server under OpenAI's own client, on 127.0.0.1 with the embedded model: answers are those of
`generate`, errors name what is wrong, and whatever a client does, the others get theirs.
"""

import hmac
import http.client
import itertools
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))

import openai  # noqa: E402
from serving import free_port, serving, wait_until  # noqa: E402

import fastdllm  # noqa: E402
from fastdllm import Factor, Quota, Threshold, text  # noqa: E402

QUESTIONS = [
    "Tom has $500 and buys a lamp for $120 and a coat for $99. "
    "How many dollars does Tom have left?",
    "There are 510 people on a train. Then 394 leave and 79 get on at the first stop. "
    "How many people does the train have now?",
]
MESSAGES = [{"role": "user", "content": QUESTIONS[0]}]
SLOW = {"steps": 32}  # one token a forward


@pytest.fixture(scope="module")
def loaded():
    return text.load("tiny-llada", "cpu")


@pytest.fixture(scope="module")
def served(loaded):
    with serving(loaded) as found:
        yield found


@pytest.fixture(scope="module")
def client(served):
    return served.client()


def expected(loaded, prompt, gen_length=128, **options):
    """(text, tokens, forwards) of `generate` for a question or for ids."""
    ids = loaded.encode(prompt) if isinstance(prompt, str) else prompt
    done = fastdllm.generate(loaded.model, [ids], gen_length=gen_length, **options)
    written = loaded.written(done.tokens[0][len(ids) :])
    return loaded.decode(written), len(written), int(done.nfe)


# Answers.


def test_a_chat_gets_what_generate_gives(loaded, client):
    done = client.chat.completions.create(model="tiny-llada", messages=MESSAGES, max_tokens=128)
    answer, tokens, forwards = expected(loaded, QUESTIONS[0])
    (choice,) = done.choices
    assert choice.message.content == answer and "#### 281" in answer
    assert choice.finish_reason == "stop" and choice.message.role == "assistant"
    assert done.usage.completion_tokens == tokens
    assert done.usage.prompt_tokens == len(loaded.encode(QUESTIONS[0]))
    assert done.usage.total_tokens == done.usage.prompt_tokens + tokens
    assert done.forwards == forwards


def test_an_answer_is_sent_back_as_the_client_holds_it(loaded, client):
    options = {"model": "tiny-llada", "max_tokens": 64}
    message = client.chat.completions.create(messages=MESSAGES, **options).choices[0].message
    turns = [*MESSAGES, {"role": "assistant", "content": message.content}, *MESSAGES]
    done = client.chat.completions.create(messages=[*MESSAGES, message, *MESSAGES], **options)
    ids = loaded.tokens(loaded.chat(turns), add_special_tokens=False)
    assert done.usage.prompt_tokens == len(ids)
    assert done.choices[0].message.content == expected(loaded, ids, 64)[0]


def test_an_answer_that_is_cut_has_its_length(loaded, client):
    done = client.chat.completions.create(model="tiny-llada", messages=MESSAGES, max_tokens=20)
    answer, tokens, _ = expected(loaded, QUESTIONS[0], 20)
    assert done.choices[0].finish_reason == "length" and tokens == 20
    assert done.choices[0].message.content == answer


def test_completions_take_text_and_ids_one_and_several(loaded, client):
    prompts = [f"Question: {question} Answer:" for question in QUESTIONS]
    ids = [loaded.tokens(prompt) for prompt in prompts]
    answers = [expected(loaded, prompt)[0] for prompt in ids]
    for prompt, wanted in (
        (prompts[0], answers[:1]),
        (prompts, answers),
        (ids[1], answers[1:]),
        (ids, answers),
    ):
        done = client.completions.create(model="tiny-llada", prompt=prompt, max_tokens=128, n=2)
        assert [choice.index for choice in done.choices] == list(range(2 * len(wanted)))
        assert [choice.text for choice in done.choices[::2]] == wanted
        assert [choice.text for choice in done.choices[1::2]] == wanted


@pytest.mark.parametrize(
    "extra, rule",
    [
        ({"threshold": 0.5}, Threshold(0.5)),
        ({"factor": 1.5}, Factor(1.5)),
        ({"steps": 8}, Quota(8)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_rules_in_the_extra_body(loaded, client, extra, rule):
    done = client.chat.completions.create(
        model="tiny-llada", messages=MESSAGES, max_tokens=128, extra_body=extra
    )
    answer, _, forwards = expected(loaded, QUESTIONS[0], rule=rule)
    assert done.choices[0].message.content == answer and done.forwards == forwards


def test_sampling_is_that_of_generate(loaded, client):
    options = {"temperature": 3.0, "top_p": 0.99, "seed": 5}
    done = client.chat.completions.create(
        model="tiny-llada", messages=MESSAGES, max_completion_tokens=64, n=3, **options
    )
    wanted = [
        expected(loaded, QUESTIONS[0], 64, **options | {"seed": seed})[0] for seed in (5, 6, 7)
    ]
    assert [choice.message.content for choice in done.choices] == wanted
    assert len(set(wanted)) > 1


def test_a_stream_gives_final_tokens_only(loaded, client):
    answer, tokens, forwards = expected(loaded, QUESTIONS[0], rule=Quota(8))
    chunks = list(
        client.chat.completions.create(
            model="tiny-llada",
            messages=MESSAGES,
            max_tokens=128,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"steps": 8},
        )
    )
    *parts, last = chunks
    so_far = ""
    for part in parts:
        so_far += part.choices[0].delta.content
        assert answer.startswith(so_far) and part.usage is None
    assert so_far == answer and len(parts) > 3
    assert parts[0].choices[0].delta.role == "assistant"
    assert [part.choices[0].finish_reason for part in parts] == [None] * (len(parts) - 1) + ["stop"]
    assert last.choices == [] and last.usage.completion_tokens == tokens
    assert last.forwards == forwards and len({chunk.id for chunk in chunks}) == 1


def test_a_stream_of_several_answers(loaded, client):
    prompts = [loaded.encode(question) for question in QUESTIONS]
    texts = ["", ""]
    for chunk in client.completions.create(
        model="tiny-llada", prompt=prompts, max_tokens=128, stream=True
    ):
        assert chunk.usage is None
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [expected(loaded, prompt)[0] for prompt in prompts]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", ["####", ["dollars.\nOf", "never"], " The"])
def test_stop_strings_end_decoding(loaded, client, stop, stream):
    answer, _, forwards = expected(loaded, QUESTIONS[0], rule=Quota(32))
    first = stop if isinstance(stop, str) else stop[0]
    wanted = answer[: answer.index(first)]
    options = {"model": "tiny-llada", "messages": MESSAGES, "max_tokens": 128, "stop": stop}
    done = client.chat.completions.create(**options, stream=stream, extra_body=SLOW)
    if stream:
        parts = [chunk.choices[0] for chunk in done]
        assert "".join(part.delta.content for part in parts) == wanted
        assert parts[-1].finish_reason == "stop"
    else:
        assert done.choices[0].message.content == wanted
        assert done.choices[0].finish_reason == "stop"
        assert done.forwards < forwards
        assert loaded.decode(loaded.tokens(wanted)) == wanted
        assert abs(done.usage.completion_tokens - len(loaded.tokens(wanted))) <= 1


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(loaded, client, stream):
    answer, tokens, _ = expected(loaded, QUESTIONS[0])
    options = {"model": "tiny-llada", "messages": MESSAGES, "max_tokens": 128, "logprobs": True}
    done = client.chat.completions.create(**options, stream=stream)
    choices = [chunk.choices[0] for chunk in done] if stream else done.choices
    entries = [entry for choice in choices for entry in choice.logprobs.content]
    assert "".join(entry.token for entry in entries) == answer and len(entries) == tokens
    assert all(entry.logprob <= 0 for entry in entries) and entries[0].logprob > -1
    assert bytes(entries[0].bytes).decode() == entries[0].token
    old = client.completions.create(
        model="tiny-llada", prompt=loaded.encode(QUESTIONS[0]), max_tokens=128, logprobs=0
    ).choices[0]
    assert old.logprobs.tokens == [entry.token for entry in entries]
    assert old.logprobs.token_logprobs == pytest.approx([entry.logprob for entry in entries])
    places = zip(old.logprobs.text_offset, old.logprobs.tokens, strict=True)
    assert all(old.text[place:].startswith(token) for place, token in places)


# Refusals and limits.


def test_errors_have_openais_shape_and_name_the_parameter(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny-llada", messages=MESSAGES, presence_penalty=1.0)
    assert error.value.param == "presence_penalty" and error.value.code == "unsupported"
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert error.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny-llada", messages=MESSAGES, max_tokens=2000)
    assert error.value.code == "context_length_exceeded"


def test_a_large_body_is_refused(served):
    body = json.dumps({"prompt": "a" * 2_000_000})
    status, found, _ = ask(served, "/v1/completions", body)
    assert status == 400 and found["error"]["code"] == "body_too_large"


def test_only_json_is_read(served):
    status, found, _ = ask(served, "/v1/completions", '{"prompt": "a"}', content="text/plain")
    assert status == 400 and "Content-Type" in found["error"]["message"]
    status, found, _ = ask(served, "/v1/completions", "{")
    assert status == 400 and "JSON" in found["error"]["message"]
    for path in ("/nothing", "/v1/chat"):
        status, found, _ = ask(served, path, "{}")
        assert status == 404 and found["error"]["type"] == "not_found_error"
    status, found, _ = ask(served, "/v1/completions", None)
    assert status == 405


def ask(served, path, body, content="application/json", headers=None):
    """(status, JSON, headers) of a request with this body; None: without one."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    method = "GET" if body is None else "POST"
    connection.request(method, path, body, {"Content-Type": content, **(headers or {})})
    response = connection.getresponse()
    found = response.read()
    connection.close()
    kind = response.headers.get("content-type", "")
    return response.status, json.loads(found) if "json" in kind else found, response.headers


def test_the_pages_canvas_and_its_policy(loaded, served):
    status, page, headers = ask(served, "/", None)
    assert status == 200 and b"<!doctype html>" in page
    assert "default-src 'none'" in headers["content-security-policy"]
    body = {"messages": MESSAGES, "max_tokens": 128}
    status, found, _ = ask(served, "/canvas", json.dumps(body | {"vanilla": True}))
    parts = [line[6:] for line in found.decode().splitlines() if line.startswith("data: ")]
    shape, *steps, last = map(json.loads, parts)
    answer, tokens, forwards = expected(loaded, QUESTIONS[0], cache="none", rule=Quota(32))
    assert shape == {"gen_length": 128, "block_length": 32}
    assert (last["text"], last["tokens"], last["forwards"]) == (answer, tokens, forwards)
    assert len(steps) == forwards and all(len(step["cells"]) == 1 for step in steps)
    for name, value in {"n": 2, "stop": "a", "vanilla": 3, "min_p": 1}.items():
        status, found, _ = ask(served, "/canvas", json.dumps(body | {name: value}))
        assert status == 400 and found["error"]["param"] == name
    assert ask(served, "/openapi.json", None)[0] == ask(served, "/docs", None)[0] == 404


def test_a_full_line_says_when_to_come_again(loaded):
    hold = threading.Event()
    with serving(loaded, rows=1, queue=1) as served:
        client = served.client()
        busy = served.engine.submit([5], gen_length=4, on_step=lambda event: hold.wait(20))
        wait_until(lambda: served.engine.stats()["busy"] == 1)
        waiting = served.engine.submit([5], gen_length=4)
        with pytest.raises(openai.RateLimitError) as error:
            client.completions.create(model="tiny-llada", prompt=[5], max_tokens=4)
        assert int(error.value.response.headers["retry-after"]) >= 1
        hold.set()
        waiting.result(20), busy.result(20)
        assert client.completions.create(model="tiny-llada", prompt=[5], max_tokens=4).choices


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_row(served, client, stream):
    wait_until(lambda: served.engine.stats()["busy"] == 0)
    before = served.engine.stats()
    body = {"prompt": [5] * 8, "max_tokens": 1000, "stream": stream, "steps": 32}
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    if stream:
        connection.getresponse().readline()
    else:
        wait_until(lambda: served.engine.stats()["busy"] == 1)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    gone = served.engine.stats()
    wait_until(lambda: served.engine.stats()["busy"] == 0, 5)
    stats = served.engine.stats()
    assert stats["finished"] == before["finished"] + 1
    # Those of a thousand in which the server has yet to see that the client is gone.
    assert stats["turns"] - gone["turns"] < 20


@pytest.mark.parametrize("stream", [False, True])
def test_a_nan_gets_500_and_the_server_lives(loaded, served, client, stream, monkeypatch):
    embedding = loaded.model.embedding.weight.detach().clone()
    embedding[3] = float("nan")
    monkeypatch.setattr(loaded.model.embedding.weight, "data", embedding)
    options = {"model": "tiny-llada", "max_tokens": 16, "stream": stream}
    with pytest.raises(openai.InternalServerError, match="NaN"):
        client.completions.create(prompt=[3, 4], **options)
    assert client.completions.create(prompt=[4, 5], max_tokens=4, model="tiny-llada").choices


def test_a_failure_in_a_stream_is_an_event_of_it(loaded, served, client, monkeypatch):
    heads, head = itertools.count(), loaded.model.head

    def breaks(hidden):
        """The second block is not finished."""
        return head(hidden) * (float("nan") if next(heads) == 50 else 1.0)

    monkeypatch.setattr(loaded.model, "head", breaks)
    stream = client.chat.completions.create(
        model="tiny-llada", messages=MESSAGES, max_tokens=128, stream=True, extra_body=SLOW
    )
    assert next(iter(stream)).choices[0].delta.content
    with pytest.raises(openai.APIError, match="NaN"):
        list(stream)
    assert client.models.list().data[0].id == "tiny-llada"


# Keys, origins, probes.


def test_a_key_is_asked_for_and_compared_in_constant_time(loaded, monkeypatch):
    compared, compare = [], hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append(b) or compare(a, b))
    with serving(loaded, rows=1, key="a-secret") as served:
        options = {"model": "tiny-llada", "prompt": [5], "max_tokens": 4}
        for key in ("wrong", "a-secret-", "A-secret"):
            with pytest.raises(openai.AuthenticationError) as error:
                served.client(key).completions.create(**options)
            assert error.value.code == "invalid_api_key"
        assert served.client("a-secret").completions.create(**options).choices
        assert compared == [b"a-secret"] * 4
        assert ask(served, "/v1/models", None)[0] == 401
        assert ask(served, "/metrics", None)[0] == 401
        assert ask(served, "/health", None)[0] == 200


def test_other_origins_read_nothing_unless_they_are_named(loaded, served):
    origin = {"Origin": "http://elsewhere.test"}
    headers = ask(served, "/v1/models", None, headers=origin)[2]
    assert "access-control-allow-origin" not in headers
    with serving(loaded, rows=1, origins=("http://elsewhere.test",)) as named:
        headers = ask(named, "/v1/models", None, headers=origin)[2]
        assert headers["access-control-allow-origin"] == "http://elsewhere.test"
        other = ask(named, "/v1/models", None, headers={"Origin": "http://other.test"})[2]
        assert "access-control-allow-origin" not in other


def test_it_is_ready_when_it_is_warm(loaded):
    with serving(loaded, rows=1, positions=64, gen_length=16, warm=True) as served:
        assert ask(served, "/health", None)[0] == 200
        status, found, _ = ask(served, "/ready", None)
        assert status == 503 and found["error"]["code"] == "not_ready"
        wait_until(lambda: ask(served, "/ready", None)[0] == 200, 60)
        served.engine.close()
        assert ask(served, "/health", None)[0] == ask(served, "/ready", None)[0] == 503
        body = json.dumps({"prompt": [5], "max_tokens": 4})
        assert ask(served, "/v1/completions", body)[0] == 503


def test_metrics_are_the_engines(served, client):
    client.completions.create(model="tiny-llada", prompt=[5], max_tokens=4)
    _, found, headers = ask(served, "/metrics", None)
    assert headers["content-type"].startswith("text/plain")
    values = dict(
        line.rsplit(" ", 1) for line in found.decode().splitlines() if not line.startswith("#")
    )
    stats = served.engine.stats()
    assert float(values["fastdllm_rows"]) == 8
    assert float(values["fastdllm_tokens_total"]) == stats["tokens"] > 0
    assert float(values["fastdllm_cached_steps_total"]) == stats["cached_steps"]
    answered = 'fastdllm_http_requests_total{path="/v1/completions",status="200"}'
    assert float(values[answered]) >= 1
    ask(served, "/v1/../secret", None)
    assert b"secret" not in ask(served, "/metrics", None)[1]


# A process of its own: signals and the log.


class Process:
    """`fastdllm serve` on a free port."""

    def __init__(self, *arguments, **environment):
        self.port = free_port()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fastdllm", "serve", "--port", str(self.port), *arguments],
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            wait_until(self._listens, 60)
        except AssertionError:
            self.process.kill()
            raise

    def _listens(self):
        assert self.process.poll() is None, self.process.stderr.read()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def ended(self):
        """(exit code, all it has printed)."""
        out, log = self.process.communicate(timeout=60)
        return self.process.returncode, out + log


def test_sigterm_drains_and_nothing_private_is_logged():
    server = Process("--rows", "2", "--api-key-env", "KEY", "--debug", KEY="very-secret")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="very-secret")
    question = [{"role": "user", "content": "a private matter"}]
    stream = client.chat.completions.create(
        model="tiny-llada", messages=question, max_tokens=200, stream=True, extra_body=SLOW
    )
    parts = [next(iter(stream))]
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="other-secret").models.list()
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny-llada", messages=question, max_tokens=9000)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    with socket.socket() as late:
        assert late.connect_ex(("127.0.0.1", server.port)) != 0
    parts += list(stream)
    assert parts[-1].choices[0].finish_reason
    code, printed = server.ended()
    assert code == 0
    assert not [word for word in ("secret", "private", "matter") if word in printed]


@pytest.mark.skipif(not shutil.which("curl"), reason="there is no curl")
def test_the_curl_line_of_the_readme(served):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (line,) = [line for line in text.splitlines() if line.startswith("curl ")]
    command = shlex.split(line.replace(":8000", f":{served.port}"))
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert "#### 281" in found["choices"][0]["text"] and found["forwards"] > 0


def test_a_drain_ends_and_so_does_the_server():
    """Those whose time is over are told so, and the log holds no traceback."""
    server = Process("--rows", "2", "--drain-seconds", "1")
    # So hot that no text ends early.
    body = {"prompt": [5] * 8, "max_tokens": 1000, "steps": 32, "temperature": 1e6, "seed": 1}
    kind = {"Content-Type": "application/json"}
    streamed, whole, waiting = (
        http.client.HTTPConnection("127.0.0.1", server.port, timeout=30) for _ in range(3)
    )
    streamed.request("POST", "/v1/completions", json.dumps(body | {"stream": True}), kind)
    stream = streamed.getresponse()
    stream.readline()
    whole.request("POST", "/v1/completions", json.dumps(body), kind)
    waiting.request("POST", "/v1/completions", json.dumps(body | {"stream": True}), kind)
    time.sleep(0.5)
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    *_, last = stream.read().split(b"data: ")
    assert json.loads(last)["error"]["code"] == "ending"
    for connection in (whole, waiting):
        answer = connection.getresponse()
        assert answer.status == 503 and json.load(answer)["error"]["code"] == "ending"
    code, printed = server.ended()
    assert code == 0 and time.monotonic() - began < 10, printed
    assert "Traceback" not in printed


def test_it_listens_to_this_machine_alone(capsys):
    from fastdllm.cli import COMMANDS
    from fastdllm.parser import parser

    assert parser(COMMANDS).parse_args(["serve"]).host == "127.0.0.1"


def test_an_address_that_is_taken_is_told_before_a_model_is_loaded(capsys):
    from fastdllm import cli

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--port", str(port), "--model", "nowhere"]) == 1
    err = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1:{port}: " in err and err.count("\n") == 1


def test_a_missing_key_is_a_wrong_call(capsys, monkeypatch):
    from fastdllm import cli

    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    assert cli.main(["serve", "--api-key-env", "NO_SUCH_KEY"]) == 2
    assert "NO_SUCH_KEY" in capsys.readouterr().err


def test_chunks_are_not_logged_where_everything_is(served, client, caplog):
    caplog.set_level(logging.DEBUG)
    list(client.completions.create(model="tiny-llada", prompt=[5], max_tokens=4, stream=True))
    ours = [record for record in caplog.records if record.name.startswith(("sse", "fastdllm"))]
    assert not [record for record in ours if "chunk" in record.getMessage()]
