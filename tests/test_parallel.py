"""A model over 2 and 4 processes of this CPU decodes what one process does, and none goes its own
way. What the processes do is in parallel_ranks.py.
"""

import dataclasses
import json
import multiprocessing
import os
import shutil
import subprocess
import sys

import parallel_ranks
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_floors import ROOT

import fastdllm
from fastdllm import parallel
from fastdllm.families import FAMILIES

SIZES = (2, 4)
WAYS = (
    *(
        (family, cache)
        for family in parallel_ranks.FAMILIES
        for cache in ("none", "prefix", "dual")
    ),
    *((family, rule) for family in parallel_ranks.UNTIED for rule in parallel_ranks.RULES),
    *((family, name) for family in parallel_ranks.UNTIED for name in parallel_ranks.SAMPLED),
    *((family, "infill") for family in parallel_ranks.FAMILIES),
)
# fp32 sums in another order.
CLOSE = {"atol": 2e-5, "rtol": 1e-5}
# Of what one process loses by fp8: each rank's scales fit its own inputs.
MOST_LOST = 1.2


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    parallel_ranks.folders(folder)
    return folder


@pytest.fixture(scope="module")
def alone(root):
    """What one process decodes."""
    return parallel_ranks.decodes(root, None)


@pytest.fixture(scope="module", params=SIZES)
def ranks(request, root):
    """read(name) -> what every rank of so many found."""
    size = request.param
    processes = [
        multiprocessing.get_context("spawn").Process(
            target=parallel_ranks.run, args=(rank, size, str(root))
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    stuck = [process.exitcode is None and process.kill() for process in processes]
    assert stuck == [False] * size

    def read(name):
        files = [root / f"{name}-{size}-{rank}.pt" for rank in range(size)]
        return [torch.load(file, weights_only=False) for file in files if file.exists()]

    read.size = size
    return read


@pytest.mark.parametrize("way", WAYS, ids=" ".join)
def test_ranks_decode_what_one_process_does(ranks, alone, way):
    assert [found[way] for found in ranks("decodes")] == [alone[way]] * ranks.size


def test_what_is_decoded_takes_several_tokens_a_step(alone):
    """Otherwise equal tokens and forwards would say little of the scores."""
    for family in parallel_ranks.UNTIED:
        assert len({tuple(alone[family, rule][1]) for rule in parallel_ranks.RULES}) > 3


@pytest.mark.parametrize("family", parallel_ranks.FAMILIES)
def test_whole_logits_can_be_asked_for(ranks, alone, family):
    for found in ranks("decodes"):
        torch.testing.assert_close(found[family, "logits"], alone[family, "logits"], **CLOSE)


def test_a_rank_holds_its_own_heads_alone(ranks):
    assert [found["heads"] for found in ranks("one")] == [(4 // ranks.size,) * 2] * ranks.size


def test_a_slow_rank_changes_nothing(ranks, alone):
    slow = [found["slow"] for found in ranks("one")]
    assert slow == [alone["llada", "threshold"]] * ranks.size


@pytest.mark.parametrize("what", ["opinions", "no seed", "fp8 tokens"])
def test_ranks_decide_alike(ranks, what):
    """Where each would go its own way: a rule that looks at the rank, a seed of each rank's own."""
    first, *others = [found[what] for found in ranks("one")]
    assert others == [first] * (ranks.size - 1)


def test_fp8_weights_are_split_too(ranks, root, alone):
    whole = fastdllm.load(root / "llada", device="cpu", weights="fp8")
    exact = alone["llada", "logits"]
    lost = (whole.logits(torch.tensor(parallel_ranks.PROMPTS[:1])) - exact).norm()
    for found in ranks("one"):
        assert 0 < (found["fp8"] - exact).norm() < MOST_LOST * lost


@pytest.mark.parametrize(
    "what, pattern",
    [
        ("other prompts", "expected the same on all ranks"),
        ("top_p", "top_p: expected None"),
        ("top_k", "top_k: expected None"),
        ("engine", "model: expected one on one device for an Engine"),
        ("save", "model: expected one on one device for saving"),
    ],
)
def test_what_ranks_cannot_do_is_refused_on_all(ranks, what, pattern):
    for found in ranks("one"):
        name, text = found[what]
        assert name == "ValueError" and pattern in text


@pytest.mark.parametrize("ranks", [2], indirect=True)
@pytest.mark.parametrize("end", ["never", "dies"])
def test_a_rank_that_is_gone_ends_the_others(ranks, end):
    error, seconds = ranks(end)[0]
    assert error is not None
    assert seconds < 4 if end == "never" else seconds < 60


@pytest.mark.parametrize(
    "change, pattern",
    [
        ({"vocab_size": 42}, "vocab_size=42 is no multiple of 4"),
        ({"intermediate_size": 47}, "intermediate_size=47 is no multiple of 2"),
        ({"num_heads": 3, "num_kv_heads": 3}, "num_heads=3 .*num_kv_heads=3 neither divides 2"),
    ],
)
def test_sizes_that_do_not_divide_are_named(change, pattern):
    config = dataclasses.replace(FAMILIES["llada"].config(tiny.LLADA), **change)
    with pytest.raises(ValueError, match=pattern):
        parallel.part_of_config(config, 2)


def test_a_mesh_is_a_mesh(root):
    with pytest.raises(TypeError, match="mesh: expected a DeviceMesh, got int"):
        fastdllm.load(root / "llada", mesh=2)


@pytest.mark.parametrize(
    "rank, size, whole, held, wanted",
    [
        (0, 2, (8, 6), (4, 6), [(0, 4), (0, 6)]),
        (1, 2, (8, 6), (8, 3), [(0, 8), (3, 6)]),
        (3, 4, (2, 6), (1, 6), [(1, 2), (0, 6)]),
        (1, 4, (2, 6), (1, 6), [(0, 1), (0, 6)]),
    ],
)
def test_parts_of_a_tensor(rank, size, whole, held, wanted):
    ranks = parallel.Ranks.__new__(parallel.Ranks)
    ranks.rank, ranks.size = rank, size
    assert [(part.start, part.stop) for part in ranks.part(whole, held)] == wanted


def even_vocabulary(folder):
    """The embedded LLaDA in a folder, with rows for ids that nobody uses, so that ranks can share
    it.
    """
    shutil.copytree(ROOT / "fastdllm" / "assets" / "tiny-llada", folder)
    config = json.loads((folder / "config.json").read_text())
    vocab = config["embedding_size"]
    more = -vocab % 4
    assert more
    state = {
        name: torch.cat([weight, weight[:more] * 0]) if len(weight) == vocab else weight
        for name, weight in load_file(folder / "model.safetensors").items()
    }
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"embedding_size": vocab + more}))
    return folder


def test_the_command_line_under_torchrun_says_what_one_process_says(tmp_path):
    model = even_vocabulary(tmp_path / "m")
    question = ["-m", "fastdllm", "generate", "2+3=", "--model", model, "--json"]
    question += ["--device", "cpu", "--gen-length", "32"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    said = []
    for command in (question, [*launch, *question]):
        run = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=100
        )
        assert run.returncode == 0, run.stderr[-2000:]
        (line,) = run.stdout.splitlines()
        said.append({name: json.loads(line)[name] for name in ("text", "forwards")})
    assert said[0] == said[1]
