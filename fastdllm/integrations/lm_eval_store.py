"""The answers of an lm-eval run, kept in a file, so that the same run started again goes on."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .lm_eval_options import NOT_IN_TEXT, Options


class Store:
    """Answers kept in a folder, found again by the prompt and by all that decides the text.

    The file is only ever appended to, a line an answer: a run that is killed loses none that was
    written. At most its last line is torn, and that answer is made again.
    """

    def __init__(self, options: Options):
        self.settings = {
            name: value for name, value in asdict(options).items() if name not in NOT_IN_TEXT
        }
        self.found: dict[str, str] = {}
        self.times: Counter[str] = Counter()
        self.file = Path(options.resume) / "answers.jsonl" if options.resume else None
        self.torn = False
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self._read(self.file.read_bytes() if self.file.exists() else b"")

    def _read(self, content: bytes) -> None:
        self.torn = bool(content) and not content.endswith(b"\n")
        for line in content.splitlines():
            try:
                key, answer = json.loads(line)
                self.found[key] = answer
            except (TypeError, ValueError):  # torn
                continue

    def key(self, context: str, settings: Mapping[str, Any]) -> str:
        """The name of this request; one asked for several times has several."""
        request = json.dumps([context, settings, self.settings], sort_keys=True)
        self.times[request] += 1
        return hashlib.sha256(f"{request} {self.times[request]}".encode()).hexdigest()

    def add(self, key: str, answer: str) -> None:
        """Keep an answer, in the file too."""
        self.found[key] = answer
        if self.file is None:
            return
        line = json.dumps([key, answer]) + "\n"
        with self.file.open("a", encoding="utf-8") as file:
            file.write("\n" + line if self.torn else line)
        self.torn = False
