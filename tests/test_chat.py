"""`fastdllm chat`: what lines do, what an answer is, and what stops it."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import fastdllm
from fastdllm import Engine, Quota, Threshold, cli, text
from fastdllm.chat import Chat
from fastdllm.display import View

ROOT = Path(__file__).resolve().parent.parent
QUESTION = (
    "Tom has $500 and buys a lamp for $120 and a coat for $99. How many dollars does Tom have left?"
)


@pytest.fixture(scope="module")
def loaded():
    return text.load("tiny-llada", "cpu")


class Lines(View):
    """A view that keeps what it is told."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def line(self, text="", style=""):
        self.lines.append(str(text))


@pytest.fixture
def chat(loaded):
    with Engine(loaded.model, rows=1, positions=512) as engine:
        yield Chat(loaded, engine, Lines(), {"gen_length": 128, "rule": Threshold(0.9)})


def say(chat, *lines):
    waiting = iter(lines)

    def read():
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    chat.view.lines.clear()
    chat.run(read)
    return chat.view.lines


def expected(loaded, messages):
    ids = loaded.tokens(loaded.chat(messages), add_special_tokens=False)
    done = fastdllm.generate(loaded.model, [ids], gen_length=128)
    return loaded.decode(loaded.written(done.tokens[0][len(ids) :]))


def test_turns_build_on_each_other(loaded, chat):
    first = {"role": "user", "content": QUESTION}
    lines = say(chat, QUESTION, "", "And with $50 more?")
    answer = expected(loaded, [first])
    assert lines[0] == answer and "#### 281" in answer and " forwards (" in lines[1]
    so_far = [first, {"role": "assistant", "content": answer}]
    so_far.append({"role": "user", "content": "And with $50 more?"})
    so_far.append({"role": "assistant", "content": expected(loaded, so_far)})
    assert chat.messages == so_far


def test_commands(loaded, chat, tmp_path):
    chat.system = chat.messages = [{"role": "system", "content": "Be brief."}]
    file = tmp_path / "saved.json"
    lines = say(
        chat, "/help", QUESTION, f"/save {file}", "/save", f"/save {tmp_path}", "/no", "/clear"
    )
    saved = json.loads(file.read_text())
    assert [message["role"] for message in saved] == ["system", "user", "assistant"]
    assert "/clear" in lines[0] and f"3 messages in {file}" in lines
    assert "/save: expected a FILE" in lines and any("Is a directory" in line for line in lines)
    assert "/no: no such command; /help lists them" in lines
    assert chat.messages == chat.system
    assert say(chat, "/exit", QUESTION) == []


def test_the_end_of_the_canvas_is_told_before_it_is_hit(chat):
    lines = say(chat, QUESTION)
    assert not [line for line in lines if "room" in line]
    for _ in range(8):
        lines = say(chat, QUESTION)
        if any("/clear" in line for line in lines):
            break
    assert any(line.startswith("room for a question of ") for line in lines)
    asked = len(chat.messages)
    lines = say(chat, QUESTION + " And how many with twice as much?" * 10)
    assert lines[0].startswith("the conversation and an answer need ")
    assert len(chat.messages) == asked
    assert "#### 281" in say(chat, "/clear", QUESTION)[1]


def test_what_cannot_be_answered_is_told(chat, monkeypatch):
    assert "expected text" in say(chat, "\udc80")[0]
    monkeypatch.setattr(chat.loaded.tokenizer, "chat_template", "{{ 1 / 0 }}")
    assert "ZeroDivisionError" in say(chat, QUESTION)[0]
    assert chat.messages == []


@pytest.fixture
def heeds_interrupts():
    """SIGINT as the command heeds it, whatever the test runner was started with."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_stops_an_answer_and_keeps_what_was_final(loaded, chat, heeds_interrupts):
    chat.options["rule"] = Quota(32)
    whole, heads = expected(loaded, [{"role": "user", "content": QUESTION}]), []
    head = loaded.model.head

    def slow(hidden):
        heads.append(1)
        if len(heads) == 40:  # the first block is final
            os.kill(os.getpid(), signal.SIGINT)
        if len(heads) > 39:
            time.sleep(0.05)
        return head(hidden)

    loaded.model.head = slow
    try:
        lines = say(chat, QUESTION)
    finally:
        loaded.model.head = head
    assert lines[-1] == "(stopped)" and len(lines) == 2 and len(heads) < 64
    assert lines[0] and whole.startswith(lines[0]) and len(lines[0]) < len(whole)
    assert chat.messages[-1] == {"role": "assistant", "content": lines[0]}
    assert chat.engine.stats()["busy"] == 0
    assert "#### 281" in say(chat, "/clear", QUESTION)[1]


def test_an_interrupt_at_the_prompt_does_not_leave(chat):
    answers = iter([KeyboardInterrupt, "/help", EOFError])

    def read():
        following = next(answers)
        if isinstance(following, str):
            return following
        raise following

    chat.run(read)
    assert chat.view.lines[0] == "(/exit leaves)" and "/save" in chat.view.lines[1]


def test_the_command_reads_standard_input(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n/help\n/exit\n"))
    words = ["chat", "--device", "cpu", "--system", "Be brief.", "--no-color"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert " forwards (" in out and "/save FILE" in out and "> " not in out


def test_a_terminal_sees_the_canvas_and_ctrl_c_does_not_leave():
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "fastdllm", "chat", "--device", "cpu", "--steps", "32"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "xterm-256color"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        start_new_session=True,
    )
    os.close(theirs)
    seen = bytearray()
    reader = threading.Thread(target=_read_all, args=(ours, seen), daemon=True)
    reader.start()

    def wait_for(words, seconds=60):
        end = time.monotonic() + seconds
        while words not in seen.decode(errors="replace"):
            assert time.monotonic() < end and process.poll() is None, seen.decode()
            time.sleep(0.02)

    wait_for("> ")
    os.write(ours, f"{QUESTION}\n".encode())
    wait_for("░")
    os.kill(process.pid, signal.SIGINT)
    wait_for("(stopped)")
    os.write(ours, b"/help\n")
    wait_for("/save FILE")
    os.write(ours, b"/exit\n")
    assert process.wait(30) == 0
    os.close(ours)


def _read_all(file, seen):
    try:
        while part := os.read(file, 4096):
            seen.extend(part)
    except OSError:
        pass  # the other end is closed
