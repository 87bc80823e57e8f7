"""What a server is told when it starts."""

from dataclasses import dataclass, field

from fastdllm_kernels import Threshold

from ..sampling import Rule

KIB = 1024
LAST_WORDS = 5.0  # seconds that clients get to be told that their time is over


@dataclass(frozen=True)
class Settings:
    """What a server answers, and what it refuses.

    model: the name by which clients call it. positions: prompt and answer together. rule,
    gen_length: where a request does not say. block_length: the engine's. choices: answers to one
    request at most. body_bytes: of a request at most. key: what clients must show, if anything.
    origins: whose pages may read answers (CORS). drain_seconds: what running requests get when the
    server is told to end.
    """

    model: str
    positions: int
    rule: Rule = Threshold(0.9)
    gen_length: int = 256
    block_length: int = 32
    choices: int = 64
    body_bytes: int = 1024 * KIB
    key: str | None = field(default=None, repr=False)
    origins: tuple[str, ...] = ()
    drain_seconds: float = 30.0

    @property
    def cut_seconds(self) -> float:
        """After so long nobody is waited for any more."""
        return self.drain_seconds + LAST_WORDS
