"""Which waiting requests get a place next, and which prompts share a prefix.

A request's prompt runs once, however many samples it has. Prompts that begin alike (few-shot
examples, a system message) form a group, and their beginning runs once for the whole group. Groups
are served one after another, in the order of their oldest prompt, so no more than one shared
prefix is kept at a time.

A server's prompts continue those of minutes before. With `kept_tokens`, prompts that have run are
kept, and a later prompt that begins with one of them runs only the rest.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import Tensor

from archerchat.inference.kv_cache import Prefix
from archerchat.inference.prefill import iter_batches, prefill
from archerchat.inference.sequence import Request
from archerchat.model.transformer import Transformer

MIN_SHARED = 16
"""Fewest tokens worth sharing: running a prefix by itself costs a pass."""


@dataclass(frozen=True)
class PrefilledPrompt:
    """A prompt that has run."""

    prefix: Prefix
    """What a row needs of it."""
    logits: Tensor
    """The logits (vocab_size,) that follow it."""


@dataclass
class _SharedPrefix:
    """A prefix that waiting requests have in common; they keep it until their prompts have run."""

    token_ids: list[int]
    prefix: Prefix | None = None
    """Run with the first of them."""


@dataclass
class WaitingRequest:
    """A request with samples left to start."""

    number: int
    request: Request
    started: int = 0
    """Samples that have, or had, a place."""
    prompt: PrefilledPrompt | None = None
    """Set from the start of the first sample to the start of the last."""
    shared: _SharedPrefix | None = None
    cached: int = 0
    """Tokens of its prompt that an earlier request has run."""


class KeptPrompts:
    """Prompts that have run, the most recently used ones up to `max_tokens` in all."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens, self._tokens = max_tokens, 0
        self._kept: OrderedDict[tuple[int, ...], PrefilledPrompt] = OrderedDict()

    def find(self, prompt: Sequence[int]) -> PrefilledPrompt | None:
        """Return the longest kept prompt that `prompt` equals or begins with."""
        ids = tuple(prompt) if self._kept else ()
        found = max((kept for kept in self._kept if ids[: len(kept)] == kept), key=len, default=())
        if not found:
            return None
        self._kept.move_to_end(found)
        return self._kept[found]

    def keep(self, prompt: Sequence[int], ran: PrefilledPrompt) -> None:
        """Copy a prompt out of the batch that it ran in; drop those used longest ago."""
        if not MIN_SHARED <= len(prompt) <= self._max_tokens or tuple(prompt) in self._kept:
            return
        keys, values = (
            tuple(x.clone() for x in kind) for kind in (ran.prefix.keys, ran.prefix.values)
        )
        prefix = replace(ran.prefix, keys=keys, values=values, previous=ran.prefix.previous.clone())
        self._kept[tuple(prompt)] = PrefilledPrompt(prefix, ran.logits.clone())
        self._tokens += len(prompt)
        while self._tokens > self._max_tokens:
            self._tokens -= len(self._kept.popitem(last=False)[0])

    def clear(self) -> None:
        self._kept.clear()
        self._tokens = 0


