"""The tokenizer of the two small models: one token a known word, one a digit, bytes for everything
else.

Text is cut into pieces: a run of letters, a digit or any other sign, each with the space before it
where there is one. A piece that is in the vocabulary is one token; any other is spelled in bytes,
so that every text comes back exactly.

Prompt format: `Question: <question> Answer:`, on one line. The model goes on with a space, the
worked answer, and the end-of-text token. Run as a script, it writes the tokenizer's files into a
folder.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # bench/, where it runs as a script

from tiny_models import chains  # noqa: E402
from tiny_models.problems import (  # noqa: E402
    CONTAINERS,
    ITEMS,
    NAMES,
    TEMPLATES,
    THINGS,
    Problem,
)

EOS, MASK = "<|endoftext|>", "<|mask|>"
EOS_ID, MASK_ID = 0, 1
CHAT_TEMPLATE = (
    "{% for message in messages %}Question: {{ message['content'] }} Answer:{% endfor %}"
)
PIECE = r"####| ?[A-Za-z]+| ?[0-9]| ?[^\sA-Za-z0-9]|\s"


def prompt_of(problem: Problem) -> str:
    """The text that the models are asked to go on from."""
    return f"Question: {problem.question} Answer:"


def _byte_letters() -> list[str]:
    """The printable letter that byte-level tokenizers write for each of the 256 bytes."""
    kept = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    moved = (byte for byte in range(256) if byte not in kept)
    letters = {byte: chr(byte) for byte in kept} | {
        byte: chr(256 + i) for i, byte in enumerate(moved)
    }
    return [letters[byte] for byte in range(256)]


def _known_pieces() -> list[str]:
    """Every piece that a prompt or an answer can hold, read off the templates and the pools of
    words.
    """
    texts = [" Question", "Question: 0 Answer:", *(f" {d}" for d in range(10)), *NAMES]
    texts += [f" {word}" for pool in (NAMES, THINGS, CONTAINERS, ITEMS) for word in pool]
    for template in TEMPLATES:
        texts += [f" {text}" for text in (*template.questions, f"{template.answer}\n#### {{f}}")]
    known = _pieces_of(texts)
    # Behind the others: their ids are those of the checkpoints that know no chains.
    return [*known, *(piece for piece in _pieces_of(chains.texts()) if piece not in known)]


def _pieces_of(texts: list[str]) -> list[str]:
    """The pieces of texts with slots that are more than a sign, sorted."""
    filled = [re.sub(r"\{\w+\}", "0", text) for text in texts]
    pieces = {piece for text in filled for piece in re.findall(PIECE, text)}
    return sorted(piece for piece in pieces if len(piece) > 1)


def vocabulary() -> dict[str, int]:
    """Piece -> id: the special tokens, the 256 bytes (an ASCII one as its character), the known
    pieces.
    """
    singles = [chr(byte) if byte < 128 else f"<0x{byte:02X}>" for byte in range(256)]
    return {piece: i for i, piece in enumerate([EOS, MASK, *singles, *_known_pieces()])}


_IDS = vocabulary()
_FIND = re.compile(PIECE).findall
VOCAB_SIZE = len(_IDS)


def encode_known(text: str) -> list[int]:
    """What tokenizer.json gives for text made of known pieces, several times as fast. KeyError for
    any other piece.
    """
    return [_IDS[piece] for piece in _FIND(text)]


def encode_problem(problem: Problem) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids), the answer without its end-of-text token."""
    return encode_known(prompt_of(problem)), encode_known(" " + problem.answer_text)


def write_tokenizer(folder: str | Path) -> Path:
    """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer loads, into
    `folder`.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = _byte_letters()
    vocab = {"".join(letters[byte] for byte in piece.encode()): i for piece, i in _IDS.items()}
    vocab = {piece: i for piece, i in vocab.items() if not 2 <= i < 258} | {
        x: 2 + i for i, x in enumerate(letters)
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    split = pre_tokenizers.Split(Regex(PIECE), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (EOS, MASK)]
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": EOS,
        "mask_token": MASK,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": 1024,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return folder


if __name__ == "__main__":
    write_tokenizer(sys.argv[1])
