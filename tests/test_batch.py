"""`fastdllm batch`: every record is answered once, whatever is broken and whenever it is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fastdllm
from fastdllm import batch, cli, text
from fastdllm.options import UsageError
from fastdllm.serve import service
from fastdllm.serve.errors import Refused

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = ("--gen-length", "32", "--rows", "4", "--positions", "128", "--device", "cpu")


def write(path, records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompts(count):
    """Records whose answers differ, of ids and of text, some longer than others."""
    return [
        {"id": f"r{number}", "prompt": [5 + number % 40] * (3 + number % 7), "max_tokens": 16}
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def loaded():
    return text.load("tiny-llada", "cpu")


@pytest.fixture
def quick(monkeypatch):
    """No warm-up, which takes seconds."""
    from fastdllm.serve.service import Service

    monkeypatch.setattr(Service, "warm_up", lambda self: None)


def call(source, output, *words):
    return cli.main(["batch", str(source), "--output", str(output), *OPTIONS, *words])


def test_results_are_those_of_generate(loaded, tmp_path, quick):
    chat = {"id": 7, "messages": [{"role": "user", "content": "Ann has 3 hens."}], "steps": 4}
    stop = {"id": "s", "prompt": "Question: Ann has 3 hens.", "stop": " ", "logprobs": 0}
    records = [*prompts(10), chat, stop]
    source, output = write(tmp_path / "in", records), tmp_path / "out"
    assert call(source, output) == 0
    found = {result["id"]: result for result in read(output)}
    assert len(found) == len(read(output)) == len(records)
    for record in records[:10]:
        ids = record["prompt"]
        done = fastdllm.generate(loaded.model, [ids], gen_length=16)
        written = loaded.written(done.tokens[0][len(ids) :])
        result = found[record["id"]]
        assert result["text"] == loaded.decode(written) and result["forwards"] == int(done.nfe)
        assert result["usage"]["completion_tokens"] == len(written)
    ids = loaded.encode("Ann has 3 hens.")
    done = fastdllm.generate(loaded.model, [ids], gen_length=32, rule=fastdllm.Quota(4))
    assert found[7]["text"] == loaded.decode(loaded.written(done.tokens[0][len(ids) :]))
    assert " " not in found["s"]["text"] and found["s"]["finish_reason"] == "stop"
    assert "".join(found["s"]["logprobs"]["tokens"]) == found["s"]["text"]
    assert "logprobs" not in found[7]


def test_the_commands_options_are_those_of_records_that_say_nothing(loaded, tmp_path, quick):
    source, output = write(tmp_path / "in", [{"id": 1, "prompt": [7] * 5}]), tmp_path / "out"
    assert call(source, output, "--steps", "4") == 0
    done = fastdllm.generate(loaded.model, [[7] * 5], gen_length=32, rule=fastdllm.Quota(4))
    (result,) = read(output)
    assert result["text"] == loaded.decode(loaded.written(done.tokens[0][5:].tolist()))
    assert result["forwards"] == int(done.nfe)


def test_it_goes_on_where_it_was_in_order(tmp_path, quick, capsys):
    records = prompts(9)
    source, output = write(tmp_path / "in", records[:4]), tmp_path / "out"
    assert call(source, output, "--in-order") == 0
    first = output.read_bytes()
    write(source, records)
    assert call(source, output, "--in-order") == 0
    assert output.read_bytes().startswith(first)
    assert [result["id"] for result in read(output)] == [record["id"] for record in records]
    assert "9 records: 5 answered, 4 were there already" in capsys.readouterr().err


def test_broken_lines_are_reported_by_number_and_the_others_go_on(tmp_path, quick, capsys):
    good = prompts(3)
    lines = [
        good[0],
        '{"id": "x", "prompt": ',
        "",
        '{"prompt": "no id"}',
        good[1],
        {"id": "r0", "prompt": "again"},
        {"id": "y", "prompt": "a", "min_p": 0.5},
        {"id": "z", "prompt": "a", "n": 2},
        {"id": "w", "messages": [], "max_tokens": 5},
        {"id": "v", "prompt": ["a", "b"]},
        good[2],
    ]
    source, output = write(tmp_path / "in", lines), tmp_path / "out"
    assert call(source, output) == 1
    assert sorted(result["id"] for result in read(output)) == ["r0", "r1", "r2"]
    err = capsys.readouterr().err
    for words in (
        "line 2: the line is not JSON",
        "line 4: expected an id",
        "line 6: its id is that of line 1 too",
        "line 7: min_p: ",
        "line 8: n: ",
        "line 9: messages: ",
        "line 10: prompt: a record has one prompt",
    ):
        assert words in err
    assert len(err.splitlines()) == 8 and err.splitlines()[-1].endswith("3 answered, 7 broken")


def test_many_rows_have_a_line_for_all_that_is_under_way(tmp_path, quick):
    records = [{"id": number, "prompt": [5, 6], "max_tokens": 2} for number in range(600)]
    source, output = write(tmp_path / "in", records), tmp_path / "out"
    assert call(source, output, "--rows", "128", "--positions", "8", "--block-length", "4") == 0
    assert len(read(output)) == 600


def test_a_nan_is_reported_and_the_others_go_on(loaded, tmp_path, quick, capsys, monkeypatch):
    embedding = loaded.model.embedding.weight.detach().clone()
    embedding[3] = float("nan")
    monkeypatch.setattr(loaded.model.embedding.weight, "data", embedding)
    monkeypatch.setattr(service, "load", lambda *_: loaded)
    records = [*prompts(2), {"id": "nan", "prompt": [3]}]
    source, output = write(tmp_path / "in", records), tmp_path / "out"
    assert call(source, output) == 1
    assert len(read(output)) == 2 and "line 3: decoding has failed: " in capsys.readouterr().err


def test_an_output_that_is_none_is_not_touched(tmp_path, quick, capsys):
    source = write(tmp_path / "in", prompts(1))
    for content in ("my notes", "my notes\n", '{"id": 1}\n[]\n', '{"name": 1}\n'):
        output = tmp_path / "out"
        output.write_text(content)
        assert call(source, output) == 2
        assert output.read_text() == content and "is no result" in capsys.readouterr().err
    assert call(source, source) == 2
    assert call(tmp_path / "nowhere", tmp_path / "new") == 2
    assert call(source, tmp_path / "nowhere" / "out") == 2


@pytest.mark.skipif(batch.fcntl is None, reason="files are not locked here")
def test_one_process_at_a_time(tmp_path):
    with batch.opened(tmp_path / "out", tmp_path / "in"):
        with pytest.raises(UsageError, match="another process"):
            with batch.opened(tmp_path / "out", tmp_path / "in"):
                pass
    with batch.opened(tmp_path / "out", tmp_path / "in"):
        pass


@pytest.mark.parametrize("cut", range(0, 120, 7))
def test_a_torn_line_is_taken_off_and_answered_again(cut, tmp_path):
    """Whatever was written of the last line when the process was killed."""
    records = prompts(4)
    source, output = write(tmp_path / "in", records), tmp_path / "out"

    def answered(wanted, in_order):
        for record in wanted:
            yield record, {"id": record.id, "text": "an answer ░ that is long enough to be torn"}

    batch.run(source, output, answered, in_order=False, quiet=True)
    whole = output.read_bytes()
    output.write_bytes(whole[: len(whole) - cut])
    asked = batch.run(source, output, answered, in_order=False, quiet=True).answered
    assert output.read_bytes() == whole
    assert asked == 4 - whole[: len(whole) - cut].count(b"\n")


def test_a_refused_record_is_asked_again(tmp_path):
    source, output = write(tmp_path / "in", prompts(2)), tmp_path / "out"
    first = iter([Refused(500, "failed"), {"id": "r1", "text": ""}, {"id": "r0", "text": ""}])

    def answered(wanted, in_order):
        for record in wanted:
            yield record, next(first)

    assert batch.run(source, output, answered, in_order=False, quiet=True).broken == 1
    assert batch.run(source, output, answered, in_order=False, quiet=True).answered == 1
    assert [result["id"] for result in read(output)] == ["r1", "r0"]


def test_a_full_disk_ends_it(tmp_path, monkeypatch):
    source, output = write(tmp_path / "in", prompts(2)), tmp_path / "out"

    def answered(wanted, in_order):
        for record in wanted:
            yield record, {"id": record.id, "text": "some words"}

    write_all = os.write
    monkeypatch.setattr(batch.os, "write", lambda file, line: write_all(file, line[:20]))
    with pytest.raises(RuntimeError, match="no space left"):
        batch.run(source, output, answered, in_order=False, quiet=True)
    monkeypatch.undo()
    assert batch.run(source, output, answered, in_order=False, quiet=True).answered == 2
    assert [result["id"] for result in read(output)] == ["r0", "r1"]


def test_the_time_left(monkeypatch):
    counts = batch.Counts(total=110, there=10)
    counts.began, counts.answered = 0.0, 25
    monkeypatch.setattr(batch.time, "monotonic", lambda: 50.0)
    assert counts.line() == "35 of 110, 0:02:30 left"


KILLS = 2


def test_killed_at_any_moment_nothing_is_lost_or_doubled(tmp_path):
    records = prompts(40)
    source, output = write(tmp_path / "in", records), tmp_path / "out"
    code = (
        "import sys\nfrom fastdllm import cli\nfrom fastdllm.serve.service import Service\n"
        "Service.warm_up = lambda self: None\nsys.exit(cli.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "batch", str(source), "--output", str(output), *OPTIONS]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for kill in range(KILLS):
        process = subprocess.Popen(command, cwd=ROOT, env=environment)
        wanted = 1 + kill * 15
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            if output.exists() and output.read_bytes().count(b"\n") >= wanted:
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    assert 0 < output.read_bytes().count(b"\n") < len(records)
    assert subprocess.run(command, cwd=ROOT, env=environment, timeout=60).returncode == 0
    found = [result["id"] for result in read(output)]
    assert sorted(found) == sorted(record["id"] for record in records)
