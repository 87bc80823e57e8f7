"""Random requests to an engine. Whatever comes, goes or is cancelled around it, a request gets what
`generate` gives for it alone; a cancelled one is answered or says that it was cancelled.

A request is a fuzz_decodes.Case of one prompt; those of an engine share model, cache and blocks.
When each comes in the others' work is up to the threads: a failure may not come again at once.
"""

import functools
import time
import traceback
from dataclasses import dataclass, replace
from random import Random

import fuzz_decodes
import torch
from fuzz_decodes import Case, Model, Outcome, Wrong, require

import fastdllm

__all__ = ["Case", "Model", "Served", "check"]
SECONDS = 60  # that an answer may take


@dataclass(frozen=True)
class Served:
    """rows: of the engine. waits: the milliseconds before each request comes. cancels: (a request,
    how many have come when it is cancelled).
    """

    requests: tuple
    rows: int
    waits: tuple
    cancels: tuple = ()


def random_case(seed: int, index: int) -> Served:
    """Case number `index` of a seed: the same one in every process."""
    random = Random(f"{seed} engine {index}")
    shared = replace(fuzz_decodes.random_case(seed, index), kernels=False)
    count = random.randint(1, 8)
    numbers = range(count)
    cancelled = [number for number in numbers if random.random() < 0.2]
    return Served(
        requests=tuple(random_request(random, shared) for _ in numbers),
        rows=random.randint(1, 4),
        waits=tuple(random.choice([0, 0, 1, 5, 20]) for _ in numbers),
        cancels=tuple((number, random.randint(number + 1, count)) for number in cancelled),
    )


def random_request(random, shared):
    gen_length = random.randint(1, 10)
    prompts = fuzz_decodes.random_prompts(random, shared.model, gen_length, small=False)
    return replace(
        shared,
        prompts=prompts[:1],
        gen_length=gen_length,
        stop_ids=fuzz_decodes.random_stops(random, shared.model),
        **fuzz_decodes.random_decisions(random, shared.model, 1),
    )


def check(case: Served, device: str = "cpu") -> Outcome:
    """Serve the requests and compare every answer with that of `generate`."""
    outcome = Outcome()
    try:
        answers = serve(case, device)
    except Exception:
        outcome.failures.append(("engine", "the engine raised\n" + traceback.format_exc()))
        return outcome
    for number, (request, answer) in enumerate(zip(case.requests, answers, strict=True)):
        if answer is None:
            outcome.checks["cancelled"] += 1
            continue
        outcome.checks["as alone"] += 1
        try:
            outcome.near_ties += differs(request, fuzz_decodes.in_brief(answer, 0), device)
        except Wrong as error:
            outcome.failures.append(("engine", f"request {number}: {error}"))
    return outcome


def serve(case, device):
    """What each request gets: a Generation, or None where it was cancelled."""
    first = case.requests[0]
    loaded, _ = fuzz_decodes.kept(first.model, device)
    positions = max(len(request.prompts[0]) + request.gen_length for request in case.requests)
    shared = fuzz_decodes.blocks(first)
    pending, cancelled = [], {}
    with fastdllm.Engine(loaded, rows=case.rows, positions=positions, **shared) as engine:
        for request, wait in zip(case.requests, case.waits, strict=True):
            time.sleep(wait / 1000)
            prompt, options = torch.tensor(request.prompts[0]), fuzz_decodes.asked(request, 0)
            pending.append(engine.submit(prompt, gen_length=request.gen_length, **options))
            for number, come in case.cancels:
                if come == len(pending):
                    cancelled[number] = pending[number].cancel()
        answers = [answer_of(request) for request in pending]
        stats = engine.stats()
    for number, answer in enumerate(answers):
        ended = cancelled.get(number, False)
        require((answer is None) == ended, f"request {number}: cancel() gave {ended}: {answer}")
    require(stats["busy"] == stats["waiting"] == 0, f"all have ended, and stats says {stats}")
    return answers


def answer_of(request):
    try:
        return request.result(SECONDS)
    except fastdllm.RequestCancelled:
        return None


def differs(request, got, device):
    """Whether the answer is another than that of the request alone, by a near tie."""
    alone = functools.partial(fuzz_decodes.brief_row, request, 0)
    wanted = alone(fuzz_decodes.kept(request.model, device)[0])
    if got == wanted:
        return False
    if fuzz_decodes.near_tie(request.model, device, alone):
        return True
    raise Wrong(f"{got}, alone {wanted}")


def options_of(case: Served):
    """The case's options in a few words, to be counted."""
    of_requests = fuzz_decodes.options_of(case.requests[0])
    return {
        "family": of_requests["family"],
        "cache": of_requests["cache"],
        "policy": of_requests["policy"],
        "rows": str(case.rows),
        "requests": str(len(case.requests)),
        "cancelled": str(len(case.cancels)),
    }


def simpler(case: Served):
    """Cases that are a little less than this one."""
    if case.cancels:
        yield replace(case, cancels=())
        return
    for number in range(len(case.requests) if len(case.requests) > 1 else 0):
        fewer = case.requests[:number] + case.requests[number + 1 :]
        yield replace(case, requests=fewer, waits=case.waits[: len(fewer)])
