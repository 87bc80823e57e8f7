"""What the end-to-end benchmark measures: the shapes of models and requests, and the ways of
decoding them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastdllm import CachePolicy
from fastdllm.config import ModelConfig

BLOCK = 32  # the diffusion block's length, everywhere

LLADA_8B = ModelConfig(
    family="llada",
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    intermediate_size=12288,
    vocab_size=126464,
    max_positions=4096,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
    mask_id=126336,
    stop_ids=(126081,),
    qkv_bias=False,
    tie_embeddings=False,
    logit_shift=0,
    rope_in_fp32=True,
)
DREAM_7B = ModelConfig(
    family="Dream",
    hidden_size=3584,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    intermediate_size=18944,
    vocab_size=152064,
    max_positions=4096,
    rope_theta=1000000.0,
    rms_norm_eps=1e-6,
    mask_id=151666,
    stop_ids=(151643,),
    qkv_bias=True,
    tie_embeddings=False,
    logit_shift=1,
    rope_in_fp32=False,
)
# What makes them small enough for a smoke test on a CPU.
TINY = {
    "hidden_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "vocab_size": 96,
    "max_positions": 256,
    "mask_id": 90,
    "stop_ids": (91,),
}
MODELS = {"llada": LLADA_8B, "dream": DREAM_7B}


@dataclass(frozen=True)
class Scale:
    """What is measured on one kind of machine.

    names: of the models, by their keys in MODELS. canvases: length -> generated positions. rows:
    batch sizes of the grid. headline: the headline's canvas. replaced: (canvas, rows) of the cells
    of replaced models. changes: of the real configurations. sample: seconds that a timed run takes,
    about; the number of blocks in it follows.
    """

    names: dict[str, str]
    canvases: dict[int, int]
    rows: tuple[int, ...]
    headline: int
    replaced: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    changes: dict
    sample: float


REAL = Scale(
    names={"llada": "LLaDA-8B", "dream": "Dream-7B"},
    canvases={512: 256, 1024: 512, 1280: 1024, 2048: 1024},
    rows=(1, 4, 8, 16, 32),
    headline=2048,
    replaced=((2048, 1), (1280, 8)),
    dtype=torch.bfloat16,
    changes={},
    sample=0.3,
)
SMOKE = Scale(
    names={"llada": "tiny LLaDA", "dream": "tiny Dream"},
    canvases={160: 128},
    rows=(1, 2),
    headline=160,
    replaced=((160, 1), (160, 2)),
    dtype=torch.float32,
    changes=TINY,
    sample=0.02,
)


@dataclass(frozen=True)
class Cell:
    """A request shape: `rows` prompts of canvas - gen_length tokens, gen_length masks after each
    of them.
    """

    model: str
    canvas: int
    gen_length: int
    rows: int

    @property
    def blocks(self) -> int:
        return self.gen_length // BLOCK


@dataclass(frozen=True)
class Way:
    """One way of decoding.

    cache, captured, policy: options of `generate` (captured is its graph). peer: the published
    implementation's steps, restated in plain.py, instead of `generate`. weights: None or "fp8".
    host: whose modeling code runs, "native" for fastdllm's own; see hosts.py.
    """

    name: str
    cache: str
    peer: bool = False
    captured: bool = False
    weights: str | None = None
    policy: CachePolicy = CachePolicy()
    host: str = "native"

    @property
    def whole_refreshes(self) -> bool:
        """Whether refreshes leave nothing out, so that all blocks cost alike."""
        return self.policy == CachePolicy()


WAYS = (
    Way("vanilla", "none", peer=True),
    Way("vanilla, our selection", "none"),
    Way("plain prefix", "prefix", peer=True),
    Way("plain dual", "dual", peer=True),
    Way("prefix eager", "prefix"),
    Way("prefix captured", "prefix", captured=True),
    Way("dual eager", "dual"),
    Way("dual captured", "dual", captured=True),
    Way("dual captured, fp8", "dual", captured=True, weights="fp8"),
)
# What trades accuracy for time, measured beside the headline; what it costs in accuracy is in
# results/tiny-*-policies.md.
KEPT = CachePolicy(prompt_refreshes=0)
NEAR = CachePolicy(prompt_refreshes=0, suffix_blocks=4)
OPTIONS = (
    Way("dual captured, prompt kept", "dual", captured=True, policy=KEPT),
    Way("dual captured, prompt kept, 4 blocks ahead", "dual", captured=True, policy=NEAR),
    Way("dual captured, fp8, prompt kept", "dual", captured=True, weights="fp8", policy=KEPT),
    Way(
        "dual captured, fp8, prompt kept, 4 blocks ahead",
        "dual",
        captured=True,
        weights="fp8",
        policy=NEAR,
    ),
)
REPLACED_WAYS = (
    Way("native eager", "dual"),
    Way("native captured", "dual", captured=True),
    Way("transformers eager", "dual", host="transformers"),
    Way("transformers captured", "dual", captured=True, host="transformers"),
    Way("published eager", "dual", host="published"),
    Way("published captured", "dual", captured=True, host="published"),
)


def ways_of(host: str, headline: bool) -> tuple[Way, ...]:
    """The ways that race in a cell of `--host`."""
    if host == "replaced":
        return REPLACED_WAYS
    return WAYS + OPTIONS if headline else WAYS
