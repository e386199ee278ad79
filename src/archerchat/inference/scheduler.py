"""Which waiting requests get a place next, and which prompts share a prefix.

A request's prompt runs once, however many samples it has. Prompts that begin alike (few-shot
examples, a system message) form a group, whose beginning runs once. Groups are served one after
another, in the order of their oldest prompt, so no more than one shared prefix is kept at a time.

A server's prompts continue those of minutes before. With `kept_tokens`, prompts that have run are
kept, and a later prompt that begins with one of them runs only the rest.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import eq

from archerchat.inference.kv_cache import Prefix
from archerchat.inference.prefill import iter_batches, prefill
from archerchat.inference.sequence import Request
from archerchat.model.transformer import Transformer

MIN_SHARED = 16
"""Fewest tokens worth sharing: running a prefix by itself costs a pass."""


@dataclass(eq=False)
class WaitingRequest:
    """A request with samples left to start."""

    number: int
    request: Request
    prefix: Prefix | None
    """What has run of its prompt: nothing, its beginning, or all of it."""
    cached: int
    """Tokens of its prompt that an earlier request has run."""
    started: int = 0
    """Samples that have, or had, a place."""


class KeptPrompts:
    """Prompts that have run, the most recently used ones up to `max_tokens` in all."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._kept: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()

    def find(self, prompt: Sequence[int]) -> Prefix | None:
        """Return the longest kept prompt that `prompt` equals or begins with."""
        ids = tuple(prompt)
        found = max((kept for kept in self._kept if ids[: len(kept)] == kept), key=len, default=())
        if not found:
            return None
        self._kept.move_to_end(found)
        return self._kept[found]

    def keep(self, prompt: Sequence[int], ran: Prefix) -> None:
        """Copy a prompt out of the batch that it ran in; drop those used longest ago."""
        ids = tuple(prompt)
        if not MIN_SHARED <= len(ids) <= self._max_tokens or ids in self._kept:
            return
        self._kept[ids] = ran.clone()
        while sum(map(len, self._kept)) > self._max_tokens:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        self._kept.clear()


class Scheduler:
    """Keep the waiting requests, and run their prompts when their turn comes.

    Attributes:
        kept: prompts that later ones may continue, up to `kept_tokens` tokens.
        prefilled_tokens: prompt tokens run so far: each shared prefix once, padding not counted.
    """

    def __init__(self, model: Transformer, kept_tokens: int = 0) -> None:
        self._model = model
        self._group: deque[WaitingRequest] = deque()  # requests whose turn it is
        # The others in order, by how they begin, or by number if a kept prompt begins them.
        self._groups: dict[int | tuple[int, ...], list[WaitingRequest]] = {}
        self.kept = KeptPrompts(kept_tokens)
        self.prefilled_tokens = 0

    def __len__(self) -> int:
        return len(self._group) + sum(map(len, self._groups.values()))

    def add(self, number: int, request: Request) -> None:
        found = self.kept.find(request.prompt)
        waiting = WaitingRequest(number, request, found, found.length if found else 0)
        key = number if found else tuple(request.prompt[:MIN_SHARED])
        self._groups.setdefault(key, []).append(waiting)

    def remove(self, number: int) -> WaitingRequest | None:
        """Take a request out and return it; None if it does not wait."""
        for group in (self._group, *self._groups.values()):
            for waiting in group:
                if waiting.number == number:
                    group.remove(waiting)
                    return waiting
        return None

    def clear(self) -> None:
        self._group.clear()
        self._groups.clear()

    def schedule(self, places: int) -> list[tuple[WaitingRequest, int]]:
        """Start up to `places` samples; return each one's request, its prompt run, and number."""
        started: list[tuple[WaitingRequest, int]] = []
        while len(started) < places and (self._group or self._groups):
            if not self._group:
                self._open_group()
                continue
            waiting = self._group[0]
            started.append((waiting, waiting.started))
            waiting.started += 1
            if waiting.started == waiting.request.params.num_samples:
                self._group.popleft()
        self._run(dict.fromkeys(waiting for waiting, _ in started))
        return started

    def _open_group(self) -> None:
        """Take the oldest prompts that begin alike, and run the beginning that is worth sharing."""
        key = next(iter(self._groups))
        members = self._groups.pop(key)
        if not members:  # all were cancelled
            return
        # A prompt's own last token always runs: its logits are wanted.
        bodies = [waiting.request.prompt[:-1] for waiting in members]
        prompt, shared = bodies[0], [common_length(bodies[0], body) for body in bodies]
        length = most_saving(shared[1:])
        group = [waiting for waiting, n in zip(members, shared, strict=True) if n >= length]
        rest = [waiting for waiting, n in zip(members, shared, strict=True) if n < length]
        if length:
            prefix = prefill(self._model, [prompt[:length]]).prefix(0)
            self.prefilled_tokens += length
            for waiting in group:
                waiting.prefix = prefix
        if rest:
            self._groups = {key: rest, **self._groups}
        self._group.extend(group)

    def _run(self, requests: Iterable[WaitingRequest]) -> None:
        """Run what has not run of prompts, in batches with one prefix and similar lengths."""
        groups: dict[int, list[WaitingRequest]] = {}
        for waiting in requests:
            if waiting.prefix is None or waiting.prefix.length < len(waiting.request.prompt):
                groups.setdefault(id(waiting.prefix), []).append(waiting)
        for members in groups.values():
            prefix = members[0].prefix
            start = prefix.length if prefix else 0
            rows = [waiting.request.prompt[start:] for waiting in members]
            for batch in iter_batches([len(row) for row in rows]):
                ran = prefill(self._model, [rows[i] for i in batch], prefix)
                self.prefilled_tokens += sum(ran.lengths)
                for place, i in enumerate(batch):
                    members[i].prefix = prompt = ran.prefix(place)
                    self.kept.keep(members[i].request.prompt, prompt)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return with how many equal tokens two prompts begin."""
    return len(list(takewhile(bool, map(eq, a, b))))


def most_saving(lengths: Sequence[int]) -> int:
    """Return how long a beginning to share with the prompts that have `lengths` in common with
    this one, 0 if none is worth it: those with at least that length share it."""
    ordered = sorted((n for n in lengths if n >= MIN_SHARED), reverse=True)
    saved = {length: others * length for others, length in enumerate(ordered, start=1)}
    return max(saved, key=saved.__getitem__, default=0)
