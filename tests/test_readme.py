"""The pages that a stranger reads: their Python runs as it stands, in a world that has what it
names; their figures are the results'; their links lead somewhere; README.md stays short.
"""

import functools
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import tiny
import torch
from oracle_decode import decode_row
from oracle_models import attention, rotate
from test_floors import ROOT

import fastdllm
from fastdllm import Threshold, cli
from fastdllm_kernels import rules, select, token_confidence_reference

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
TO_CONTRIBUTE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FOR_ENGINES = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
PYTHON = re.compile(r"^```python\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
SNIPPETS, SNIPPETS_TO_CONTRIBUTE = PYTHON.findall(TEXT), PYTHON.findall(TO_CONTRIBUTE)
SNIPPETS_FOR_ENGINES = PYTHON.findall(FOR_ENGINES)
PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
WORDS = 900
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/README.md", "kernels/README.md")
RESULTS = ROOT / "bench" / "results"
TINY = ROOT / "fastdllm" / "assets" / "tiny-llada"


def snippet_with(name):
    (found,) = [snippet for snippet in SNIPPETS if name in snippet]
    return found


@functools.cache
def tiny_llada():
    return fastdllm.load(str(TINY), dtype=torch.float32)


def somebodys_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def world():
    """What the snippets use without making it: models, prompts, and an engine's tensors."""
    q, k, v = torch.randn(3, 1, 8, 2, 16).unbind()
    cache = torch.randn(2, 1, 32, 2, 16)
    at = torch.outer(torch.arange(64.0), torch.ones(8))
    return {
        "fastdllm": fastdllm,
        "model": tiny_llada(),
        "mask_id": 63,
        "prompts": [[5, 6, 7], [8, 9]],
        "prompt": [5, 6, 7],
        "before": [5, 6, 7],
        "after": [8, 9],
        "ids": torch.tensor([[5, 6, 7]]),
        "padding": torch.tensor([[0, 1, 1]]),
        "q": q,
        "k": k,
        "v": v,
        "k_cache": cache[0],
        "v_cache": cache[1],
        "cos": at.cos(),
        "sin": at.sin(),
        "block_start": torch.tensor([8], dtype=torch.int32),
        "kv_len": torch.tensor([32], dtype=torch.int32),
        "logits": torch.randn(1, 8, 64),
        "tokens": torch.full((1, 8), 63),
    }


def run(snippet, **others):
    """The names that a snippet leaves."""
    names = world() | others
    exec(snippet, names)
    return names


def test_the_command_solves_its_problem(capsys):
    (line,) = re.findall(r"^fastdllm (generate '.*)$", TEXT, flags=re.MULTILINE)
    assert cli.main(shlex.split(line)) == 0
    assert f"#### {500 - 120 - 99}\n" in capsys.readouterr().out


def test_load_and_generate():
    names = run(snippet_with("fastdllm.load").replace("/path/to/checkpoint", str(TINY)))
    done = names["done"]
    assert [len(tokens) for tokens in done.tokens] == [3 + 256, 2 + 256]
    assert torch.equal(done.nfe, done.refreshes + done.cached_steps) and done.seconds > 0


def test_infill_writes_the_hole_and_nothing_else():
    names = run(snippet_with("fastdllm.infill"))
    (tokens,) = names["done"].tokens
    assert tokens[:3].tolist() == names["before"] and tokens[-2:].tolist() == names["after"]
    assert len(tokens) == 3 + 32 + 2 and (tokens != tiny_llada().config.mask_id).all()


def test_somebodys_model_is_replaced_and_restored():
    model = somebodys_model()
    before = model(world()["ids"]).logits
    names = run(snippet_with("replace_attention"), model=model)
    assert [len(tokens) for tokens in names["done"].tokens] == [3 + 64, 2 + 64]
    assert torch.equal(model(names["ids"]).logits, before)


def test_transformers_takes_the_attention_function():
    names = run(snippet_with("set_attn_implementation"), model=somebodys_model())
    assert names["logits"].shape == (1, 3, 64) and names["logits"].isfinite().all()


def test_the_engine_gives_what_generate_gives():
    streamed = []
    snippet = snippet_with("fastdllm.Engine").replace("positions=2048", "positions=320")
    names = run(snippet, print=streamed.append)
    alone = fastdllm.generate(tiny_llada(), [names["prompt"]], gen_length=256)
    assert torch.equal(names["done"].tokens[0], alone.tokens[0])
    assert streamed == alone.tokens[0][3:].tolist()


def test_the_operators_run_without_the_product():
    names = run(snippet_with("block_attention"))
    assert names["selection"].committed.any() and names["out"].shape == names["q"].shape


def test_a_rule_of_two_parameters():
    """Decoded with as it stands in the README; its parameters count, in one batch and alone."""
    names = run(snippet_with("per_row"))
    assert all((tokens != tiny_llada().config.mask_id).all() for tokens in names["done"].tokens)

    def decoded(rule, rows=slice(None), **options):
        options = {"gen_length": 64, "cache": "dual", **options}
        return fastdllm.generate(tiny_llada(), names["prompts"][rows], rule=rule, **options)

    easing = names["Easing"]
    plain, never_easier = decoded(Threshold(0.9)), decoded(easing(0.9, 0.0))
    assert torch.equal(plain.nfe, never_easier.nfe)
    for ours, theirs in zip(never_easier.tokens, plain.tokens, strict=True):
        assert torch.equal(ours, theirs)
    assert (decoded(easing(0.9, 0.3)).nfe < plain.nfe).all()
    together = decoded(easing(torch.tensor([0.9, 0.6]), torch.tensor([0.3, 0.05])))
    for row, (tau, ease) in enumerate([(0.9, 0.3), (0.6, 0.05)]):
        alone = decoded(easing(tau, ease), slice(row, row + 1))
        assert torch.equal(together.tokens[row], alone.tokens[0])
        assert together.nfe[row] == alone.nfe[0]


# The page of the operators, kernels/README.md.


def host():
    """What the page's engine has, and the functions of its loop; and the line that decodes."""
    setup, loop, _ = SNIPPETS_FOR_ENGINES
    loop, call = loop.rsplit("\n\n\n", 1)
    names = {}
    exec(setup, names)
    exec(loop, names)
    return names, call


def source_of(names):
    """The page's model as a source of oracle_decode: fp64, no cache but a list, no kernels."""
    kinds = [names["HEADS"], names["KV_HEADS"], names["KV_HEADS"]]
    layers = [[matrix.cpu().double() for matrix in layer] for layer in names["layers"]]
    embedding, head = names["embedding"].cpu().double(), names["head"].cpu().double()

    def normed(x):
        return x / x.square().mean(-1, keepdim=True).sqrt()

    def source(tokens, positions, store):
        x, new_store, positions = embedding[tokens], [], torch.as_tensor(positions)
        for layer, (qkv, out) in enumerate(layers):
            heads = (normed(x) @ qkv.T).unflatten(1, (-1, names["DIM"]))
            q, k, v = (part.transpose(0, 1) for part in heads.split(kinds, dim=1))
            q, k = (torch.stack([rotate(h, positions, 10000) for h in part]) for part in (q, k))
            if store is not None:
                keys, values = (held.clone() for held in store[layer])
                keys[:, positions], values[:, positions] = k, v
                k, v = keys, values
            new_store.append((k, v))
            x = x + attention(q.transpose(0, 1), k, v, *kinds[:2]) @ out.T
        return normed(x) @ head.T, new_store

    return source


def test_the_host_loop_decodes_as_a_plain_one(either_backend):
    """Ragged rows over pages that held NaN: the tokens and forwards of each row alone."""
    names, call = host()
    forward, asked = names["forward"], []

    def counted(*arguments, refresh):
        asked.append("refresh" if refresh else "cached")
        return forward(*arguments, refresh=refresh)

    names["forward"] = counted
    before = names["canvas"].tolist()
    exec(call, names)
    cached = []
    for row, prompt_length in enumerate(names["prompt_length"].tolist()):
        alone = decode_row(
            source_of(names),
            before[row][:prompt_length],
            mask_id=names["MASK"],
            gen_length=16,
            block_length=8,
            cache="dual",
            rule=("threshold", 0.9),
        )
        assert alone.slack > 1e-3
        end = prompt_length + 16
        assert names["canvas"][row].tolist() == alone.tokens + before[row][end:]
        kinds = "".join(kind[0] for kind, _ in alone.steps).split("r")[1:]
        cached.append([len(steps) for steps in kinds])
    assert all(2 < steps < 14 for steps in map(sum, cached))  # not all at once, nor one by one
    most = map(max, zip(*cached, strict=True))
    assert asked == [kind for n in most for kind in ["refresh", *["cached"] * n]]


@pytest.mark.gpu
def test_a_step_of_the_host_loop_is_captured_and_replays_with_other_spans():
    names, call = host()
    exec(call, names)
    device, select, rule = names["device"], names["confidence_select"], Threshold(0.9)
    start, kv_len = (torch.zeros(2, dtype=torch.int32, device=device) for _ in range(2))
    tokens = torch.full((2, 8), names["MASK"], device=device)

    def step():
        logits = names["forward"](tokens, start, kv_len, refresh=False)
        return select(logits, tokens, mask_id=names["MASK"], rule=rule)

    def stand(starts):
        start.copy_(torch.tensor(starts))
        kv_len.copy_(names["prompt_length"] + 16)
        tokens.fill_(names["MASK"])

    stand([9, 4])
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for starts in ([9, 4], [17, 12], [9, 12]):
        stand(starts)
        graph.replay()
        after, replayed = tokens.clone(), [field.clone() for field in captured]
        stand(starts)
        for got, wanted in zip(replayed, step(), strict=True):
            assert torch.equal(got, wanted)
        assert torch.equal(after, tokens) and (tokens != names["MASK"]).any()


def test_the_parts_of_a_vocabulary_propose_what_the_whole_does(either_backend, device):
    logits = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)).to(device)
    names = {"logits": logits, "MASK": 95}
    exec(SNIPPETS_FOR_ENGINES[2], names)
    whole = token_confidence_reference(logits, mask_id=95)
    assert torch.equal(names["best"].token_ids, whole.token_ids)
    torch.testing.assert_close(names["best"].score, whole.score)


