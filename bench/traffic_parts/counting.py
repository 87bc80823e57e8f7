"""What is compiled and captured while requests are answered."""

from __future__ import annotations

import os
import threading
from pathlib import Path

try:
    import triton
except ImportError:  # on a machine without it nothing is compiled
    triton = None

BINARIES = ("*.cubin", "*.hsaco")


class Compiles:
    """What Triton compiles while the block is open, and what it loads that an earlier process
    compiled: either is a kernel that this process had not met before.

        with Compiles() as compiles:
            ...
        compiles.report()

    Triton tells a listener. An older one has none: then the files that are new in its cache on disk
    are counted, and neither seconds nor what was loaded is known.
    """

    def __init__(self):
        self.compiled = self.loaded = 0
        self.compile_seconds = self.load_seconds = 0.0
        self._open = False
        self._counting = threading.Lock()
        self._knobs = getattr(getattr(triton, "knobs", None), "compilation", None)
        self._listens = hasattr(self._knobs, "listener")

    def __enter__(self):
        self._open = True
        if self._listens:
            self._before = self._knobs.listener
            self._knobs.listener = self._hear
        else:
            self._before = cached_binaries()
        return self

    def __exit__(self, *error):
        self._open = False
        if not self._listens:
            self.compiled = len(cached_binaries() - self._before)
        elif self._knobs.listener == self._hear:
            self._knobs.listener = self._before  # else somebody listens since, and tells this one

    def _hear(self, *, times, cache_hit, **others):
        if self._open:
            with self._counting:  # kernels may be compiled side by side
                self._count(times.total / 1e6, cache_hit)
        if self._before:
            self._before(times=times, cache_hit=cache_hit, **others)

    def _count(self, seconds, cache_hit):
        if cache_hit:
            self.loaded += 1
            self.load_seconds += seconds
        else:
            self.compiled += 1
            self.compile_seconds += seconds

    def report(self) -> dict:
        """{"compiled", "compile_seconds", "loaded", "load_seconds"}; None is not known. Seconds are
        summed up, also of what was compiled side by side.
        """
        known = self._listens
        return {
            "compiled": self.compiled,
            "compile_seconds": self.compile_seconds if known else None,
            "loaded": self.loaded if known else None,
            "load_seconds": self.load_seconds if known else None,
        }


def cached_binaries() -> set[Path]:
    """The compiled kernels in Triton's cache on disk."""
    folder = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    return {path for pattern in BINARIES for path in Path(folder).rglob(pattern)}


class Captures:
    """The forwards that an engine captures while the block is open, and the seconds of it, those of
    what is compiled for a forward included.
    """

    def __init__(self, engine):
        self._engine = engine

    def __enter__(self):
        self._before = self._engine.stats()
        return self

    def __exit__(self, *error):
        self._after = self._engine.stats()

    def report(self) -> dict:
        """{"captured", "capture_seconds"}."""
        return {
            name: self._after[name] - self._before[name] for name in ("captured", "capture_seconds")
        }
