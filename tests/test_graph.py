"""Captured cached steps: the same tokens, forwards and events as without, from addresses that stay.
See fastdllm/graph.py.

On a CPU a recording is acted: `replay` computes what was recorded anew, from the plan and the
tensors it knew then. So the whole way through Workspaces, plans and padding runs here, and the
tests marked gpu run it with real graphs.
"""

import copy
import gc
import logging
import pathlib
import tempfile
import weakref
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_decode import (
    RULES,
    Recorder,
    case,
    check_against_oracle,
    clear_case,
    product_rule,
    random_prompts,
)

import fastdllm
from fastdllm import Factor, Quota, Threshold, decode, engine, forward, graph, warming
from fastdllm.cache import Shape

BATCH = (3, 9, 4, 6, 2)  # lengths that let rows come to their blocks' starts at different times


class ActedGraph:
    """Stands for a CUDA graph: what it holds is the Forward whose launches were recorded, with that
    Forward's views.
    """

    def __init__(self, function, plan, output):
        self.function, self.plan, self.output = function, plan, output

    def pool(self):
        return None

    def replay(self):
        self.output.copy_(self.function(self.plan))


@pytest.fixture
def records(monkeypatch):
    """Captures on a CPU are acted. A list of how many rows every recorded step over the block has;
    old Workspaces are gone.
    """
    recorded, real = [], graph.record
    obstacle = decode.capture_obstacle

    def act(space, shape, function, plan, name):
        idle = torch.zeros_like(plan)
        before = {held: tensor.clone() for held, tensor in space.held.items()}
        result = function(idle)
        for held in ("canvas", "cache"):
            assert torch.equal(space.held[held], before[held])
        output = space.tensor(name, *result.shape, dtype=result.dtype, device="cpu")
        return graph.Captured(shape, idle, ActedGraph(function, idle, output), output)

    def record(space, shape, function, plan, pool, name):
        if shape and not shape.stores and shape.width == function.func.__self__.block_length:
            recorded.append(function.args[1])
        if space.device.type == "cuda":
            return real(space, shape, function, plan, pool, name)
        return act(space, shape, function, plan, name)

    def but_the_device(model, *arguments):
        elsewhere = SimpleNamespace(device=torch.device("cuda"), modules=model.modules)
        return obstacle(elsewhere, *arguments)

    monkeypatch.setattr(graph, "record", record)
    monkeypatch.setattr(decode, "capture_obstacle", but_the_device)
    monkeypatch.setattr(engine, "capture_obstacle", but_the_device)
    monkeypatch.setattr(warming, "capture_obstacle", but_the_device)
    graph._workspaces.clear()
    graph._log_once.cache_clear()
    yield recorded
    graph._workspaces.clear()


def model_of(family, device="cpu", dtype=torch.float32, **changes):
    return model_of_config(tiny.FAMILIES[family] | changes, device, dtype)


def model_of_config(config, device="cpu", dtype=torch.float32):
    with tempfile.TemporaryDirectory() as folder:
        return tiny.build(pathlib.Path(folder), config, device=device, dtype=dtype)[0]


def told(recorder):
    """What was told of each row, forward by forward: which rows share a forward may differ."""
    found = {}
    for event in recorder.events:
        names = ("rows", "positions", "token_ids", "scores")
        for row, *commit in zip(*(getattr(event, name).tolist() for name in names), strict=True):
            found.setdefault(row, []).append((event.kind, *commit))
    return found


def check_equal(model, prompts, **options):
    """Captured or not: the same result and events. Returns the captured one."""
    results, events = [], []
    for wanted in (True, False):
        recorder = Recorder()
        results.append(fastdllm.generate(model, prompts, on_step=recorder, graph=wanted, **options))
        events.append(told(recorder))
    silent = fastdllm.generate(model, prompts, **options)
    for other in (results[1], silent):
        assert all(map(torch.equal, results[0].tokens, other.tokens))
        for name in ("nfe", "refreshes", "cached_steps"):
            assert torch.equal(getattr(results[0], name), getattr(other, name))
    assert_same_events(*events)
    return results[0]


