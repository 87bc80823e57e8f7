"""A model together with its tokenizer: text in, text out.

What speaks text (the command line, lm-eval) loads its model here, encodes its prompts and decodes
the answers. transformers is imported when the first tokenizer is loaded.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from . import checkpoint
from .families import FAMILIES
from .model import DiffusionTransformer
from .options import named, read_device, read_dtype

ASSETS = Path(__file__).parent / "assets"
EMBEDDED = ("tiny-llada", "tiny-dream")


@dataclass(frozen=True, eq=False)
class TextModel:
    """A model that `fastdllm.generate` takes, and the tokenizer of transformers that fits it."""

    model: DiffusionTransformer
    tokenizer: Any

    def encode(self, prompt: str, *, raw: bool = False) -> list[int]:
        """The token ids of a prompt: as a user's message in a chat, unless `raw`.

        A tokenizer without a chat template gets the prompt as it is.
        """
        if raw or not self.tokenizer.chat_template:
            return self.tokens(prompt)
        chat = self.chat([{"role": "user", "content": prompt}])
        return self.tokens(chat, add_special_tokens=False)

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """Messages of a chat (role, content) as one text, written by the tokenizer's template.

        add_generation_prompt: the model answers next; else it goes on with the last message.
        ValueError without a template.
        """
        if not self.tokenizer.chat_template:
            raise ValueError("messages: the tokenizer has no chat template")
        for message in messages:
            check_text("messages", message["content"])
        return self.tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tokens(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text; special tokens are those that the tokenizer puts around it."""
        check_text("prompt", text)
        return list(self.tokenizer(text, add_special_tokens=add_special_tokens).input_ids)

    def written(self, tokens: Iterable[int], stop_ids: Collection[int] | None = None) -> list[int]:
        """The tokens before the first end of text, by default the model's."""
        stops = self.model.config.stop_ids if stop_ids is None else stop_ids
        return list(takewhile(lambda token: token not in stops, map(int, tokens)))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of these tokens without the special ones."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)


def load(
    name: str,
    device: str | None = None,
    dtype: str | None = None,
    mesh: DeviceMesh | None = None,
) -> TextModel:
    """A model and its tokenizer, both from `name`: an embedded model, a folder or a hub id.

    device: "cpu", "cuda" or "cuda:N"; default a GPU where there is one. dtype: a word that
    `checkpoint.dtype_named` knows; default float32 on a CPU and bfloat16 on a GPU. mesh: as
    in `fastdllm.load`. UsageError for other words, RuntimeError with the cause where the model
    cannot be loaded.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = "float32" if device == "cpu" else "bfloat16"
    place = named("device", read_device, device)
    wanted = named("dtype", read_dtype, dtype)
    source = str(ASSETS / name) if name in EMBEDDED else name
    try:
        model = checkpoint.load(source, device=place, dtype=wanted, mesh=mesh)
        return TextModel(model, load_tokenizer(source, model.config.family))
    except Exception as error:
        raise RuntimeError(f"cannot load {name}: {one_line(error)}") from error


def load_tokenizer(source: str, family: str) -> Any:
    """The tokenizer in a folder or of a hub id; code that comes with it is not run."""
    from transformers import AutoTokenizer, logging

    logging.set_verbosity_error()  # it would warn that it does not know the model's type
    options: dict[str, Any] = {
        "local_files_only": Path(source).is_dir(),
        "trust_remote_code": False,
    }
    tokenizer_type = FAMILIES[family].tokenizer_type
    if tokenizer_type and not (Path(source) / "tokenizer.json").is_file():
        # Published as Python code, which is not run here; the files beside it are of this type.
        options["tokenizer_type"] = tokenizer_type
    return AutoTokenizer.from_pretrained(source, **options)


def check_text(name: str, text: str) -> None:
    """ValueError where a text holds what is no character, such as a byte that was not decoded."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        wrong = text[error.start]
        # Python's way to carry the bytes 0x80 to 0xff through a text.
        is_byte = "\udc80" <= wrong <= "\udcff"
        got = f"the byte 0x{ord(wrong) - 0xDC00:x}" if is_byte else repr(wrong)
        raise ValueError(f"{name}: expected text, got {got} at character {error.start}") from None


def one_line(error: BaseException) -> str:
    """An error as one line, with its type where the message alone would not do."""
    message = " ".join(str(error).split())
    if message and isinstance(error, OSError | ValueError | RuntimeError):
        return message
    return f"{type(error).__name__}: {message}".removesuffix(": ")