# Where `_chosen` in select_triton.py gets the branch.
LAST_BRANCH = '    else:\n        tl.static_assert(RULE == "quota"'


@pytest.fixture
def kernel_with_the_branch(tmp_path, monkeypatch):
    """select_triton.py as CONTRIBUTING.md changes it, in place of the module."""
    branch = next(code for code in SNIPPETS_TO_CONTRIBUTE if "RULE ==" in code)
    source = Path(select.__file__).with_name("select_triton.py").read_text()
    assert source.count(LAST_BRANCH) == 1
    changed = tmp_path / "select_triton.py"
    changed.write_text(source.replace(LAST_BRANCH, branch + LAST_BRANCH))
    name = "fastdllm_kernels.select_triton"
    spec = importlib.util.spec_from_file_location(name, changed)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(rules, "_CLASSES", dict(rules._CLASSES))
    spec.loader.exec_module(module)


@pytest.mark.parametrize("graph", [False, pytest.param(True, marks=pytest.mark.gpu)])
def test_a_rule_of_two_parameters_with_a_branch(
    kernel_with_the_branch, triton_backend, device, tmp_path, graph
):
    """As the README and CONTRIBUTING.md say it: the same tokens as without the branch, by a kernel
    that has it.
    """
    code, _ = snippet_with("per_row").split("\ndone =")
    plain = run(code)["Easing"]
    field = "    ease: float | torch.Tensor = per_row(0.02)"
    (named,) = [code for code in SNIPPETS_TO_CONTRIBUTE if "ClassVar" in code]
    code = code.replace(field, named + field)
    fused = run(f"from typing import ClassVar\n{code}")["Easing"]
    assert rules.branch_of(fused()) == "easing" and rules.branch_of(plain()) is None

    model, _ = tiny.build(tmp_path / "model", tiny.LLADA, device=device)
    # The second row's bound is 0 at its blocks' third step: three forwards for four tokens.
    tau, ease = torch.tensor([0.9, 0.9]), torch.tensor([0.02, 0.45])
    options = {"gen_length": 8, "block_length": 4, "graph": graph}
    ours, theirs = (
        fastdllm.generate(model, [[5, 6, 7], [8, 9]], rule=easing(tau, ease), **options)
        for easing in (fused, plain)
    )
    assert ours.nfe.tolist() == theirs.nfe.tolist() == [8, 6]
    for tokens, expected in zip(ours.tokens, theirs.tokens, strict=True):
        assert torch.equal(tokens, expected)


