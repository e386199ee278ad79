"""The application: its routes, and what they ask of the worker.

A handler turns a request into prompts and parameters, hands them to the worker, and turns events
into an answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import FileResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from archerchat.errors import UsageError
from archerchat.home import Home
from archerchat.inference import sequence
from archerchat.inference.chat import ChatSession, ContextFull
from archerchat.inference.model_runner import iter_batches, score_prompts
from archerchat.inference.sequence import TokenLogprobs
from archerchat.runtime import Runtime
from archerchat.serving import requests as asked
from archerchat.serving.answers import Answer, ChatChoice, ResponsesAnswer, TextChoice
from archerchat.serving.config import ServeConfig
from archerchat.serving.errors import APIError, AsciiJSON, to_json
from archerchat.serving.grammar import build_mask
from archerchat.serving.guard import build_guarded
from archerchat.serving.models import Models, ServedModel
from archerchat.serving.worker import Stream

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
LONG_BYTES = 2**16
"""Size of a request whose text takes milliseconds to tokenize."""
router = APIRouter()


def build_app(home: Home, runtime: Runtime, config: ServeConfig) -> FastAPI:
    """Return the application; its worker starts and ends with it. Raises as `Models` does."""
    models = Models(home, runtime, config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        models.worker.start()
        yield
        await asyncio.to_thread(models.worker.stop)

    app = build_guarded(config, lifespan=lifespan)
    app.state.models = models
    app.include_router(router)
    app.mount("/page", _PageFiles(directory=PAGE), name="page")
    return app


class _PageFiles(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(PAGE_HEADERS)
        return response


@router.get("/", include_in_schema=False)
async def show_page() -> Response:
    return FileResponse(PAGE / "index.html", headers=PAGE_HEADERS)


async def _models(request: Request) -> Models:  # a plain function would run in another thread
    models: Models = request.app.state.models
    return models


Shared = Annotated[Models, Depends(_models)]


@router.post("/v1/responses")
async def respond(body: asked.ResponsesRequest, request: Request, models: Shared) -> Response:
    """Answer a conversation in the form of OpenAI's responses."""
    return await chat(body, request, models)


@router.post("/v1/chat/completions")
@router.post("/chat/completions")
async def chat(body: asked.ChatRequest, request: Request, models: Shared) -> Response:
    """Answer a conversation; /chat/completions streams unless the request says otherwise."""
    model = await models.get(body.model)
    session = ChatSession(model.engine, model.tokenizer, body.params())
    message, said = session.resume(body.conversation())
    try:
        ask = session.build_request(message, said, forget=body.truncation == "auto")
    except ContextFull as error:
        name, code = body.MESSAGES, "context_length_exceeded"
        raise APIError(f"{name} do not fit: {error}", name, code) from error
    if (schema := body.answer_schema()) is not None:
        try:
            mask = await asyncio.to_thread(build_mask, model.tokenizer, schema)
        except UsageError as error:
            raise APIError(f"{body.FORMAT} cannot be kept to: {error}", body.FORMAT) from error
        ask = replace(ask, mask=mask, hook=None)
    stream, dropped = Stream(models.worker, model.engine, [ask]), 2 * session.forgotten
    models.worker.submit(stream)
    choices = [ChatChoice(model.tokenizer, i, ask.params) for i in range(ask.params.num_samples)]
    shape = ResponsesAnswer if isinstance(body, asked.ResponsesRequest) else Answer
    answer = shape("chat.completion", model.name, stream, choices, body.wants_usage, dropped)
    streams = request.url.path == "/chat/completions" if body.stream is None else body.stream
    return Reply(answer, streams)


@router.post("/v1/completions")
async def complete(body: asked.CompletionRequest, request: Request, models: Shared) -> Response:
    """Continue texts or token ids as they are: what base models do."""
    model = await models.get(body.model)
    tokenizer, params = model.tokenizer, body.params(model.tokenizer)
    prompts = await aside(request, lambda: body.prompts(tokenizer))
    asks = [sequence.Request(prompt, params, decode=tokenizer.decode) for prompt in prompts]
    stream = Stream(models.worker, model.engine, asks)
    models.worker.check(stream)
    echoes = await _echo(models, model, prompts, body) if body.echo else [[] for _ in asks]
    if body.max_tokens == 0:  # only the prompt was asked about
        end = sequence.Event(0, 0, None, finish_reason="max_tokens")
        echoes = [[*echo, end] for echo in echoes]
    else:
        models.worker.submit(stream)
    samples = enumerate(echo for echo in echoes for _ in range(params.num_samples))
    choices = [TextChoice(tokenizer, index, params, echo) for index, echo in samples]
    answer = Answer("text_completion", model.name, stream, choices, body.wants_usage)
    return Reply(answer, bool(body.stream))


async def aside(request: Request, work: Callable[[], list[Any]]) -> list[Any]:
    """Return what `work` makes of a request; in a thread where that may take long."""
    is_long = len(await request.body()) > LONG_BYTES
    return await asyncio.to_thread(work) if is_long else work()


