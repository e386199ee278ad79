"""The application: its routes, and what they ask of the worker.

    app = build_app(home, runtime, ServeConfig())

A handler turns a request into prompts and parameters, hands them to the worker, and turns events
into an answer. It ends the rows of a client that goes away.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import Response
from fastapi.staticfiles import StaticFiles
from sse_starlette import EventSourceResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from archerchat.errors import UsageError
from archerchat.home import Home
from archerchat.inference import sequence
from archerchat.inference.chat import ChatSession, ContextFull
from archerchat.inference.prefill import iter_batches, score_prompts
from archerchat.inference.sequence import TokenLogprobs
from archerchat.runtime import Runtime
from archerchat.serving import info, v1_responses
from archerchat.serving import requests as asked
from archerchat.serving.config import LOOPBACK, ServeConfig
from archerchat.serving.grammar import build_mask
from archerchat.serving.guard import AsciiJSON, Guard, error_body, install_handlers
from archerchat.serving.info import Server, Shared
from archerchat.serving.models import Models, ServedModel
from archerchat.serving.responses import Answer, ChatChoice, Choice, TextChoice
from archerchat.serving.v1_responses import ResponsesRequest
from archerchat.serving.worker import GenerationFailed, Stream, Worker

PAGE = Path(__file__).parent / "page"
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
PING_SECONDS = 15
SEND_SECONDS = 60.0
"""How long a client may leave a chunk unread."""
T = TypeVar("T")
router = APIRouter()


def build_app(home: Home, runtime: Runtime, config: ServeConfig) -> FastAPI:
    """Return the application; its worker starts and ends with it.

    Raises as `Models` does.
    """
    worker = Worker(config.max_batch + config.max_queue)
    models = Models(home, runtime, worker, config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    app = FastAPI(title="ArcherChat", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.server = Server(worker, models)
    install_handlers(app)
    app.include_router(router)
    app.include_router(info.router)
    app.mount("/page", _PageFiles(directory=PAGE), name="page")
    protect(app, config)
    return app


def protect(app: FastAPI, config: ServeConfig) -> None:
    """Put what stands before every handler before those of `app`."""
    hosts = LOOPBACK if config.is_local and config.key is None else None
    app.add_middleware(Guard, api_key=config.key, hosts=hosts)
    if config.cors_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origin),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )


class _PageFiles(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(PAGE_HEADERS)
        return response


@router.get("/", include_in_schema=False)
async def show_page() -> Response:
    content = (PAGE / "index.html").read_bytes()
    return Response(content, media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)


async def _start_chat(
    body: asked.ChatRequest, server: Server
) -> tuple[Stream, list[ChatChoice], Answer, dict[str, str]]:
    """Start an answer to a conversation; return also its choices and headers."""
    model = await server.models.get(body.model)
    session = ChatSession(model.engine, model.tokenizer, body.params())
    message, said = session.resume(asked.read_conversation(body.messages))
    try:
        request = session.build_request(message, said, forget=body.truncation == "auto")
    except ContextFull as error:
        problem = f"do not fit: {error}"
        raise asked.BadRequest("messages", problem, "context_length_exceeded") from error
    schema = body.response_format.schema_content if body.response_format else None
    if schema is not None:
        try:
            mask = await asyncio.to_thread(lambda: build_mask(model.vocabulary, schema))
        except UsageError as error:
            raise asked.BadRequest("response_format", f"cannot be kept to: {error}") from error
        request = replace(request, mask=mask, hook=None)
    stream = server.worker.submit(model.engine, [request])
    samples = range(session.params.num_samples)
    choices = [ChatChoice(model.tokenizer, index, request) for index in samples]
    dropped = 2 * session.forgotten
    answer = Answer("chat.completion", model.card.name, [request], dropped)
    headers = {"archerchat-dropped-messages": str(dropped)} if dropped else {}
    return stream, choices, answer, headers


@router.post("/v1/chat/completions")
async def chat(body: asked.ChatRequest, request: Request, server: Shared) -> Response:
    """Answer a conversation."""
    stream, choices, answer, headers = await _start_chat(body, server)
    if body.stream:
        return _Events(stream, _chunks(stream, choices, answer, body.wants_usage), headers)
    return await _finish(request, stream, choices, lambda: answer.whole(choices, stream), headers)


@router.post("/v1/responses")
async def respond(body: ResponsesRequest, request: Request, server: Shared) -> Response:
    """Answer a conversation in the form of OpenAI's responses."""
    try:
        stream, choices, answer, headers = await _start_chat(body.to_chat(), server)
    except asked.BadRequest as error:
        names = {"messages": "input", "response_format.json_schema": "text.format",
                 "response_format": "text.format"}  # fmt: skip
        param = re.sub("|".join(names), lambda found: names[found[0]], error.param)
        raise asked.BadRequest(param, error.problem, error.code) from error
    found = v1_responses.Response(choices[0], answer, server.models.find(body.model).name)
    if body.stream:
        return _Events(stream, _typed(found, stream), headers)
    return await _finish(request, stream, choices, lambda: found.whole(stream), headers)