def assert_same_events(ours, theirs):
    """The same commits in the same forwards; scores but for rounding, which the number of rows of a
    product decides.
    """
    assert ours.keys() == theirs.keys()
    for row in ours:
        for mine, other in zip(ours[row], theirs[row], strict=True):
            assert mine[:-1] == other[:-1]
            assert mine[-1] == pytest.approx(other[-1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", RULES["llada"])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_captured_decoding_is_decoding(family, cache, kind, records):
    model, config, _ = case(family)
    rule = product_rule((kind, RULES[family][kind]["confidence"]))
    result = check_equal(
        model,
        random_prompts(config, BATCH, 1),
        gen_length=11,
        block_length=4,
        cache=cache,
        rule=rule,
        stop_ids=(),
    )
    assert bool(records) == (cache != "none") and result.cached_steps.any() == (cache != "none")
    assert set(records) <= {1, 2, 4, 5} and len(set(records)) == len(records)


@pytest.mark.parametrize(
    "score, temperature", [("margin", 0.0), ("entropy", 1.0), ("random", 0.0), ("confidence", 0.7)]
)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_scores_draws_and_stops_are_captured_too(family, score, temperature, records):
    model, config, _ = case(family)
    for seed in (3, 4):
        check_equal(
            model,
            random_prompts(config, BATCH, seed),
            gen_length=12,
            block_length=5,
            score=score,
            temperature=temperature,
            seed=seed,
            stop_ids=(5, 7, 11, 20),
            rule=Quota(3),
        )
    assert len(set(records)) == len(records), "another seed captured the step again"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_other_prompts_and_parameters_replay_what_was_captured(family, records):
    model, config, _ = case(family)
    options = {"gen_length": 10, "block_length": 4, "stop_ids": ()}
    for rules in (
        [Threshold(0.2), Threshold(2.0), Threshold(torch.tensor([0.1, 0.3, 2.0]))],
        [Factor(0.5), Factor(torch.tensor([0.5, 1.5, 3.0]))],
        [Quota(1), Quota(4), Quota(torch.tensor([1, 2, 3]))],
        [Quota(3, schedule="dream"), Quota(torch.tensor([4, 2, 3]), schedule="dream")],
    ):
        records.clear()
        for seed, rule in enumerate(rules):
            check_equal(model, random_prompts(config, (7 - seed, 2, 5), seed), rule=rule, **options)
        assert len(records) == len(set(records)) <= 3, "a step of this size was captured twice"


def test_what_a_request_leaves_behind_reaches_no_other(records):
    """The longest first: its tokens, keys and values lie where shorter requests of other shapes
    read and write after it.
    """
    model, config, _ = case("llada")
    options = {"gen_length": 9, "block_length": 3, "rule": Threshold(0.3), "stop_ids": ()}
    for lengths in ((80, 40, 60), (2, 5), (30,), (80, 1, 1), (4,)):
        check_equal(model, random_prompts(config, lengths, len(lengths)), **options)
    space = graph._workspaces[model]
    addresses = {name: held.data_ptr() for name, held in space.held.items()}
    for lengths in ((2,), (40, 50, 3)):
        fastdllm.generate(model, random_prompts(config, lengths, 0), **options)
    assert addresses == {name: held.data_ptr() for name, held in space.held.items()}, (
        "memory grows with every call"
    )


def test_rows_that_sit_a_step_out_are_padding_and_a_users_rule_sees_none(records):
    model, config, _ = case("llada")
    seen = []

    def half(scores, candidates, step):
        seen.append(len(step))
        assert candidates.any(1).all()
        return candidates & (
            (scores >= 0.3) | (scores == scores.masked_fill(~candidates, -1).amax(1, keepdim=True))
        )

    options = {"gen_length": 12, "block_length": 6, "stop_ids": ()}
    for seed in range(3):
        prompts = random_prompts(config, BATCH, seed)
        own = fastdllm.generate(model, prompts, rule=half, **options)
        ours = fastdllm.generate(model, prompts, rule=Threshold(0.3), **options)
        assert all(map(torch.equal, own.tokens, ours.tokens)) and torch.equal(own.nfe, ours.nfe)
    assert 3 in seen and 4 in records and 3 not in records


def test_a_bounded_number_is_kept_and_the_least_recently_used_goes(records, monkeypatch):
    monkeypatch.setattr(graph, "MOST", 4)  # two forwards, and what selects after each
    model, config, _ = case("llada")
    prompts = random_prompts(config, (4,), 0)
    for block_length in (
        6,
        4,
        5,
        4,
        6,
    ):  # the longest first: a larger canvas would drop the steps of the others
        check_equal(
            model,
            prompts,
            gen_length=12,
            block_length=block_length,
            rule=Threshold(0.9),
            stop_ids=(),
        )
    assert len(graph.captured(model)) == 2 and len(records) == 4, (
        "the 6 went when the 5 came, and the 5 when the 6 came back"
    )
    check_equal(model, prompts, gen_length=12, block_length=4, rule=Threshold(0.9), stop_ids=())
    assert len(records) == 4, "the one used last but one was dropped"
    check_equal(model, prompts, gen_length=12, block_length=5, rule=Threshold(0.9), stop_ids=())
    assert len(records) == 5 and len(graph.captured(model)) == 2


def test_a_larger_tensor_takes_new_memory_and_the_steps_that_knew_the_old_are_dropped():
    space = graph.Workspace(torch.device("cpu"))
    make = {"dtype": torch.int64, "device": "cpu"}
    one = space.tensor("canvas", 2, 8, **make)
    space.steps["key"] = None
    assert space.tensor("canvas", 3, 5, **make).data_ptr() == one.data_ptr() and space.steps
    assert space.tensor("other", 0, 5, **make).shape == (0, 5)
    space.steps["key"] = None
    assert space.tensor("canvas", 3, 8, **make).shape == (3, 8) and not space.steps
    space.steps["key"] = None
    assert (
        space.tensor("canvas", 3, 8, dtype=torch.float16, device="cpu").dtype == torch.float16
        and not space.steps
    )


@pytest.mark.parametrize("wanted", [True, False])
def test_a_listener_may_decode_with_the_same_model(wanted, records):
    model, config, _ = case("llada")
    prompts, others = random_prompts(config, (6, 3), 0), random_prompts(config, (11, 2, 5), 1)
    options = {
        "gen_length": 10,
        "block_length": 5,
        "rule": Threshold(0.3),
        "stop_ids": (),
        "graph": wanted,
    }
    inner = []

    def listen(event):
        inner.append(fastdllm.generate(model, others, **options))

    outer = fastdllm.generate(model, prompts, on_step=listen, **options)
    recorded = len(records)
    assert all(map(torch.equal, outer.tokens, fastdllm.generate(model, prompts, **options).tokens))
    assert len(records) == recorded, "the call that was let in took the Workspace away"
    alone = fastdllm.generate(model, others, **options)
    assert len(inner) > 4 and all(
        torch.equal(a, b) for one in inner for a, b in zip(one.tokens, alone.tokens, strict=True)
    )


def test_a_model_that_has_changed_is_captured_anew(records):
    model = model_of("llada")
    config = tiny.LLADA
    prompts = random_prompts(config, (4, 4), 0)
    options = {"gen_length": 8, "block_length": 8, "rule": Quota(2), "stop_ids": ()}
    check_equal(model, prompts, **options)
    changes = (
        lambda: setattr(model.lm_head, "weight", torch.nn.Parameter(model.lm_head.weight.flip(1))),
        lambda: model.to(torch.float16),
        lambda: model.train(not model.training),
        lambda: setattr(model.layers[0].down, "scaling", {"default": 2.0}),
        lambda: model.layers[0].down.scaling.update(default=3.0),
        lambda: setattr(model, "head", lambda hidden: model.lm_head(2 * hidden)),
        lambda: model.layers.insert(0, model.layers.pop(1)),
    )
    for change in changes:
        before = len(records)
        check_equal(model, prompts, **options)
        assert len(records) == before
        change()
        check_equal(model, prompts, **options)
        assert len(records) > before


def test_a_models_hooks_run_in_every_forward(records, caplog):
    model = model_of("llada")
    caplog.set_level(logging.INFO, graph.__name__)
    calls = []
    hook = model.norm.register_forward_hook(lambda module, inputs, output: calls.append(1))
    options = {"gen_length": 8, "block_length": 8, "rule": Quota(4), "stop_ids": ()}
    done = fastdllm.generate(model, random_prompts(tiny.LLADA, (4,), 0), **options)
    assert len(calls) == done.nfe[0] == 4 and not records
    assert any("hooks" in message for message in caplog.messages)
    hook.remove()
    fastdllm.generate(model, random_prompts(tiny.LLADA, (4,), 0), **options)
    assert records


def test_what_is_kept_goes_with_clear_with_the_model_and_after_an_error(records):
    model = model_of("dream")
    prompts = random_prompts(tiny.DREAM, (4,), 0)
    options = {"gen_length": 8, "block_length": 8, "rule": Threshold(0.5), "stop_ids": ()}

    def fail(event):
        raise KeyError

    def kept(model):
        fastdllm.generate(model, prompts, **options)
        return weakref.ref(graph._workspaces[model])

    held = kept(model)
    graph.clear(model)
    gc.collect()
    assert held() is None
    held = kept(model)
    with pytest.raises(KeyError):
        fastdllm.generate(model, prompts, on_step=fail, **options)
    gc.collect()
    assert held() is None
    held = kept(model)
    # an acted graph holds its decoder and so the model, which no real one does
    held().steps.clear()
    del model
    gc.collect()
    assert held() is None and not graph._workspaces
    graph.clear(case("llada")[0])  # nothing there: nothing to do


def test_every_obstacle_is_logged_once(records, caplog, monkeypatch):
    monkeypatch.undo()
    graph._log_once.cache_clear()
    caplog.set_level(logging.INFO, graph.__name__)
    model, config, _ = case("llada")
    prompts = random_prompts(config, (3,), 0)
    for _ in range(2):
        for options in ({}, {"graph": False}):
            fastdllm.generate(model, prompts, gen_length=4, block_length=4, **options)
    assert [
        "on cpu" in caplog.messages[0],
        "graph=False" in caplog.messages[1],
        len(caplog.messages),
    ] == [True, True, 2]


def test_a_model_that_cannot_be_captured_decodes_without_and_says_so_once(
    records, caplog, monkeypatch
):
    model, config, _ = case("llada")
    prompts = random_prompts(config, (3, 5), 0)
    attempts = []

    def refuse(*arguments):
        attempts.append(arguments)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graph, "record", refuse)
    for _ in range(2):
        check_equal(model, prompts, gen_length=9, block_length=4, rule=Threshold(0.3), stop_ids=())
    warned = [message for message in caplog.messages if "cannot be captured" in message]
    assert len(warned) == len(attempts) == 1 and "stream is capturing" in warned[0]


def test_inference_mode_may_come_and_go(records):
    model, config, _ = case("llada")
    prompts = random_prompts(config, (3, 5), 0)
    options = {"gen_length": 9, "block_length": 4, "rule": Threshold(0.3), "stop_ids": ()}
    with torch.inference_mode():
        one = check_equal(model, prompts, **options)
    two = check_equal(model, prompts, **options)
    assert all(map(torch.equal, one.tokens, two.tokens))


def replaced(device="cpu", dtype=torch.float32):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        max_position_embeddings=96,
        eos_token_id=38,
    )
    model = transformers.Qwen2ForCausalLM(config).to(device, dtype).eval()
    return fastdllm.replace_attention(model, mask_id=37)


