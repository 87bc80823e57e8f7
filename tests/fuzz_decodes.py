"""Random decodes, and what must hold for every one of them, whatever the model says.

A case is a value whose repr is the Python that makes it again; `check(case)` decodes it. Oracles:

invariants  the prompt stays, no mask is left, commits fall into the active block and are final,
            the events rebuild the tokens, and no more forwards are made than masks are there
alone       a row of a batch is the row by itself: tokens and numbers of forwards
stated      the plain decoder of oracle_decode.py, where that knows the options
kernels     Triton's kernels decode as the references do (on a CPU: small cases alone)
captured    captured forwards decode as eager ones do (on a GPU)
infill      masks at the end are filled as `generate` fills them; masks anywhere, every row as alone
            and nothing else changed

Everything runs in fp32, where products of more rows may still round otherwise. Two results that
differ are a near tie, counted and no failure, where weights changed by 1e-5 of themselves change
the row as well.
"""

import contextlib
import functools
import os
import pathlib
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass, field, replace
from random import Random

import oracle_decode
import tiny
import torch

import fastdllm

CACHES = ("none", "prefix", "dual")
SCORES = ("confidence", "margin", "entropy", "random")
STATED_RULES = ("threshold", "factor", "quota", "dream")
DECODES_OF_A_MODEL = 25
# Of so many decodes one is small enough for Triton's interpreter, which takes 0.2 s a layer.
ONE_INTERPRETED_OF = 50
# A plain decoder's decision nearer than this to another may fall otherwise in fp32.
NEAR_TIE = 1e-4
DISTURBANCES = 12


@dataclass(frozen=True)
class Model:
    """The shape and the weights of a tiny model."""

    family: str
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    mlp: int
    vocab: int
    positions: int
    theta: float
    mask_id: int
    stop_ids: tuple
    tied: bool
    bias: bool
    seed: int


@dataclass(frozen=True)
class Case:
    """One call of `generate`. rule: a kind and its parameter; a tuple has one for each row."""

    model: Model
    prompts: tuple
    gen_length: int
    block_length: int
    cache: str = "dual"
    prompt_refreshes: int = 1
    suffix_blocks: int | None = None
    keep_finished: bool = False
    rule: tuple = ("threshold", 0.25)
    score: str = "confidence"
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop_ids: tuple | None = ()
    kernels: bool = False


@dataclass
class Outcome:
    """What `check` found: the oracles asked, near ties, and a (name, text) for each failure."""

    checks: Counter = field(default_factory=Counter)
    near_ties: int = 0
    failures: list = field(default_factory=list)


class Wrong(Exception):
    """An oracle disagrees; the text says how."""


def require(holds, text):
    if not holds:
        raise Wrong(text)


# Rules of a user's own.


def more_every_step(scores, candidates, step):
    """A plain function: the leftmost candidate in the first step, two in the second, and so on."""
    place = candidates.cumsum(1)
    return candidates & (place <= 1 + step[:, None])


@dataclass(frozen=True)
class Outermost:
    """A rule without a kernel: the leftmost candidate, and the rightmost where two are wanted.
    Callable, so that it is taken where only functions are.
    """

    ends: int

    def commit(self, scores, candidates, step):
        from_left = candidates.cumsum(1)
        from_right = candidates.flip(1).cumsum(1).flip(1)
        chosen = from_left == 1
        if self.ends > 1:
            chosen |= from_right == 1
        return candidates & chosen

    def __call__(self, scores, candidates, step):
        return self.commit(scores, candidates, step)


def rule_of(case, row=None):
    """The rule as `generate` takes it: for the batch, or for one row alone."""
    kind, parameter = case.rule
    if isinstance(parameter, tuple):
        parameter = torch.tensor(parameter) if row is None else parameter[row]
    if kind == "function":
        return more_every_step
    if kind == "dream":
        return fastdllm.Quota(parameter, schedule="dream")
    makers = {
        "threshold": fastdllm.Threshold,
        "factor": fastdllm.Factor,
        "quota": fastdllm.Quota,
        "dataclass": Outermost,
    }
    return makers[kind](parameter)


# Drawing a case.


