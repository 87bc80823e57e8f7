"""What a client is told when it gets no answer: OpenAI's error shape."""

from typing import Any

TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class Refused(Exception):
    """A request that gets an error. status: HTTP's. param: the parameter at fault, if it is one.

    code: a word for programs. headers: sent along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's API writes it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        facts = {"message": str(self), "type": TYPES.get(self.status, kind)}
        return {"error": {**facts, "param": self.param, "code": self.code}}


def wrong(param: str | None, message: str, code: str | None = None) -> Refused:
    """400: a parameter holds what it must not."""
    name = f"{param}: " if param else ""
    return Refused(400, f"{name}{message}", param=param, code=code)
