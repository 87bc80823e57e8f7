"""Ray on this machine alone: two workers, one of which is killed."""

import http.client
import json
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

# Before anything imports Ray: it listens on the loopback alone, and reports to nobody.
os.environ.update(RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", RAY_USAGE_STATS_ENABLED="0")
ray = pytest.importorskip("ray")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))

import openai  # noqa: E402
from serving import free_port, wait_until  # noqa: E402

import fastdllm  # noqa: E402
from fastdllm import batch, text  # noqa: E402
from fastdllm.integrations import ray as integration  # noqa: E402
from fastdllm.serve.service import loaded_service  # noqa: E402

OPTIONS = {"rows": 2, "positions": 256, "device": "cpu"}
SLOW = {"steps": 32}  # one token a forward


@pytest.fixture(scope="module")
def loaded():
    return text.load("tiny-llada", "cpu")


@pytest.fixture(scope="module")
def cluster():
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    ray.init(
        num_cpus=5,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": paths | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}},
    )
    assert ray.util.get_node_ip_address() == "127.0.0.1"
    yield
    ray.shutdown()


def expected(loaded, ids, gen_length, **options):
    done = fastdllm.generate(loaded.model, [ids], gen_length=gen_length, **options)
    return loaded.decode(loaded.written(done.tokens[0][len(ids) :]))


def test_a_worker_is_killed_and_every_record_is_answered_once(loaded, cluster, tmp_path):
    records = [
        {"id": number, "prompt": [5 + number] * 6, "max_tokens": 64, **SLOW} for number in range(24)
    ]
    records.append({"id": "wrong", "prompt": [5], "min_p": 1})
    source, output, pids = tmp_path / "in", tmp_path / "out", tmp_path / "pids"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    pids.mkdir()

    def make():
        (pids / str(os.getpid())).touch()
        service = loaded_service("tiny-llada", **OPTIONS)
        service.warm_up = lambda: None
        return service

    def kill():
        wait_until(lambda: output.exists() and output.read_bytes().count(b"\n") >= 3, 90)
        os.kill(int(next(iter(sorted(pids.iterdir()))).name), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    results = integration.results(make, workers=2, rows=OPTIONS["rows"])
    counts = batch.run(source, output, results, in_order=False, quiet=True)
    killer.join()
    assert (counts.answered, counts.broken) == (24, 1)
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(result["id"] for result in found) == list(range(24))
    for result in found:
        ids = [5 + result["id"]] * 6
        assert result["text"] == expected(loaded, ids, 64, rule=fastdllm.Quota(32))
    assert len(list(pids.iterdir())) >= 3  # another took its place


@pytest.fixture(scope="module")
def served(cluster):
    """The port of two replicas behind their door."""
    from ray import serve

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(integration.app("tiny-llada", replicas=2, gen_length=32, **OPTIONS))
    yield port
    serve.shutdown()


def test_replicas_answer_as_one_server_does(loaded, served):
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{served}/v1", api_key="none", max_retries=0)
    done = client.completions.create(model="tiny-llada", prompt=[7] * 6)
    assert done.choices[0].text == expected(loaded, [7] * 6, 32)
    parts = client.completions.create(model="tiny-llada", prompt=[8] * 6, stream=True)
    assert "".join(part.choices[0].text for part in parts) == expected(loaded, [8] * 6, 32)
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="tiny-llada", prompt=[7], presence_penalty=1.0)
    assert error.value.param == "presence_penalty"


def test_a_replica_is_killed_and_all_requests_get_their_answer(loaded, served):
    found = {}

    def ask(number):
        connection = http.client.HTTPConnection("127.0.0.1", served, timeout=90)
        request = {"prompt": [5 + number] * 6, "max_tokens": 128, "stream": number % 2 == 1, **SLOW}
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(request), headers)
        response = connection.getresponse()
        found[number] = (response.status, response.read().decode())

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    os.kill(replicas()[0], signal.SIGKILL)
    for thread in threads:
        thread.join(90)
    answered = 0
    for number, (status, answer) in found.items():
        wanted = expected(loaded, [5 + number] * 6, 128, rule=fastdllm.Quota(32))
        if number % 2 == 0:
            assert status == 200 or (status == 503 and "replica_lost" in answer)
            answered += status == 200 and json.loads(answer)["choices"][0]["text"] == wanted
        else:
            text, lost = streamed(answer)
            assert status == 200 and (text == wanted or (lost and wanted.startswith(text)))
            answered += text == wanted
    assert len(found) == 8 and answered >= 4
    wait_until(lambda: len(replicas()) == 2, 60)


def streamed(answer):
    """(the text of a stream, whether it ended with the loss of its replica)."""
    parts = [line[6:] for line in answer.splitlines() if line.startswith("data: {")]
    events = [json.loads(part) for part in parts]
    text = "".join(event["choices"][0]["text"] for event in events if "choices" in event)
    return text, any("error" in event for event in events)


def replicas():
    """The processes of the replicas, among this process's descendants."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(status[1])
    ours = [os.getpid()]
    for process in ours:
        ours += [child for child, parent in parents.items() if parent == process]
    return [pid for pid in ours if b":default:fastdllm" in title(pid)]


def title(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_replicas_follow_the_requests_that_wait():
    door = integration.app(
        "tiny-llada", replicas=(1, 3), rows=4, autoscaling={"upscale_delay_s": 2}
    )
    (replica,) = door._bound_deployment.init_args
    scaling = replica._bound_deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 3)
    assert scaling.target_ongoing_requests == 4 and scaling.upscale_delay_s == 2


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match="fastdllm\\[ray\\]"):
        integration.results(partial(loaded_service, "tiny-llada"), workers=1, rows=1)