def test_a_replaced_model_goes_the_same_way(records):
    model = replaced()
    prompts = random_prompts(tiny.LLADA, (6, 3, 4), 0)
    options = {"gen_length": 10, "block_length": 5, "rule": Threshold(0.035), "stop_ids": ()}
    check_equal(model, prompts, **options)
    assert records and model.fastdllm_adapter in graph._workspaces
    before = len(records)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0))
    check_equal(model, prompts, **options)
    assert len(records) > before
    graph.clear(model)
    assert not graph._workspaces


# With real graphs.

GPU_OPTIONS = {"gen_length": 24, "block_length": 8, "stop_ids": ()}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_captured_on_a_gpu(family, dtype, records):
    model = model_of(family, "cuda", dtype)
    prompts = random_prompts(tiny.FAMILIES[family], BATCH, 2)
    for cache in ("dual", "prefix"):
        for kind, of_score in RULES[family].items():
            rule = product_rule((kind, of_score["confidence"]))
            records.clear()
            check_equal(model, prompts, cache=cache, rule=rule, **GPU_OPTIONS)
            assert len(records) == len(set(records))
    options = {"score": "margin", "temperature": 0.8, "seed": 5, **GPU_OPTIONS, "stop_ids": (5, 7)}
    check_equal(model, prompts, rule=Quota(3), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_replay_takes_other_spans_rows_and_parameters(family, records):
    model = model_of(family, "cuda")
    config = tiny.FAMILIES[family]
    check_equal(model, random_prompts(config, (30, 7, 12), 0), rule=Threshold(0.2), **GPU_OPTIONS)
    first = set(records)
    for seed, rule in enumerate(
        (Threshold(0.05), Threshold(2.0), Threshold(torch.tensor([0.1, 0.3, 2.0])))
    ):
        check_equal(
            model, random_prompts(config, (5 + seed, 60, 21), seed), rule=rule, **GPU_OPTIONS
        )
    assert len(records) == len(set(records)), "a step of this size was captured twice"
    assert first


@pytest.mark.gpu
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_gpu_decodes_as_is_right(family, records):
    rule = ("threshold", RULES[family]["threshold"]["confidence"])
    options = {"gen_length": 11, "block_length": 4, "cache": "dual"}
    prompts, rows = clear_case(family, (3, 6), rule=rule, **options)
    recorder = Recorder()
    model = copy.deepcopy(case(family)[0]).to("cuda")
    result = fastdllm.generate(
        model, prompts, rule=product_rule(rule), stop_ids=(), on_step=recorder, **options
    )
    check_against_oracle(result, rows, recorder)
    assert records


@pytest.mark.gpu
def test_memory_stays_and_is_given_back(records):
    model, prompts = model_of("llada", "cuda"), random_prompts(tiny.LLADA, (20, 30, 40), 0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    held = []
    for _ in range(4):
        fastdllm.generate(model, prompts, rule=Threshold(0.3), **GPU_OPTIONS)
        held.append(torch.cuda.memory_allocated())
    assert held[-1] == held[-2] > before
    kept = sum(
        tensor.numel() * tensor.element_size() for tensor in graph._workspaces[model].held.values()
    )
    graph.clear(model)
    assert held[-1] - torch.cuda.memory_allocated() >= kept > 0


@pytest.mark.gpu
def test_a_forward_that_reads_back_to_the_host_runs_uncaptured_on_a_gpu(records, caplog):
    model, prompts = model_of("llada", "cuda"), random_prompts(tiny.LLADA, (5, 8), 0)
    plain = fastdllm.generate(model, prompts, rule=Threshold(0.3), graph=False, **GPU_OPTIONS)
    head = model.lm_head
    model.head = lambda hidden: head(hidden) if hidden.isfinite().all() else None
    stream = torch.cuda.current_stream()
    for _ in range(2):
        result = check_equal(model, prompts, rule=Threshold(0.3), **GPU_OPTIONS)
        assert all(map(torch.equal, result.tokens, plain.tokens))
    assert sum("cannot be captured" in message for message in caplog.messages) == 1
    assert torch.cuda.current_stream() == stream
    assert torch.randn(3, device="cuda").isfinite().all()
    before = len(records)
    check_equal(
        model_of("dream", "cuda"),
        random_prompts(tiny.DREAM, (5, 8), 0),
        rule=Threshold(0.3),
        **GPU_OPTIONS,
    )
    assert len(records) > before


@pytest.mark.gpu
def test_a_replaced_model_is_captured_on_a_gpu(records):
    model = replaced("cuda", torch.bfloat16)
    prompts = random_prompts(tiny.LLADA, (6, 3, 4), 0)
    check_equal(model, prompts, rule=Threshold(0.035), **GPU_OPTIONS)
    assert records and graph._workspaces[model.fastdllm_adapter].captures


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
@pytest.mark.parametrize("kept", [False, True], ids=["all", "kept"])
def test_what_is_not_much_is_captured_once_its_padded_length_has_come_often(
    family, cache, kept, records, monkeypatch
):
    if cache == "none" and kept:
        pytest.skip("nothing keeps the prompt")
    monkeypatch.setattr(forward, "LENGTHS", 8)
    monkeypatch.setitem(forward.LAUNCH_BOUND, "cpu", 64)
    model, config = model_of(family), tiny.FAMILIES[family]
    policy = (
        fastdllm.CachePolicy(prompt_refreshes=0, suffix_blocks=1)
        if kept
        else fastdllm.CachePolicy()
    )
    options = {
        "cache": cache,
        "policy": policy,
        "rule": Quota(2),
        "stop_ids": (),
        "block_length": 4,
        "gen_length": 12,
    }
    for lengths in ((6, 6), (7, 5), (8, 8), (5, 6)):  # canvases of 17 to 20: one padded length
        plain = fastdllm.generate(
            model_of(family), random_prompts(config, lengths, 0), **options, graph=False
        )
        result = check_equal(model, random_prompts(config, lengths, 0), **options)
        assert all(map(torch.equal, result.tokens, plain.tokens))
    shapes = [step.shape for step in graph.captured(model)]
    refreshes, steps = (
        [shape for shape in shapes if shape.stores == wanted] for wanted in (True, False)
    )
    assert {shape.width for shape in refreshes} == {16 if kept else 24}
    assert {shape.whole for shape in refreshes} == ({True, False} if kept else {True})
    widths = {"none": set(), "dual": {4}, "prefix": {4, 8} if kept else {4, 8, 16}}
    assert {shape.width for shape in steps} == widths[cache]


def test_what_was_dropped_must_come_often_again(monkeypatch):
    monkeypatch.setattr(graph, "MOST", 1)
    nothing = SimpleNamespace(replay=lambda: None, pool=lambda: None)
    monkeypatch.setattr(
        graph,
        "record",
        lambda space, shape, function, plan, *_: graph.Captured(shape, plan, nothing, plan),
    )
    space = graph.Workspace(torch.device("cpu"), state=[])
    captured = []
    for key in "aaabbbaaaab":
        plan = torch.zeros(1, dtype=torch.int64)
        space.run(key, Shape(4), lambda plan: plan, plan, patience=2)
        captured.append("".join(space.steps))
    assert captured == ["", "", "a", "a", "a", "b", "b", "b", "a", "a", "a"]


@pytest.mark.gpu
def test_replays_of_one_graph_in_one_turn_keep_their_plans(records):
    """Rows whose refreshes have one padded length replay one graph one after another, and the host
    is far ahead of the GPU then.
    """
    config = tiny.LLADA | {"d_model": 1024, "mlp_hidden_size": 4096, "n_layers": 8}
    model = model_of_config(config, "cuda")
    prompts = random_prompts(tiny.LLADA, (40, 42, 45, 47), 0)
    options = {"gen_length": 8, "block_length": 4, "rule": Quota(2), "stop_ids": ()}
    alone = [fastdllm.generate(model, [p], graph=False, **options).tokens[0] for p in prompts]
    for _ in range(4):
        together = fastdllm.generate(model, prompts, **options).tokens
        assert all(map(torch.equal, together, alone))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_is_selected_after_a_captured_forward_is_captured_for_all_numbers(family, records):
    model, config = model_of(family), tiny.FAMILIES[family]
    options = {"gen_length": 12, "block_length": 4, "stop_ids": ()}

    def kinds():
        steps = graph._workspaces[model].steps.items()
        return {key[1] for key, step in steps if step.kind == "selection"}

    def decode(texts, **changes):
        prompts = random_prompts(config, (5, 9, 7), texts)
        got, wanted = (
            fastdllm.generate(each, prompts, graph=captured, **options, **changes)
            for each, captured in ((model, True), (model_of(family), False))
        )
        assert all(map(torch.equal, got.tokens, wanted.tokens))

    decode(0, rule=Threshold(2.0))
    assert len(kinds()) == 1
    for texts, tau in enumerate((0.1, 0.3, torch.tensor([0.0, 0.2, 2.0]))):
        decode(texts, rule=Threshold(tau))
    assert len(kinds()) == 1, "another threshold is no other graph"
    drawn = {"rule": Quota(4), "temperature": 0.7, "top_p": 0.9}
    decode(0, **drawn, seed=1)
    decode(1, **drawn | {"temperature": 1.3, "top_p": 0.5, "seed": 2})
    assert len(kinds()) == 2, "nor are other temperatures, filters and seeds"
    decode(2, rule=lambda scores, candidates, step: candidates)
    assert len(kinds()) == 2, "a rule that is a function runs as it is"