def random_case(seed: int, index: int) -> Case:
    """Case number `index` of a seed: the same one in every process."""
    random = Random(f"{seed} decode {index}")
    kernels = index % ONE_INTERPRETED_OF == 0
    model = random_model(Random(f"{seed} model {index // DECODES_OF_A_MODEL}"))
    if kernels:
        model = replace(model, layers=random.choice([1, 1, 2]), vocab=random.choice([17, 300]))
        model = replace(model, mask_id=3, stop_ids=(16,))
    gen_length = random.randint(1, 3 if kernels else 10)
    prompts = random_prompts(random, model, gen_length, kernels)
    cache = random.choice(CACHES)
    prompt_refreshes = 1 if cache == "none" else random.choice([1, 1, 0, 2, 3])
    return Case(
        model=model,
        prompts=prompts,
        gen_length=gen_length,
        block_length=random.choice([*range(1, 10), gen_length, gen_length + 3]),
        cache=cache,
        prompt_refreshes=prompt_refreshes,
        suffix_blocks=random.choice([None, None, 0, 1, 2, 3]),
        keep_finished=prompt_refreshes != 1 and random.random() < 0.4,
        stop_ids=random_stops(random, model),
        kernels=kernels,
        **random_decisions(random, model, len(prompts)),
    )


def random_decisions(random, model, rows):
    """How tokens are proposed, scored and chosen: a third of the cases as oracle_decode.py can."""
    stated = random.random() < 1 / 3
    score = random.choice(SCORES[:3] if stated else SCORES)
    temperature = 0.0 if stated else random.choice([0.0, 0.0, 0.25, 1.0, 2.0])
    filtered = not stated and random.random() < 0.3
    others = () if stated else ("function", "dataclass")
    return dict(
        rule=random_rule(random, (*STATED_RULES, *others), score, rows),
        score=score,
        temperature=temperature,
        top_p=random.choice([None, 0.3, 0.75, 0.95, 1.0]) if filtered else None,
        top_k=random.choice([None, 1, 3, model.vocab, 2 * model.vocab]) if filtered else None,
        seed=random_seed(random) if temperature or score == "random" else None,
    )


def random_model(random) -> Model:
    family = random.choice(sorted(tiny.FAMILIES))
    heads = random.choice([1, 2, 3, 4, 6, 7, 8])
    vocab = random.choice([17, 32, 40, 101, 256, 257, 300, random.randint(17, 300)])
    mask_id, *stops = random.sample(range(vocab), random.choice([2, 2, 3]))
    return Model(
        family=family,
        heads=heads,
        kv_heads=random.choice([n for n in range(1, heads + 1) if heads % n == 0]),
        head_dim=random.choice([2, 4, 6, 8, 16]),
        layers=random.choice([1, 1, 2, 2, 3]),
        mlp=random.choice([1, 7, 16, 24, 48]),
        vocab=vocab,
        positions=random.randint(26, 64),
        theta=random.choice([100.0, 1e4, 5e5]),
        mask_id=mask_id,
        stop_ids=tuple(stops),
        tied=random.random() < 0.3,
        bias=family == "dream" or random.random() < 0.3,
        seed=random.randrange(2**31),
    )


