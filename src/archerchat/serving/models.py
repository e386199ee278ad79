"""The models that a server offers: found in the home, loaded on first use, few at a time."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from archerchat.checkpoint import (
    find_checkpoint,
    find_model,
    list_models,
    load_checkpoint,
    saved_at,
)
from archerchat.errors import ArcherChatError, UsageError
from archerchat.home import Home
from archerchat.inference.engine import Engine
from archerchat.inference.loading import load_model, read_bits_per_byte, read_model_config
from archerchat.model.flops import count_parameters
from archerchat.runtime import Runtime
from archerchat.serving.config import ServeConfig
from archerchat.serving.guard import APIError
from archerchat.serving.worker import Worker
from archerchat.tokenizer.bpe import Tokenizer

STAGES = ("rl", "sft", "base")
"""The order of preference for requests that name no model."""
KEPT_CONTEXTS = 4
"""How many contexts of tokens to keep of prompts, for the next turns of conversations."""
Card = dict[str, Any]
"""What `GET /v1/models` says of a model."""


@dataclass(eq=False)
class ServedModel:
    """A model in memory."""

    name: str
    tokenizer: Tokenizer
    engine: Engine
    last_used: float = field(default_factory=time.monotonic)


class Models:
    """Offer models, and keep the configured number of them in memory.

    Raises:
        UsageError: a name is malformed, there is no such model, or none at all.
        CheckpointError: one is damaged.
    """

    def __init__(self, home: Home, runtime: Runtime, config: ServeConfig) -> None:
        self._home, self._runtime, self._config = home, runtime, config
        self.worker = Worker(config.max_batch + config.max_queue)
        self.cards = {name: _read_card(home, name) for name in config.model or _find_names(home)}
        self.loaded: dict[str, ServedModel] = {}
        if not self.cards:
            raise UsageError(f"no models in {home.root}: train one (archerchat pretrain) first")

    async def refresh(self) -> None:
        """Look again at the home, unless the models to offer were named; loaded ones stay.

        New models come last, so that requests that name no model keep their default.
        """
        if not self._config.model:
            with suppress(ArcherChatError, OSError):  # a model was deleted at this moment
                self.cards = await asyncio.to_thread(self._read_cards)

    def _read_cards(self) -> dict[str, Card]:
        cards, names = dict[str, Card](), _find_names(self._home)
        for name in dict.fromkeys([*self.cards, *names]):
            if name in self.loaded and name in self.cards:
                cards[name] = self.cards[name]
            elif name in names:
                with suppress(ArcherChatError):  # it is damaged
                    cards[name] = _read_card(self._home, name)
        return cards

    async def find(self, name: str | None) -> Card:
        """Return the card of a name or a tag, or the first for None; look again if unknown."""
        if (card := self._look_up(name)) is None:
            await self.refresh()
            card = self._look_up(name)
        if card is None:
            message = f"there is no model {name!r}; there is {', '.join(self.cards)}"
            raise APIError(message, "model", "model_not_found", status=404)
        return card

    def _look_up(self, name: str | None) -> Card | None:
        cards = self.cards.values()
        return next((card for card in cards if name in (None, card["id"], card["tag"])), None)

    async def get(self, name: str | None) -> ServedModel:
        """Return a model, loaded if need be; APIError if there is none, or no room now."""
        card = await self.find(name)
        found = self.loaded.get(card["id"])
        if found is None:
            found = await self.worker.call(partial(self._load, card))
        found.last_used = time.monotonic()
        return found

    def _load(self, card: Card) -> ServedModel:
        """Load a model in the place of the one used longest ago; run by the worker's thread."""
        name, config = card["id"], self._config
        if name in self.loaded:  # by a request that came at the same time
            return self.loaded[name]
        if len(self.loaded) >= config.max_loaded:
            idle = [each for each in self.loaded.values() if not each.engine.busy]
            if not idle:
                message = "the models in memory are at work: try again in a moment"
                raise APIError(message, code="queue_full", status=429)
            del self.loaded[min(idle, key=lambda each: each.last_used).name]
        found = load_model(self._home, self._runtime, card["stage"], card["tag"], card["step"])
        kept = KEPT_CONTEXTS * card["context"]
        engine = Engine(found.model, max_batch=config.max_batch, kept_tokens=kept)
        self.loaded[name] = ServedModel(name, found.tokenizer, engine)
        return self.loaded[name]


def _find_names(home: Home) -> list[str]:
    """Return all models, those of the last stage first and of these the one saved last."""
    names = []
    for stage in STAGES:
        found = sorted(list_models(home, stage), key=lambda p: -saved_at(find_checkpoint(p)))
        names += [f"{path.name}:{stage}" for path in found]
    return names


def _read_card(home: Home, name: str) -> Card:
    tag, _, rest = name.partition(":")
    stage, _, step = rest.partition("@")
    if stage not in STAGES or (step and not step.isdecimal()) or not tag:
        raise UsageError(f"--model {name!r} is not TAG:STAGE or TAG:STAGE@STEP, such as d12:sft")
    path = find_checkpoint(find_model(home, stage, tag), int(step) if step else None)
    checkpoint = load_checkpoint(path, sections=())
    config = read_model_config(checkpoint)
    return {
        "id": name,
        "object": "model",
        "created": saved_at(path) // 10**9,
        "owned_by": "archerchat",
        "tag": tag,
        "stage": stage,
        "step": checkpoint.step,
        "depth": config.num_layers,
        "parameters": count_parameters(config).total,
        "context": config.sequence_length,
        "val_bpb": read_bits_per_byte(path),
    }