def test_there_is_a_test_for_each_snippet():
    assert len(SNIPPETS) == 7 and len(SNIPPETS_TO_CONTRIBUTE) == 2
    assert len(SNIPPETS_FOR_ENGINES) == 3


def test_it_is_read_in_a_few_minutes():
    words = re.findall(r"\S*\w\S*", PROSE)
    assert len(words) <= WORDS, f"{len(words)} words outside code"


# Figures. The index of results is itself compared with the results files, in test_results.py.


def tables(text):
    """The tables of a page as lists of rows of cells, without their heads."""
    found = re.findall(r"^\|.*\|\n\|[-:| ]+\|\n((?:\|.*\|\n)+)", text, flags=re.MULTILINE)
    return [[_cells(row) for row in table.splitlines()] for table in found]


def _cells(row):
    return [cell.strip() for cell in row.strip("|").split("|")]


def seconds():
    """Way of decoding -> its seconds in the index's table of requests, to three digits at most."""
    index = (RESULTS / "README.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- requests -->\n(.*?)<!-- /requests -->", index, re.DOTALL)[1]
    cells = {way: taken for way, taken, *_ in tables(table)[0]}
    return {way: taken if len(taken) < 5 else f"{float(taken):.3g}" for way, taken in cells.items()}


def solved(name, key):
    """(% solved, tokens per forward) of one setting in a file of bench/quality/evaluate.py."""
    results = json.loads((RESULTS / f"{name}.json").read_text())["results"]
    keys = ("cache", "rule", "block_length", "policy")
    (found,) = [r for r in results if [r[k] for k in keys if k in r] == list(key)]
    return f"{100 * found['accuracy']:.1f}", f"{found['tokens_per_forward']:.1f}"


