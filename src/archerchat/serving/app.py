"""The application: its routes, and what they ask of the worker.

    app = build_app(home, runtime, ServeConfig())

A handler turns a request into prompts and parameters, hands them to the worker, and turns events
into an answer. It ends the rows of a client that goes away.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import FileResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Message, Receive, Scope, Send

from archerchat.errors import UsageError
from archerchat.home import Home
from archerchat.inference import sequence
from archerchat.inference.chat import ChatSession, ContextFull
from archerchat.inference.prefill import iter_batches, score_prompts
from archerchat.inference.sequence import TokenLogprobs
from archerchat.runtime import Runtime
from archerchat.serving import info
from archerchat.serving import requests as asked
from archerchat.serving.answers import Answer, ChatChoice, ResponsesAnswer, TextChoice
from archerchat.serving.config import LOOPBACK, ServeConfig
from archerchat.serving.grammar import build_mask
from archerchat.serving.guard import AsciiJSON, Guard, install_handlers, to_json
from archerchat.serving.info import Server, Shared, aside
from archerchat.serving.models import Models, ServedModel
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
PING, PING_SECONDS = b": still at work\n\n", 15
"""What a silent stream sends to keep proxies awake, and how often."""
SEND_SECONDS = 60.0
"""How long a client may leave a chunk unread."""
T = TypeVar("T")
router = APIRouter()


def build_app(home: Home, runtime: Runtime, config: ServeConfig) -> FastAPI:
    """Return the application; its worker starts and ends with it. Raises as `Models` does."""
    worker = Worker(config.max_batch + config.max_queue)
    models = Models(home, runtime, worker, config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    app = build_guarded(config, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.server = Server(worker, models)
    app.include_router(router)
    app.include_router(info.router)
    app.mount("/page", _PageFiles(directory=PAGE), name="page")
    return app


def build_guarded(config: ServeConfig, **options: Any) -> FastAPI:
    """Return an application without routes, with what stands before all handlers."""
    app = FastAPI(title="ArcherChat", **options)
    install_handlers(app)
    hosts = LOOPBACK if config.is_local and config.key is None else None
    app.add_middleware(Guard, api_key=config.key, hosts=hosts)
    if config.cors_origin:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(config.cors_origin), allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )  # fmt: skip
    return app


class _PageFiles(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(PAGE_HEADERS)
        return response


@router.get("/", include_in_schema=False)
async def show_page() -> Response:
    return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)


@router.post("/v1/responses")
async def respond(body: asked.ResponsesRequest, request: Request, server: Shared) -> Response:
    """Answer a conversation in the form of OpenAI's responses."""
    return await chat(body, request, server)


@router.post("/v1/chat/completions")
@router.post("/chat/completions")
async def chat(body: asked.ChatRequest, request: Request, server: Shared) -> Response:
    """Answer a conversation; /chat/completions streams unless the request says otherwise."""
    model = await server.models.get(body.model)
    session = ChatSession(model.engine, model.tokenizer, body.params())
    message, said = session.resume(body.conversation())
    try:
        ask = session.build_request(message, said, forget=body.truncation == "auto")
    except ContextFull as error:
        problem = f"do not fit: {error}"
        raise asked.BadRequest(body.MESSAGES, problem, "context_length_exceeded") from error
    if (schema := body.answer_schema()) is not None:
        try:
            mask = await asyncio.to_thread(lambda: build_mask(model.vocabulary, schema))
        except UsageError as error:
            raise asked.BadRequest(body.FORMAT, f"cannot be kept to: {error}") from error
        ask = replace(ask, mask=mask, hook=None)
    stops, scored = ask.params.stop, ask.params.logprobs is not None
    samples = range(ask.params.num_samples)
    choices = [ChatChoice(model.tokenizer, index, stops, scored) for index in samples]
    stream, dropped = server.worker.submit(model.engine, [ask]), 2 * session.forgotten
    shape = ResponsesAnswer if isinstance(body, asked.ResponsesRequest) else Answer
    answer = shape("chat.completion", model.name, stream, choices, body.wants_usage, dropped)
    headers = {"archerchat-dropped-messages": str(dropped)} if dropped else None
    streams = request.url.path == "/chat/completions" if body.stream is None else body.stream
    return await _respond(request, answer, streams, headers)


@router.post("/v1/completions")
async def complete(body: asked.CompletionRequest, request: Request, server: Shared) -> Response:
    """Continue texts or token ids as they are: what base models do."""
    model = await server.models.get(body.model)
    tokenizer, params = model.tokenizer, body.params(model.tokenizer)
    prompts = await aside(request, lambda: body.prompts(tokenizer))
    server.worker.check(len(prompts) * params.num_samples)
    asks = [sequence.Request(prompt, params, decode=tokenizer.decode) for prompt in prompts]
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
        TextChoice(tokenizer, index, echoes[index // params.num_samples], body.logprobs is not None)
        for index in range(len(asks) * params.num_samples)
    ]
    if body.max_tokens == 0:  # only the prompt was asked about
        stream = Stream(server.worker, model.engine, asks)
        for choice in choices:
            choice.finish = "length"
    else:
        stream = server.worker.submit(model.engine, asks)
    answer = Answer("text_completion", model.name, stream, choices, body.wants_usage)
    return await _respond(request, answer, body.stream)


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


async def _respond(
    request: Request, answer: Answer, streams: bool | None, headers: dict[str, str] | None = None
) -> Response:
    """Return the answer, as it comes or at its end."""
    if streams:
        return EventStream(answer, headers)

    async def read() -> Response:
        while answer.stream.open_samples:
            answer.read(await answer.stream.next())
        return AsciiJSON(answer.whole(), headers=headers)

    try:
        return await until_gone(request.receive, read()) or Response(status_code=499)
    finally:
        answer.stream.close()


class EventStream(StreamingResponse):
    """An answer as server-sent events; whatever ends the response frees its rows."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, headers: dict[str, str] | None) -> None:
        super().__init__(_show(answer), headers={"cache-control": "no-store", **(headers or {})})
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, in_time(send))
        finally:
            self._answer.stream.close()


async def _show(answer: Answer) -> AsyncIterator[bytes]:
    """Yield what a stream shows, in one piece what came at one time."""
    shown = answer.begin()
    try:
        while answer.stream.open_samples:
            if shown:
                yield b"".join(map(_frame, shown))
            shown = answer.read(await answer.stream.next(PING_SECONDS)) or [PING]
        shown += answer.end()
    except GenerationFailed as error:
        shown = answer.fail(str(error))
    yield b"".join(map(_frame, shown))


def _frame(shown: Any) -> bytes:
    if isinstance(shown, bytes):
        return shown
    name = f"event: {shown['type']}\n" if "type" in shown else ""
    return f"{name}data: {to_json(shown)}\n\n".encode()


def in_time(send: Send) -> Send:
    """Return `send`, raising TimeoutError for a client that never reads."""

    async def send_in_time(message: Message) -> None:
        async with asyncio.timeout(SEND_SECONDS):  # wait_for may lose a cancellation
            await send(message)

    return send_in_time


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