async def _echo(
    models: Models, model: ServedModel, prompts: Sequence[list[int]], body: asked.CompletionRequest
) -> list[list[sequence.Event]]:
    """Return prompts as if the model had said them, scored a batch at a time between its steps."""
    echoes: list[list[sequence.Event]] = [[] for _ in prompts]
    first = int(body.is_text)  # the BOS before a text is the server's own: clients do not see it
    for batch in iter_batches([len(prompt) for prompt in prompts]):
        rows = [prompts[i] for i in batch]
        scores: Sequence[Sequence[TokenLogprobs | None]] = [[None] * len(row) for row in rows]
        if body.logprobs is not None:
            score = partial(score_prompts, model.engine.model, rows, body.logprobs)
            scores = await models.worker.call(score)
        for i, row, scored in zip(batch, rows, scores, strict=True):
            text = model.tokenizer.decode(row[first:])
            tokens = list(zip(row, scored, strict=True))[first:]
            echoes[i] = [sequence.Event(0, 0, None, text=text)]
            echoes[i] += [sequence.Event(0, 0, token, logprobs=found) for token, found in tokens]
    return echoes


class Reply(StreamingResponse):
    """An answer, as it comes or at its end. Whatever ends the response frees its rows."""

    def __init__(self, answer: Answer, streams: bool) -> None:
        self._answer, self._stream, self._streams = answer, answer.stream, streams
        dropped = str(answer.dropped)
        self._more = {"archerchat-dropped-messages": dropped} if answer.dropped else {}
        headers = {"cache-control": "no-store", **self._more}
        super().__init__(_show(answer), headers=headers, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # From 2.4 on, Starlette notices that the client left only when a send fails.
        scope = {**scope, "asgi": {"version": "3.0", "spec_version": "2.3"}}
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.worker.close(self._stream)

    async def stream_response(self, send: Send) -> None:
        if self._streams:
            return await super().stream_response(send)
        while self._stream.open_samples:
            self._answer.read(await self._stream.next())
        whole = AsciiJSON(self._answer.whole(), headers=self._more)
        start = {"type": "http.response.start", "status": 200, "headers": whole.raw_headers}
        await send(start)
        await send({"type": "http.response.body", "body": whole.body})


async def _show(answer: Answer) -> AsyncIterator[bytes]:
    """Yield what a stream shows, in one piece what came at one time."""
    shown = answer.begin()
    try:
        while answer.stream.open_samples:
            if shown:
                yield b"".join(map(_frame, shown))
            shown = answer.read(await answer.stream.next(PING_SECONDS)) or [PING]
        shown += answer.end()
    except APIError as error:
        shown = answer.fail(error)
    yield b"".join(map(_frame, shown))


def _frame(shown: Any) -> bytes:
    if isinstance(shown, bytes):
        return shown
    name = f"event: {shown['type']}\n" if "type" in shown else ""
    return f"{name}data: {to_json(shown)}\n\n".encode()


@router.get("/v1/models")
async def list_models(models: Shared) -> Response:
    """List the models on offer; the first answers requests that name none."""
    data = [{**card, "loaded": name in models.loaded} for name, card in models.cards.items()]
    return AsciiJSON({"object": "list", "data": data})


@router.get("/v1/models/{name}")
async def show_model(name: str, models: Shared) -> Response:
    """Describe a model."""
    return AsciiJSON(models.find(name))


@router.post("/tokenize")
async def tokenize(body: asked.TokenizeRequest, request: Request, models: Shared) -> Response:
    """Return the token ids of a text, and the text of each."""
    tokenizer = (await models.get(body.model)).tokenizer
    text = body.content if body.prompt is None else body.prompt
    ids = await aside(request, lambda: tokenizer.encode(text))
    ids = [tokenizer.bos_id, *ids] if body.add_special else ids
    pieces = [tokenizer.token(i).decode(errors="replace") for i in ids]
    return AsciiJSON({"tokens": ids, "pieces": pieces, "count": len(ids)})


@router.get("/tokenizer_info")
async def tokenizer_info() -> Response:
    """Return what lm-evaluation-harness asks before it sends texts to /tokenize."""
    return AsciiJSON({"eos_token": "<|bos|>", "bos_token": None, "pad_token": None})


@router.post("/detokenize")
async def detokenize(body: asked.DetokenizeRequest, models: Shared) -> Response:
    """Return the text of token ids."""
    tokenizer = (await models.get(body.model)).tokenizer
    asked.check_ids("tokens", body.tokens, tokenizer)
    text = tokenizer.decode(body.tokens)
    return AsciiJSON({"content": text, "prompt": text})


@router.post("/apply-template")
async def apply_template(body: asked.ConversationRequest, models: Shared) -> Response:
    """Return a conversation as the model reads it."""
    model = await models.get(body.model)
    session = ChatSession(model.engine, model.tokenizer)
    ids = session.render(*session.resume(body.conversation()))
    return AsciiJSON({"prompt": model.tokenizer.decode(ids), "tokens": ids})


@router.get("/health")
async def health() -> Response:
    """Say that the server answers."""
    return AsciiJSON({"status": "ok"})


@router.get("/stats")
@router.get("/metrics")
async def stats(request: Request, models: Shared) -> Response:
    """Return what is loaded, what is at work, and counts since the start.

    /metrics has the numbers in the form that Prometheus reads.
    """
    loaded = dict(models.loaded)  # the worker may change it
    found = {
        "uptime_seconds": round(time.monotonic() - models.worker.started, 3),
        "rows": sum(each.engine.num_running for each in loaded.values()),
        "waiting": sum(each.engine.num_waiting for each in loaded.values()),
        "samples_in_work": models.worker.samples,
        **models.worker.counts,
        "models": list(loaded),
    }
    return show_stats(request, found)


def show_stats(request: Request, found: dict[str, Any]) -> Response:
    """Return figures as the path of the request says."""
    if request.url.path == "/stats":
        return AsciiJSON(found)
    lines = []
    for name, value in found.items():
        if isinstance(value, int | float):
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# TYPE archerchat_{name} {kind}", f"archerchat_{name} {value}"]
    return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")
