"""Answers as OpenAI's API writes them: whole, or in the chunks of a stream.

Beside `usage` stand `forwards`, what the answers took of the model: with block-wise diffusion one
forward commits several tokens.
"""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from ..text import TextModel
from .asked import Asked
from .service import Answer, Piece
from .settings import Settings
from .writing import UNDECODED


class Shape:
    """How the answers to one request are written."""

    def __init__(self, asked: Asked, loaded: TextModel, settings: Settings):
        self.asked, self.loaded = asked, loaded
        kind = "chatcmpl" if asked.chat else "cmpl"
        self._facts = {
            "id": f"{kind}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": settings.model,
        }
        self._begun: set[int] = set()
        self._characters: dict[int, int] = {}

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """All answers, from their last pieces."""
        answers = sorted((piece.answer for piece in pieces), key=lambda answer: answer.index)
        tokens = {piece.answer.index: piece.tokens for piece in pieces}
        return {
            **self._facts,
            "object": "chat.completion" if self.asked.chat else "text_completion",
            "choices": [self._choice(answer, tokens[answer.index]) for answer in answers],
            **self._spent(answers),
        }

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """One piece of a stream."""
        answer = piece.answer
        choice = {
            "index": answer.index,
            **self._new_text(answer.index, piece.text),
            "logprobs": self._logprobs(answer, piece.tokens),
            "finish_reason": answer.finish_reason if piece.last else None,
        }
        usage = {"usage": None} if self.asked.usage else {}
        return {**self._facts, "object": self._chunk_object, "choices": [choice], **usage}

    def last_chunk(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """What a stream ends with where its usage was asked for."""
        spent = self._spent(answers)
        return {**self._facts, "object": self._chunk_object, "choices": [], **spent}

    @property
    def _chunk_object(self):
        return "chat.completion.chunk" if self.asked.chat else "text_completion"

    def _choice(self, answer, tokens):
        text = answer.writing.text
        message = {"role": "assistant", "content": text, "refusal": None}
        return {
            "index": answer.index,
            **({"message": message} if self.asked.chat else {"text": text}),
            "logprobs": self._logprobs(answer, tokens),
            "finish_reason": answer.finish_reason,
        }

    def _new_text(self, index, text):
        if not self.asked.chat:
            return {"text": text}
        role = {} if index in self._begun else {"role": "assistant"}
        self._begun.add(index)
        return {"delta": {**role, "content": text}}

    def _spent(self, answers):
        """The tokens and the forwards of whole answers; each prompt counts once."""
        prompt = sum(map(len, self.asked.prompts))
        completion = sum(len(answer.writing.tokens()) for answer in answers)
        usage = {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }
        return {"usage": usage, "forwards": sum(answer.forwards for answer in answers)}

    def _logprobs(self, answer, tokens):
        if not self.asked.logprobs:
            return None
        words = [self.loaded.decode([token]) for _, token in tokens]
        values = [answer.logprob(place) for place, _ in tokens]
        if self.asked.chat:
            pairs = zip(words, values, strict=True)
            return {"content": [_entry(word, value) for word, value in pairs], "refusal": None}
        return {
            "tokens": words,
            "token_logprobs": values,
            "top_logprobs": None,
            "text_offset": self._offsets(answer.index, words),
        }

    def _offsets(self, index, words):
        """Where in the answer's text its next tokens begin."""
        offsets = []
        for word in words:
            offsets.append(self._characters.setdefault(index, 0))
            self._characters[index] += len(word)
        return offsets


def _entry(word, value):
    spelled = None if UNDECODED in word else list(word.encode())
    return {"token": word, "logprob": value, "bytes": spelled, "top_logprobs": []}
