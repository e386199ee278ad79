"""The application: its routes, and what they ask of the worker.

A handler turns a request into prompts and parameters, hands them to the worker, and returns the
answer that will be built from its events.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.types import Scope

from archerchat.home import Home
from archerchat.inference.chat import ChatSession, ContextFull
from archerchat.inference.model_runner import iter_batches, score_prompts
from archerchat.inference.sequence import Event, TokenLogprobs
from archerchat.inference.sequence import Request as Ask
from archerchat.runtime import Runtime
from archerchat.serving import requests as asked
from archerchat.serving.answers import Answer, ChatAnswer, ResponsesAnswer
from archerchat.serving.config import ServeConfig
from archerchat.serving.guard import APIError, AsciiJSON, build_guarded
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
    if (form := body.format) is not None and form.type != "text":
        ask = await asyncio.to_thread(body.constrain, ask, form, model.tokenizer)
    stream = Stream(models.worker, model.engine, [ask])
    models.worker.submit(stream)
    if body.stream is None:
        body.stream = request.url.path == "/chat/completions"
    shape = ResponsesAnswer if isinstance(body, asked.ResponsesRequest) else ChatAnswer
    return shape(model, stream, body, 2 * session.forgotten)


@router.post("/v1/completions")
async def complete(body: asked.CompletionRequest, request: Request, models: Shared) -> Response:
    """Continue texts or token ids as they are: what base models do."""
    model = await models.get(body.model)
    tokenizer, params = model.tokenizer, body.params(model.tokenizer)
    prompts = await aside(request, lambda: body.prompts(tokenizer))
    asks = [Ask(prompt, params, decode=tokenizer.decode) for prompt in prompts]
    stream = Stream(models.worker, model.engine, asks)
    models.worker.check(stream)
    echoes = await _echo(models, model, prompts, body) if body.echo else [[] for _ in prompts]
    if body.max_tokens == 0:  # only the prompt was asked about
        for echo in echoes:
            echo.append(Event(0, 0, None, finish_reason="max_tokens"))
    else:
        models.worker.submit(stream)
    stream.begin(echoes)
    return Answer(model, stream, body)


async def aside(request: Request, work: Callable[[], list[Any]]) -> list[Any]:
    """Return what `work` makes of a request; in a thread where that may take long."""
    is_long = len(await request.body()) > LONG_BYTES
    return await asyncio.to_thread(work) if is_long else work()


async def _echo(
    models: Models, model: ServedModel, prompts: Sequence[list[int]], body: asked.CompletionRequest
) -> list[list[Event]]:
    """Return prompts as if the model had said them, scored a batch at a time between its steps."""
    scores: dict[int, Sequence[TokenLogprobs | None]] = {}
    for batch in iter_batches([len(prompt) for prompt in prompts]):
        if body.logprobs is not None:
            rows = [prompts[i] for i in batch]
            score = partial(score_prompts, model.engine.model, rows, body.logprobs)
            scores |= zip(batch, await models.worker.call(score), strict=True)
    first = int(body.is_text)  # the BOS before a text is the server's own: clients do not see it
    echoes = []
    for i, prompt in enumerate(prompts):
        found = zip(prompt, scores.get(i, [None] * len(prompt)), strict=True)
        echo = [Event(0, 0, token, logprobs=scored) for token, scored in found][first:]
        echoes.append([Event(0, 0, None, text=model.tokenizer.decode(prompt[first:])), *echo])
    return echoes


@router.get("/v1/models")
async def list_models(models: Shared) -> Response:
    """List the models on offer; the first answers requests that name none."""
    await models.refresh()
    data = [{**card, "loaded": name in models.loaded} for name, card in models.cards.items()]
    return AsciiJSON({"object": "list", "data": data})


@router.get("/v1/models/{name}")
async def show_model(name: str, models: Shared) -> Response:
    """Describe a model."""
    return AsciiJSON(await models.find(name))


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
    last = tokenizer.vocab_size - 1
    if not all(0 <= token <= last for token in body.tokens):
        raise APIError(f"tokens has a token id outside 0 to {last}", "tokens")
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