def test_the_headline_is_the_results():
    taken = seconds()
    headline = TEXT.split("\n\n")[1]
    for way in ("dual captured", "plain dual", "vanilla"):
        assert f"{taken[way]} s" in headline.replace("**", "")


def test_the_table_of_caches_and_rules_is_the_results():
    taken = seconds()
    expected = [
        ("none", "1 a step", "vanilla, our selection", "vanilla"),
        ("none", "threshold 0.9", None, None),
        ("prefix", "threshold 0.9", "prefix captured", "plain prefix"),
        ("dual", "threshold 0.9", "dual captured", "plain dual"),
        ("dual", "factor 1.0", None, None),
    ]
    rows = tables(TEXT)[0]
    assert len(rows) == len(expected)
    for cells, (cache, rule, ours, published) in zip(rows, expected, strict=True):
        request = f"{taken[ours]} ({taken[published]})" if ours else ""
        key = (cache, rule, 32)
        accuracy, per_forward = solved("tiny-llada", key)
        assert cells[3] == request
        assert cells[5:] == [per_forward, accuracy, solved("tiny-dream", key)[0]]


def test_the_table_of_options_is_the_results():
    taken = seconds()
    kept = "prompt_refreshes 0"
    expected = [
        ("dual captured", "", "off"),
        ("dual captured, fp8", "-fp8", "off"),
        ("dual captured, prompt kept", "", kept),
        ("dual captured, fp8, prompt kept", "-fp8", kept),
    ]
    rows = tables(TEXT)[1]
    assert len(rows) == len(expected)
    for cells, (way, weights, policy) in zip(rows, expected, strict=True):
        key = ("dual", "threshold 0.9", 32, policy)
        models = [f"{model}{weights}-policies" for model in ("tiny-llada", "tiny-dream")]
        assert cells[1:] == [taken[way], *(solved(model, key)[0] for model in models)]


# Links.


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8"))
    for path, anchor in links:
        target = page.parent / path if path else page
        assert target.exists(), f"{name} links to {path}"
        assert not anchor or anchor in anchors(target), f"{name} links to {path}#{anchor}"