def random_prompts(random, model, gen_length, small):
    """Ragged rows of any ids, masks and stop ids too; now and then the model's last position is
    used.
    """
    rows = random.choice([1, 2] if small else [1, 2, 2, 2, 3, 4, 5])
    lengths = [random.choice([1, random.randint(1, 4 if small else 13)]) for _ in range(rows)]
    if not small and random.random() < 0.05:
        lengths[random.randrange(rows)] = model.positions - gen_length
    ids = range(model.vocab)
    if random.random() < 0.3:
        ids = [*ids, *[model.mask_id, *model.stop_ids] * (model.vocab // 3)]
    return tuple(tuple(random.choice(ids) for _ in range(length)) for length in lengths)


def random_rule(random, kinds, score, rows):
    """(kind, parameter); numbers that a tiny model's scores now pass and now do not."""
    low, high = (-5, 0) if score == "entropy" else (0, 0.5)
    draw = {
        "threshold": lambda: in_64ths(random.choice([random.uniform(low, high), 0.9, 2.0])),
        "factor": lambda: in_64ths(random.choice([1.0, random.uniform(0.25, 14)])),
        "quota": lambda: random.randint(1, 7),
        "dream": lambda: random.randint(1, 7),
    }
    kind = random.choice(kinds)
    if kind == "function":
        return kind, None
    if kind == "dataclass":
        return kind, random.randint(1, 2)
    if random.random() < 0.25:
        return kind, tuple(draw[kind]() for _ in range(rows))
    return kind, draw[kind]()


def in_64ths(number):
    """A number that fp32 and Python's floats hold alike."""
    return round(64 * number) / 64


def random_seed(random):
    return random.choice([0, -1, 2**62, random.randrange(1000), random.randrange(-(2**70), 2**70)])


def random_stops(random, model):
    """None, the model's own; none at all; or several, often enough for rows to end early."""
    others = [token for token in range(model.vocab) if token != model.mask_id]
    some = random.sample(others, max(1, len(others) // 8))
    return random.choice([None, (), tuple(some)])


# Decoding a case.


def config_of(model: Model) -> dict:
    """config.json with the published keys."""
    width, stops = model.heads * model.head_dim, list(model.stop_ids)
    shared = {
        "rope_theta": model.theta,
        "mask_token_id": model.mask_id,
        "eos_token_id": stops if len(stops) > 1 else stops[0],
        "vocab_size": model.vocab,
    }
    if model.family == "llada":
        return {
            **tiny.LLADA,
            **shared,
            "d_model": width,
            "n_layers": model.layers,
            "n_heads": model.heads,
            "n_kv_heads": model.kv_heads,
            "mlp_hidden_size": model.mlp,
            "embedding_size": model.vocab,
            "max_sequence_length": model.positions,
            "weight_tying": model.tied,
            "include_qkv_bias": model.bias,
        }
    return {
        **tiny.DREAM,
        **shared,
        "hidden_size": width,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "intermediate_size": model.mlp,
        "max_position_embeddings": model.positions,
        "tie_word_embeddings": model.tied,
    }


def build(model: Model, device: str):
    """(the loaded model, its state dict by published names)."""
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder) / "model"
        return tiny.build(place, config_of(model), model.seed, device=device)


kept = functools.lru_cache(maxsize=4)(build)


def decode(case: Case, loaded, row=None, **more):
    """`generate` on the whole batch, or on one row alone as it is decoded there."""
    prompts = [torch.tensor(prompt) for prompt in case.prompts]
    prompts = prompts if row is None else prompts[row : row + 1]
    return fastdllm.generate(
        loaded, prompts, gen_length=case.gen_length, **blocks(case), **asked(case, row), **more
    )


def blocks(case: Case) -> dict:
    """What all rows of a call share, and all requests to an engine."""
    fields = case.prompt_refreshes, case.suffix_blocks, case.keep_finished
    policy = fastdllm.CachePolicy(*fields)
    return {"block_length": case.block_length, "cache": case.cache, "policy": policy}


def asked(case: Case, row=None) -> dict:
    """How the batch, or one row of it alone, is proposed and committed."""
    names = ("score", "temperature", "top_p", "top_k", "stop_ids")
    seed = case.seed if row is None or case.seed is None else case.seed + row
    return {name: getattr(case, name) for name in names} | {
        "rule": rule_of(case, row),
        "seed": seed,
    }


@contextlib.contextmanager
def backend(name):
    """FASTDLLM_BACKEND for a while; it is read on every call."""
    before = os.environ.pop("FASTDLLM_BACKEND", None)
    os.environ["FASTDLLM_BACKEND"] = name
    try:
        yield
    finally:
        del os.environ["FASTDLLM_BACKEND"]
        if before is not None:
            os.environ["FASTDLLM_BACKEND"] = before


def in_brief(result, row):
    """What two decodings of a row are compared by."""
    counts = result.refreshes[row].item(), result.cached_steps[row].item()
    return result.tokens[row].tolist(), counts


def check(case: Case, device: str = "cpu") -> Outcome:
    """Decode the case and ask every oracle that knows it."""
    outcome = Outcome()
    try:
        decoded = Decoded(case, device)
    except Exception:
        outcome.failures.append(("invariants", "generate raised\n" + traceback.format_exc()))
        return outcome
    for name, oracle in decoded.oracles():
        outcome.checks[name] += 1
        try:
            outcome.near_ties += oracle()
        except Exception as error:
            text = str(error) if isinstance(error, Wrong) else traceback.format_exc()
            outcome.failures.append((name, text))
    return outcome


class Decoded:
    """A case, decoded. An oracle returns the number of rows that are near ties, or raises Wrong."""

    def __init__(self, case, device):
        self.case, self.device, self.events = case, device, []
        self.model, self.state = kept(case.model, device)
        self.result = decode(case, self.model, on_step=self.events.append, graph=False)

    def oracles(self):
        """(name, function) of those that know the case."""
        yield "invariants", self.invariants
        if len(self.case.prompts) > 1:
            yield "alone", self.alone
        if is_stated(self.case):
            yield "stated", self.stated
        if self.case.kernels or self.device != "cpu":
            yield "kernels", self.kernels
        if self.device != "cpu":
            yield "captured", self.captured
        if not any(self.case.model.mask_id in prompt for prompt in self.case.prompts):
            yield "infill", self.infill

    def invariants(self):
        check_invariants(self.case, self.result, self.events)
        return 0

    def alone(self):
        near_ties = 0
        for row in range(len(self.case.prompts)):
            single = decode(self.case, self.model, row, graph=False)
            near_ties += self.differs(row, in_brief(single, 0))
        return near_ties

    def kernels(self):
        """On a GPU the result is the kernels' already."""
        with backend("triton" if self.device == "cpu" else "reference"):
            return self.equals(decode(self.case, self.model, graph=False))

    def captured(self):
        return self.equals(decode(self.case, self.model, graph=True))

    def infill(self):
        mask_id = self.case.model.mask_id
        ends = [(*prompt, *[mask_id] * self.case.gen_length) for prompt in self.case.prompts]
        near_ties = self.equals(fill(self.case, self.model, ends))
        random = Random(self.case.model.seed)
        holes = [
            [mask_id if random.random() < 0.4 else token for token in tokens.tolist()]
            for tokens in self.result.tokens
        ]
        filled = fill(self.case, self.model, holes)
        for row, (given, tokens) in enumerate(zip(holes, filled.tokens, strict=True)):
            kept_all = all(a in (b, mask_id) for a, b in zip(given, tokens.tolist(), strict=True))
            require(kept_all, f"row {row}: infill made {tokens.tolist()} of {given}")
            require(mask_id not in tokens, f"row {row}: infill left a mask in {tokens.tolist()}")

            def alone(model, given=given, row=row):
                return in_brief(fill(self.case, model, [given], row), 0)

            wanted, got = alone(self.model), in_brief(filled, row)
            if got != wanted:
                tie = near_tie(self.case.model, self.device, alone)
                require(tie, f"row {row}: infill of {given}: {got}, alone {wanted}")
                near_ties += 1
        return near_ties

    def equals(self, other):
        rows = range(len(self.case.prompts))
        return sum(self.differs(row, in_brief(other, row)) for row in rows)

    def differs(self, row, wanted):
        """Whether the row was decoded otherwise, by a near tie; Wrong where it is none."""
        got = in_brief(self.result, row)
        if got == wanted:
            return False
        if near_tie(self.case.model, self.device, functools.partial(brief_row, self.case, row)):
            return True
        raise Wrong(f"row {row}: {got}, expected {wanted}")

    def stated(self):
        source = oracle_decode.model_source(self.state, config_of(self.case.model))
        rows = range(len(self.case.prompts))
        return sum(self.differs_from_stated(source, row) for row in rows)

    def differs_from_stated(self, source, row):
        """As `differs`, of the plain decoder, which knows itself how near a tie was."""
        stated = stated_row(self.case, source, row)
        steps = [(kind, commits) for kind, commits in stated.steps if commits]
        wanted = (stated.tokens, (stated.refreshes, stated.cached_steps)), steps
        got = in_brief(self.result, row), commits_of(self.events, row)
        if got == wanted:
            return False
        if stated.slack < NEAR_TIE:
            return True
        raise Wrong(f"row {row}: {got}, expected {wanted}")


def brief_row(case, row, loaded):
    """The row, decoded alone."""
    return in_brief(decode(case, loaded, row, graph=False), 0)


def fill(case, loaded, sequences, row=None):
    """`infill` with the case's options; `row`: the one sequence is that of the batch."""
    sequences = [torch.tensor(sequence) for sequence in sequences]
    return fastdllm.infill(loaded, sequences, **blocks(case), **asked(case, row), graph=False)


def near_tie(model, device, run):
    """Whether weights that differ by 1e-5 of themselves make something else of run(a loaded
    model).
    """
    wanted = run(kept(model, device)[0])
    for seed in range(DISTURBANCES):
        disturbed, _ = build(model, device)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in disturbed.parameters():
                noise = torch.randn(weight.shape, generator=generator)
                weight.mul_(1 + 1e-5 * noise.to(weight.device))
        if run(disturbed) != wanted:
            return True
    return False


# The oracles.


def check_invariants(case, result, events):
    rows, mask_id = len(case.prompts), case.model.mask_id
    require(len(result.tokens) == rows, f"{len(result.tokens)} rows of {rows}")
    lengths = [len(prompt) for prompt in case.prompts]
    require(list(result.prompt_lengths) == lengths, f"prompt_lengths {result.prompt_lengths}")
    require(
        result.nfe.equal(result.refreshes + result.cached_steps), "nfe is not the forwards' sum"
    )
    canvas = replay(case, events)
    for row, prompt in enumerate(case.prompts):
        tokens = result.tokens[row].tolist()
        written = tokens[len(prompt) :]
        require(tuple(tokens[: len(prompt)]) == prompt, f"row {row}: the prompt was changed")
        require(len(written) == case.gen_length, f"row {row}: {len(written)} tokens were generated")
        require(mask_id not in written, f"row {row}: a mask is left in {written}")
        require(canvas[row] == tokens, f"row {row}: events give {canvas[row]}, not {tokens}")
        check_counts(case, result, row, written)


def check_counts(case, result, row, written):
    """How often the row was refreshed, and that its forwards are no more than its masks."""
    stops = stops_of(case)
    ended = next((i + 1 for i, token in enumerate(written) if token in stops), case.gen_length)
    block_length = min(case.block_length, case.gen_length)
    blocks = -(-ended // block_length)
    refreshes, nfe = result.refreshes[row].item(), result.nfe[row].item()
    if case.cache == "none":
        require(refreshes == nfe, f"row {row}: {nfe - refreshes} cached steps without a cache")
    else:
        require(refreshes == blocks, f"row {row}: {refreshes} refreshes for {blocks} blocks")
    most = min(blocks * block_length, case.gen_length)
    kind, steps = case.rule
    if kind == "dream":
        steps = steps[row] if isinstance(steps, tuple) else steps
        # Its step may commit nothing; a Dream's refresh decides on one position before it.
        most = max(most, blocks * (steps + 1))
    require(blocks <= nfe <= most, f"row {row}: {nfe} forwards for {blocks} blocks, {most} masks")


def stops_of(case):
    return case.model.stop_ids if case.stop_ids is None else case.stop_ids


def replay(case, events):
    """The canvas that the events write, each commit checked."""
    mask_id, stops = case.model.mask_id, stops_of(case)
    canvas = [[*prompt, *[mask_id] * case.gen_length] for prompt in case.prompts]
    for number, event in enumerate(events):
        require(event.step == number, f"event {number} says that it is step {event.step}")
        kinds = ("refresh",) if case.cache == "none" else ("refresh", "cached")
        require(event.kind in kinds, f"event {number}: a {event.kind} forward, cache {case.cache}")
        active = [active_block(case, canvas, row) for row in range(len(canvas))]
        columns = event.rows, event.positions, event.token_ids, event.scores
        for row, position, token, score in zip(*(c.tolist() for c in columns), strict=True):
            at = f"event {number}, row {row}, position {position}"
            require(position in active[row], f"{at}: outside the active block {active[row]}")
            require(canvas[row][position] == mask_id, f"{at}: committed twice")
            require(token != mask_id, f"{at}: the mask was proposed")
            require(abs(score) < float("inf"), f"{at}: the score is {score}")
            canvas[row][position] = token
        for row, prompt in enumerate(case.prompts):
            stopped = oracle_decode.finished_by_stop(canvas[row], len(prompt), mask_id, stops)
            if stopped is not None:
                length = len(canvas[row])
                canvas[row][stopped:] = [canvas[row][stopped]] * (length - stopped)
    return canvas


def active_block(case, canvas, row):
    """The positions of the row's leftmost block that holds a mask."""
    begin, end = len(case.prompts[row]), len(canvas[row])
    for start in range(begin, end, case.block_length):
        block = range(start, min(start + case.block_length, end))
        if any(canvas[row][position] == case.model.mask_id for position in block):
            return block
    return range(0)


def is_stated(case):
    """Whether oracle_decode.py knows these options: greedy ones, and rules of the project's own."""
    greedy = case.temperature == 0 and case.top_p is None and case.top_k is None
    return greedy and case.rule[0] in STATED_RULES and case.score != "random"


def stated_row(case, source, row):
    """The row by the plain decoder."""
    kind, parameter = case.rule
    return oracle_decode.decode_row(
        source,
        list(case.prompts[row]),
        mask_id=case.model.mask_id,
        gen_length=case.gen_length,
        block_length=case.block_length,
        cache=case.cache,
        rule=(kind, parameter[row] if isinstance(parameter, tuple) else parameter),
        score=case.score,
        shift=int(case.model.family == "dream"),
        stop_ids=stops_of(case),
        prompt_refreshes=case.prompt_refreshes,
        suffix_blocks=case.suffix_blocks,
        keep_finished=case.keep_finished,
    )


def commits_of(events, row):
    """The row's forwards that committed something: (kind, {position: token})."""
    found = []
    for event in events:
        mine = event.rows == row
        positions, tokens = event.positions[mine].tolist(), event.token_ids[mine].tolist()
        if positions:
            found.append((event.kind, dict(zip(positions, tokens, strict=True))))
    return found


# What the results count, and smaller cases that fail alike.


def options_of(case: Case):
    """The case's options in a few words, to be counted."""
    stops = {None: "the model's", (): "none"}.get(case.stop_ids, "some")
    sampling = "drawn" if case.temperature else "greedy"
    filters = "filtered" if case.top_p is not None or case.top_k is not None else "whole vocabulary"
    kept_prompt = "" if case.prompt_refreshes == 1 else ", prompt kept"
    finished = ", finished kept" if case.keep_finished else ""
    near_suffix = "" if case.suffix_blocks is None else ", suffix cut"
    per_row = " per row" if isinstance(case.rule[1], tuple) else ""
    return {
        "family": case.model.family,
        "layers": str(case.model.layers),
        "rows": str(len(case.prompts)),
        "cache": case.cache,
        "policy": (kept_prompt + finished + near_suffix).removeprefix(", ") or "default",
        "rule": case.rule[0] + per_row,
        "score": case.score,
        "proposals": f"{sampling}, {filters}",
        "stop_ids": stops,
    }


def simpler(case: Case):
    """Cases that are a little less than this one, the largest steps first."""
    rows = len(case.prompts)
    kind, parameter = case.rule
    for row in range(rows if rows > 1 else 0):
        fewer = case.prompts[:row] + case.prompts[row + 1 :]
        rule = case.rule
        if isinstance(parameter, tuple):
            rule = kind, parameter[:row] + parameter[row + 1 :]
        yield replace(case, prompts=fewer, rule=rule)
    for length in (1, case.gen_length // 2, case.gen_length - 1):
        if 0 < length < case.gen_length:
            yield replace(case, gen_length=length)
    if case.model.layers > 1:
        yield replace(case, model=replace(case.model, layers=1))
    for row, prompt in enumerate(case.prompts):
        if len(prompt) > 1:
            halved = case.prompts[:row] + (prompt[: len(prompt) // 2],) + case.prompts[row + 1 :]
            yield replace(case, prompts=halved)
    plain = {name: Case.__dataclass_fields__[name].default for name in PLAIN_FIRST}
    for name, value in plain.items():
        if getattr(case, name) != value:
            yield replace(case, **{name: value})


PLAIN_FIRST = (
    "stop_ids",
    "top_p",
    "top_k",
    "temperature",
    "score",
    "rule",
    "suffix_blocks",
    "keep_finished",
    "prompt_refreshes",
    "cache",
)
