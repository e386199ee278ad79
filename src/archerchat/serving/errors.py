"""Errors in OpenAI's form: what the server raises to refuse a request, and how each is answered."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from archerchat.errors import ArcherChatError, UsageError

RETRY_SECONDS = 1
TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
HANDLED = (ArcherChatError, RequestValidationError, HTTPException, RecursionError, Exception)
to_json = json.JSONEncoder(separators=(",", ":")).encode


class AsciiJSON(Response):
    """JSON in ASCII, so that half of a surrogate pair in what a client sent harms nobody."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content).encode()


class APIError(UsageError):
    """Report why a request is not answered.

    Args:
        param: the field that is wrong.
        code: OpenAI's name of the error.
    """

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status

    def content(self) -> dict[str, Any]:
        """Return the error as OpenAI's API words it."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind, message = TYPES.get(self.status, default), str(self)
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self, **headers: str) -> Response:
        if self.status == 429:
            headers["retry-after"] = str(RETRY_SECONDS)
        return AsciiJSON(self.content(), self.status, headers)


async def refuse(request: Request, error: Exception) -> Response:
    """Answer an error in OpenAI's form."""
    return _explain(error).response(**(getattr(error, "headers", None) or {}))


def _explain(error: Exception) -> APIError:
    match error:
        case APIError():
            return error
        case RequestValidationError():
            # Of a union's branches, the one that went furthest says most.
            worst = max(error.errors(), key=lambda each: len(each["loc"]))
            param = _field_name(worst["loc"])
            return APIError(f"{param or 'the body'}: {worst['msg']}", param)
        case ArcherChatError():  # it may name flags of the command line, which are fields here
            message = re.sub("--([a-z-]+)", lambda flag: flag[1].replace("-", "_"), str(error))
            field = re.search("temperature|logit_bias|prompt", message)
            status = 400 if isinstance(error, UsageError) else 500
            return APIError(message, field and field[0], status=status)
        case HTTPException():
            return APIError(str(error.detail), status=error.status_code)
        case RecursionError():
            return APIError("the body is nested too deeply")
        case _:
            return APIError(f"the server failed: {type(error).__name__}", status=500)


def _field_name(place: Sequence[str | int]) -> str | None:
    """Return where an error is, such as `messages[0].content`, without the names of types."""
    steps = place[1:-2] if place[-1] == "[key]" else place[1:]  # a bad key is its object's fault
    types = re.compile(r"[\[\]()-]|^(str|int|json_invalid)$")
    names = (f"[{s}]" if isinstance(s, int) else f".{s}" for s in steps if not types.search(str(s)))
    return "".join(names).removeprefix(".") or None
