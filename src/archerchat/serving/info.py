"""What a server says of its models, of tokens and of itself; and what all handlers share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar, cast

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from archerchat.inference.chat import ChatSession
from archerchat.serving import requests as asked
from archerchat.serving.guard import AsciiJSON
from archerchat.serving.models import Models
from archerchat.serving.worker import Worker

LONG_BYTES = 2**16
"""Size of a request whose text takes milliseconds to tokenize."""
T = TypeVar("T")
router = APIRouter()


@dataclass
class Server:
    """What handlers share."""

    worker: Worker
    models: Models
    started: float = field(default_factory=time.monotonic)


async def _server(request: Request) -> Server:  # a plain function would run in another thread
    return cast(Server, request.app.state.server)


Shared = Annotated[Server, Depends(_server)]


async def aside(request: Request, work: Callable[[], T]) -> T:
    """Return what `work` makes of a request; in a thread where that may take long."""
    is_long = len(await request.body()) > LONG_BYTES
    return await asyncio.to_thread(work) if is_long else work()


@router.get("/v1/models")
async def list_models(server: Shared) -> Response:
    """List the models on offer; the first answers requests that name none."""
    models = server.models
    data = [{**card, "loaded": name in models.loaded} for name, card in models.cards.items()]
    return AsciiJSON({"object": "list", "data": data})


@router.get("/v1/models/{name}")
async def show_model(name: str, server: Shared) -> Response:
    """Describe a model."""
    return AsciiJSON(server.models.find(name))


@router.post("/tokenize")
async def tokenize(body: asked.TokenizeRequest, request: Request, server: Shared) -> Response:
    """Return the token ids of a text, and the text of each."""
    tokenizer = (await server.models.get(body.model)).tokenizer
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
async def detokenize(body: asked.DetokenizeRequest, server: Shared) -> Response:
    """Return the text of token ids."""
    tokenizer = (await server.models.get(body.model)).tokenizer
    asked.check_ids("tokens", body.tokens, tokenizer)
    text = tokenizer.decode(body.tokens)
    return AsciiJSON({"content": text, "prompt": text})


@router.post("/apply-template")
async def apply_template(body: asked.ConversationRequest, server: Shared) -> Response:
    """Return a conversation as the model reads it."""
    model = await server.models.get(body.model)
    session = ChatSession(model.engine, model.tokenizer)
    ids = session.render(*session.resume(body.conversation()))
    return AsciiJSON({"prompt": model.tokenizer.decode(ids), "tokens": ids})


@router.get("/health")
async def health() -> Response:
    """Say that the server answers."""
    return AsciiJSON({"status": "ok"})


@router.get("/stats")
@router.get("/metrics")
async def stats(request: Request, server: Shared) -> Response:
    """Return what is loaded, what is at work, and counts since the start.

    /metrics has the numbers in the form that Prometheus reads.
    """
    loaded = dict(server.models.loaded)  # the worker may change it
    found = {
        "uptime_seconds": round(time.monotonic() - server.started, 3),
        "rows": sum(each.engine.num_running for each in loaded.values()),
        "waiting": sum(each.engine.num_waiting for each in loaded.values()),
        "samples_in_work": server.worker.samples,
        **server.worker.counts,
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