class Scheduler:
    """Keep the queue of waiting requests, ordered so that shared prefixes run once.

    Attributes:
        kept: prompts that later ones may continue, up to `kept_tokens` tokens.
        prefilled_tokens: prompt tokens run so far: each shared prefix once, padding not counted.
    """

    def __init__(self, model: Transformer, kept_tokens: int = 0) -> None:
        self._model = model
        self._queue: deque[WaitingRequest] = deque()
        self._grouped = True
        self.kept = KeptPrompts(kept_tokens)
        self.prefilled_tokens = 0

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, number: int, request: Request) -> None:
        self._queue.append(WaitingRequest(number, request))
        self._grouped = False

    def remove(self, number: int) -> WaitingRequest | None:
        """Take a request out of the queue and return it; None if it does not wait."""
        found = next((each for each in self._queue if each.number == number), None)
        if found is not None:
            self._queue.remove(found)
        return found

    def clear(self) -> None:
        self._queue.clear()

    def schedule(self, places: int) -> list[tuple[WaitingRequest, int, PrefilledPrompt]]:
        """Start up to `places` samples and run the prompts that they need.

        Return the request, the sample's number and the prompt of each.
        """
        if not self._grouped:
            self._group()
        self._run(self._to_run(places))
        started: list[tuple[WaitingRequest, int, PrefilledPrompt]] = []
        while len(started) < places and self._queue:
            waiting = self._queue[0]
            assert waiting.prompt is not None
            started.append((waiting, waiting.started, waiting.prompt))
            waiting.started += 1
            if waiting.started == waiting.request.params.num_samples:
                waiting.prompt = None
                self._queue.popleft()
        return started

    def _to_run(self, places: int) -> list[WaitingRequest]:
        """Return the requests whose samples get the next `places` and whose prompt has not run."""
        found: list[WaitingRequest] = []
        for waiting in self._queue:
            if places <= 0:
                break
            places -= waiting.request.params.num_samples - waiting.started
            if waiting.prompt is None:
                found.append(waiting)
        return found

    def _group(self) -> None:
        """Find shared prefixes and queue the members of a group one after another.

        A request that has started samples stays in front.
        """
        started = [waiting for waiting in self._queue if waiting.started]
        others = [waiting for waiting in self._queue if not waiting.started]
        self._queue = deque(started)
        found = [self.kept.find(waiting.request.prompt) for waiting in others]
        new = [i for i, ran in enumerate(found) if ran is None]
        groups = [
            PrefixGroup(group.shared, tuple(new[i] for i in group.members))
            for group in group_by_prefix([others[i].request.prompt for i in new])
        ]
        groups += [PrefixGroup(0, (i,)) for i, ran in enumerate(found) if ran is not None]
        for group in sorted(groups, key=lambda group: group.members[0]):
            members = [others[i] for i in group.members]
            shared, ran = None, found[group.members[0]]
            if ran is not None:
                if ran.prefix.length == len(members[0].request.prompt):
                    members[0].prompt = ran
                else:
                    shared = _SharedPrefix([], ran.prefix)
            elif group.shared:
                token_ids = list(members[0].request.prompt[: group.shared])
                old = members[0].shared  # may have run this very prefix already
                prefix = old.prefix if old is not None and old.token_ids == token_ids else None
                shared = _SharedPrefix(token_ids, prefix)
            for waiting in members:
                waiting.shared, waiting.cached = shared, ran.prefix.length if ran else 0
            self._queue.extend(members)
        self._grouped = True

    def _run(self, requests: Sequence[WaitingRequest]) -> None:
        """Run prompts, in batches with the same shared prefix and similar lengths."""
        groups: dict[int, list[WaitingRequest]] = {}
        for waiting in requests:
            groups.setdefault(id(waiting.shared), []).append(waiting)
        for members in groups.values():
            shared = members[0].shared
            prefix = None if shared is None else self._run_shared(shared)
            start = 0 if prefix is None else prefix.length
            rows = [list(waiting.request.prompt[start:]) for waiting in members]
            for batch in iter_batches([len(row) for row in rows]):
                ran = prefill(self._model, [rows[i] for i in batch], prefix)
                self.prefilled_tokens += sum(ran.lengths)
                logits = ran.last_logits()
                for place, i in enumerate(batch):
                    prompt = PrefilledPrompt(ran.prefix(place), logits[place])
                    members[i].prompt = prompt
                    self.kept.keep(members[i].request.prompt, prompt)
            for waiting in members:
                waiting.shared = None

    def _run_shared(self, shared: _SharedPrefix) -> Prefix:
        if shared.prefix is None:
            shared.prefix = prefill(self._model, [shared.token_ids]).prefix(0)
            self.prefilled_tokens += len(shared.token_ids)
        return shared.prefix


@dataclass(frozen=True)
class PrefixGroup:
    """Prompts whose first `shared` tokens are the same."""

    shared: int
    """0 for a prompt alone; less than the length of the shortest prompt."""
    members: tuple[int, ...]
    """Indices of prompts, ascending."""


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two prompts have in common at their beginnings."""
    different = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(different, min(len(a), len(b)))


def group_by_prefix(
    prompts: Sequence[Sequence[int]], min_shared: int = MIN_SHARED
) -> list[PrefixGroup]:
    """Group prompts so that shared beginnings save tokens.

    Sorted, prompts that begin alike are neighbours. From those that share most to those that share
    least, a whole takes the place of its parts where it saves more: (members - 1) * shared.

    The groups are in the order of their first member; every prompt is in one.
    """
    ordered = sorted(range(len(prompts)), key=lambda i: (list(prompts[i]), i))
    # A prompt always runs its own last token: its logits are needed.
    lengths = [
        min(common_length(a, b), len(a) - 1, len(b) - 1)
        for a, b in pairwise(prompts[i] for i in ordered)
    ]
    common = [length if length >= min_shared else 0 for length in lengths]
    # Groups of neighbours that share more with each other than with the next, by what they share.
    opened: list[tuple[int, int, list[PrefixGroup]]] = []
    for last, following in enumerate([*common, -1][: len(ordered)]):
        first, found = last, [PrefixGroup(0, (ordered[last],))]
        while opened and opened[-1][0] > following:
            shared, first, parts = opened.pop()
            found = [*parts, *found]
            if (last - first) * shared > sum((len(g.members) - 1) * g.shared for g in found):
                found = [PrefixGroup(shared, tuple(sorted(ordered[first : last + 1])))]
        if opened and opened[-1][0] == following:
            opened[-1][2].extend(found)
        else:
            opened.append((following, first, found))
    groups = [group for _, _, parts in opened for group in parts]
    return sorted(groups, key=lambda group: group.members[0])
