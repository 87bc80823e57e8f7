"""`fastdllm chat`: turns of a conversation, each answer drawn while it is denoised."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .display import View, run_of, summary
from .engine import Engine, RequestCancelled
from .text import TextModel, check_text, one_line

HELP = """/help         these lines
/clear        forget the conversation, but not the system's message
/save FILE    write the conversation as JSON
/exit         leave; so does the end of input
Ctrl-C stops an answer; what was final of it stays."""


class Chat:
    """A conversation. messages: role and content of each, the system's first where there is one.

    options: of Engine.submit, the same for every answer.
    """

    def __init__(
        self,
        loaded: TextModel,
        engine: Engine,
        view: View,
        options: dict[str, Any],
        system: str | None = None,
    ):
        self.loaded, self.engine, self.view, self.options = loaded, engine, view, options
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self.system)
        self._commands = {"/help": self._help, "/clear": self._clear, "/save": self._save}

    def run(self, read: Callable[[], str]) -> None:
        """Take lines from `read` until it raises EOFError or one of them says /exit."""
        while True:
            try:
                line = read().strip()
                if line == "/exit":
                    return
                self.take(line)
            except EOFError:
                return
            except KeyboardInterrupt:
                self.view.line("(/exit leaves)", "dim")

    def take(self, line: str) -> None:
        """Do what a line says: a command, or a question to answer."""
        word, _, rest = line.partition(" ")
        if word in self._commands:
            self._commands[word](rest.strip())
        elif word.startswith("/"):
            self.view.line(f"{word}: no such command; /help lists them", "red")
        elif line:
            self._ask(line)

    def _ask(self, question):
        asked = [*self.messages, {"role": "user", "content": question}]
        try:
            check_text("the question", question)
            ids = self._tokens(asked)
        except Exception as error:  # whatever a chat template raises
            self.view.line(one_line(error), "red")
            return
        needed = len(ids) + self.options["gen_length"]
        if needed > self.engine.positions:
            self.view.line(
                f"the conversation and an answer need {needed} positions, "
                f"{self.engine.positions} fit: /clear forgets it",
                "red",
            )
            return
        answer = self._answer(ids)
        if answer is not None:
            self.messages = [*asked, {"role": "assistant", "content": answer}]
            self._tell_room()

    def _answer(self, ids) -> str | None:
        """Show the answer to a conversation of these tokens; None where it failed.

        An interrupt ends it: then it is what was final.
        """
        final: list[int] = []

        def keep(so_far):
            final[:] = so_far

        stop_ids = self.loaded.model.config.stop_ids
        gen_length = self.options["gen_length"]
        with self.view.frames(self.loaded.tokenizer, len(ids), gen_length, stop_ids) as frames:
            on_step = None if frames is None else frames.on_step
            request = self.engine.submit(ids, on_step=on_step, on_final=keep, **self.options)
            try:
                generation = request.result()
            except KeyboardInterrupt:
                request.cancel()
                with suppress(RequestCancelled):
                    request.result()
                generation = None
            except Exception as error:
                self.view.line(one_line(error), "red")
                return None
        if generation is None:
            answer = self.loaded.decode(self.loaded.written(final))
            self.view.line(answer)
            self.view.line("(stopped)", "dim")
            return answer
        run = run_of(self.loaded, generation, generation.seconds)
        self.view.answer(run["text"], frames)
        self.view.line(summary(run), "dim")
        return run["text"]

    def _tell_room(self):
        """Say so where the next question may not have room before the canvas ends."""
        gen_length, positions = self.options["gen_length"], self.engine.positions
        room = positions - len(self._tokens(self.messages)) - gen_length
        if room < gen_length:
            left = max(0, room)
            self.view.line(
                f"room for a question of {left} tokens before the canvas of {positions} is full; "
                "/clear makes room",
                "yellow",
            )

    def _tokens(self, messages):
        if not self.loaded.tokenizer.chat_template:
            return self.loaded.tokens("\n".join(message["content"] for message in messages))
        return self.loaded.tokens(self.loaded.chat(messages), add_special_tokens=False)

    # Commands.

    def _help(self, rest):
        self.view.line(HELP)

    def _clear(self, rest):
        self.messages = list(self.system)
        self.view.line("forgotten", "dim")

    def _save(self, name):
        if not name:
            self.view.line("/save: expected a FILE", "red")
            return
        try:
            Path(name).write_text(json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n")
        except (OSError, ValueError) as error:
            self.view.line(f"/save: {one_line(error)}", "red")
            return
        self.view.line(f"{len(self.messages)} messages in {name}", "dim")