async def _typed(found: v1_responses.Response, stream: Stream) -> AsyncIterator[bytes]:
    number = 0
    async for event in found.events(stream):
        yield f"event: {event['type']}\n".encode() + _data({**event, "sequence_number": number})
        number += 1


@router.post("/chat/completions")
async def chat_streaming(body: asked.ChatRequest, request: Request, server: Shared) -> Response:
    """Answer a conversation, as a stream unless the request says otherwise."""
    stream = body.stream is not False
    return await chat(body.model_copy(update={"stream": stream}), request, server)


@router.post("/v1/completions")
async def complete(body: asked.CompletionRequest, request: Request, server: Shared) -> Response:
    """Continue texts or token ids as they are: what base models do."""
    model = await server.models.get(body.model)
    tokenizer, params = model.tokenizer, body.params(model.tokenizer)
    asks = [
        sequence.Request(prompt, params, decode=tokenizer.decode)
        for prompt in body.prompts(tokenizer)
    ]
    for ask in asks:
        model.engine.check(ask)
    scores: list[Sequence[TokenLogprobs | None]] = [[None] * len(ask.prompt) for ask in asks]
    if body.echo and body.logprobs is not None:
        scores = await _score(server, model, [ask.prompt for ask in asks], body.logprobs)
    # The BOS before a text is the server's own, so clients that count tokens do not see it.
    echoes = [
        list(zip(ask.prompt, scored, strict=True))[body.is_text :] if body.echo else []
        for ask, scored in zip(asks, scores, strict=True)
    ]
    choices = [
        TextChoice(tokenizer, index, asks[number], echoes[number])
        for index in range(len(asks) * params.num_samples)
        for number in [index // params.num_samples]
    ]
    answer = Answer("text_completion", model.card.name, asks)
    if body.max_tokens == 0:  # only the prompt was asked about
        for choice in choices:
            choice.finish = "length"
        return AsciiJSON(answer.whole(choices, None))
    stream = server.worker.submit(model.engine, asks)
    if body.stream:
        return _Events(stream, _chunks(stream, choices, answer, body.wants_usage), {})
    return await _finish(request, stream, choices, lambda: answer.whole(choices, stream))


async def _score(
    server: Server, model: ServedModel, prompts: Sequence[Sequence[int]], top: int
) -> list[Sequence[TokenLogprobs | None]]:
    """Score prompts a batch at a time, so that others' tokens come in between."""
    found: dict[int, Sequence[TokenLogprobs | None]] = {}
    for batch in iter_batches([len(prompt) for prompt in prompts]):
        rows = [prompts[i] for i in batch]
        scores = await server.worker.call(partial(score_prompts, model.engine.model, rows, top))
        found |= dict(zip(batch, scores, strict=True))
    return [found[i] for i in range(len(prompts))]


async def _chunks(
    stream: Stream, choices: Sequence[Choice], answer: Answer, wants_usage: bool
) -> AsyncIterator[bytes]:
    """Yield the events of a stream, one for each token of each choice."""
    for choice in choices:
        if (first := choice.whole()).get("text"):  # the prompt's echo
            yield _data(answer.chunk([first]))
    try:
        async for events in stream:
            more = {} if stream.open_samples else {"timings": stream.timings()}
            shown = [choices[stream.choice(event)].read(event) for event in events]
            for chunk in shown[:-1]:
                yield _data(answer.chunk([chunk]))
            yield _data(answer.chunk(shown[-1:], **more))
    except GenerationFailed as error:
        yield _data(error_body(500, str(error)))
        return
    if wants_usage:
        yield _data(answer.chunk([], **answer.totals(stream)))
    yield b"data: [DONE]\n\n"


def _data(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


class _Events(EventSourceResponse):
    """A stream of chunks; whatever ends it frees its rows."""

    def __init__(
        self, stream: Stream, chunks: AsyncIterator[bytes], headers: dict[str, str]
    ) -> None:
        super().__init__(chunks, headers=headers, ping=PING_SECONDS, send_timeout=SEND_SECONDS)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.close()


async def _finish(
    request: Request,
    stream: Stream,
    choices: Sequence[Choice],
    show: Callable[[], dict[str, Any]],
    headers: dict[str, str] | None = None,
) -> Response:
    """Return what `show` shows of the answer at its end."""

    async def read() -> Response:
        async for events in stream:
            for event in events:
                choices[stream.choice(event)].read(event)
        return AsciiJSON(show(), headers=headers)

    try:
        return await until_gone(request.receive, read()) or Response(status_code=499)
    finally:
        stream.close()


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Return what the work returns, or end it and return None when the client goes away."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
