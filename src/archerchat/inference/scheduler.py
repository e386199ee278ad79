"""Choose which waiting requests get a place next, and which prompts share a prefix.

A request's prompt runs once, however many samples it has. Prompts that begin alike (few-shot
examples, a system message) form a group, whose beginning runs once. Groups are served one after
another, in the order of their oldest prompt, so no more than one shared prefix is kept at a time.

A server's prompts continue those of minutes before. With `kept_tokens`, prompts that have run are
kept, and a later prompt that begins with one of them runs only the rest.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from operator import eq

from archerchat.inference.kv_cache import Prefix
from archerchat.inference.model_runner import Prefill, iter_batches
from archerchat.inference.sequence import Request
from archerchat.model.transformer import Transformer

MIN_SHARED = 16
"""Fewest tokens worth sharing: running a prefix by itself costs a pass."""


@dataclass(eq=False)
class WaitingRequest:
    """A request with samples left to start."""

    number: int
    request: Request
    started: int = 0
    """Samples that have, or had, a place."""
    prefix: Prefix | None = None
    """What has run of its prompt: all of it once a sample has started; before, nothing."""
    cached: int = 0
    """Tokens of its prompt that an earlier request has run."""


class Scheduler:
    """Keep the waiting requests, and run their prompts when their turn comes.

    Attributes:
        kept: prompts that later ones may continue, up to `kept_tokens` tokens in all; those used
            longest ago come first, and go first.
        prefilled_tokens: prompt tokens run so far: each shared prefix once, padding not counted.
    """

    def __init__(self, model: Transformer, kept_tokens: int = 0) -> None:
        self._model, self._kept_tokens = model, kept_tokens
        self._waiting: dict[int, WaitingRequest] = {}  # by number, the oldest first
        # Groups of the waiting requests; empty after a new one, which may change all of them.
        self._groups: deque[tuple[int, list[WaitingRequest]]] = deque()
        # The group whose turn it is: who waits, how many tokens they share, and those once run.
        self._group: deque[WaitingRequest] = deque()
        self._shared = 0
        self._prefix: Prefix | None = None
        self.kept: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()
        self.prefilled_tokens = 0

    def __len__(self) -> int:
        return len(self._group) + len(self._waiting)

    def add(self, number: int, request: Request) -> None:
        self._waiting[number] = WaitingRequest(number, request)
        self._groups.clear()

    def remove(self, number: int) -> WaitingRequest | None:
        """Take a request out and return it; None if it does not wait."""
        for waiting in self._group:
            if waiting.number == number:
                self._group.remove(waiting)
                return waiting
        return self._waiting.pop(number, None)

    def clear(self) -> None:
        for requests in (self._waiting, self._groups, self._group):
            requests.clear()
        self._prefix = None

    def schedule(self, places: int) -> list[tuple[WaitingRequest, int]]:
        """Start up to `places` samples; return each one's request, its prompt run, and number."""
        started: list[tuple[WaitingRequest, int]] = []
        while len(started) < places and self:
            if not self._group:
                self._open_group()
                continue
            waiting = self._group[0]
            if not waiting.started:
                self._find_prefix(waiting)
            started.append((waiting, waiting.started))
            waiting.started += 1
            if waiting.started == waiting.request.params.num_samples:
                self._group.popleft()
        if not self._group:
            self._prefix = None
        self._run(dict.fromkeys(waiting for waiting, _ in started))
        return started

    def _open_group(self) -> None:
        """Let it be the turn of the group with the oldest prompt."""
        if not self._groups:
            requests = list(self._waiting.values())
            # A prompt's own last token always runs: its logits are wanted.
            groups = group_by_prefix([list(waiting.request.prompt[:-1]) for waiting in requests])
            self._groups.extend((g.shared, [requests[i] for i in g.members]) for g in groups)
        self._shared, members = self._groups.popleft()
        self._prefix = None
        # Without those that were cancelled.
        self._group.extend(w for w in members if self._waiting.pop(w.number, None))

    def _find_prefix(self, waiting: WaitingRequest) -> None:
        """Set what has run of a prompt: the longest kept prompt that it begins with or equals, or
        what the group shares, run once."""
        ids = tuple(waiting.request.prompt)
        found = max((kept for kept in self.kept if ids[: len(kept)] == kept), key=len, default=())
        if found:
            self.kept.move_to_end(found)
        if found and len(found) >= self._shared:
            waiting.prefix, waiting.cached = self.kept[found], len(found)
        elif self._shared:
            if self._prefix is None:
                self._prefix = Prefill(self._model, [ids[: self._shared]]).prefix(0)
                self.prefilled_tokens += self._shared
            waiting.prefix = self._prefix

    def _run(self, requests: Iterable[WaitingRequest]) -> None:
        """Run what has not run of prompts, in batches with one prefix and similar lengths."""
        groups = defaultdict[int, list[WaitingRequest]](list)
        for waiting in requests:
            if waiting.prefix is None or waiting.prefix.length < len(waiting.request.prompt):
                groups[id(waiting.prefix)].append(waiting)
        for members in groups.values():
            prefix = members[0].prefix
            start = prefix.length if prefix else 0
            rows = [waiting.request.prompt[start:] for waiting in members]
            for batch in iter_batches([len(row) for row in rows]):
                ran = Prefill(self._model, [rows[i] for i in batch], prefix)
                self.prefilled_tokens += sum(ran.lengths)
                for place, i in enumerate(batch):
                    members[i].prefix = prompt = ran.prefix(place)
                    self._keep(tuple(members[i].request.prompt), prompt)

    def _keep(self, ids: tuple[int, ...], ran: Prefix) -> None:
        if MIN_SHARED <= len(ids) <= self._kept_tokens and ids not in self.kept:
            self.kept[ids] = ran.clone()
            while sum(map(len, self.kept)) > self._kept_tokens:
                self.kept.popitem(last=False)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return with how many equal tokens two prompts begin."""
    return len(list(takewhile(bool, map(eq, a, b))))


@dataclass(frozen=True)
class PrefixGroup:
    """Prompts, by their indices, whose first `shared` tokens are the same; 0 if that is too few."""

    shared: int
    members: list[int]

    @property
    def saved(self) -> int:
        """Tokens that need not run."""
        return self.shared * (len(self.members) - 1)


def group_by_prefix(prompts: Sequence[list[int]]) -> list[PrefixGroup]:
    """Group one prompt or more so that running each group's beginning once saves tokens.

    Sorted, prompts that begin alike are neighbours. From those that share most to those that share
    least, groups become one where that saves more than they save by themselves. The groups are in
    the order of their first member; every prompt is in one.
    """
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    common = [common_length(prompts[i], prompts[j]) for i, j in pairwise(order)]
    # Groups to the left that share their first tokens, and how many, with the next prompt.
    opened: list[tuple[int, list[PrefixGroup]]] = [(0, [])]
    for index, following in zip(order, [*common, 0], strict=True):
        groups = [PrefixGroup(0, [index])]
        following = following if following >= MIN_SHARED else 0
        while opened[-1][0] > following:
            shared, left = opened.pop()
            groups = _join([*left, *groups], shared)
        if opened[-1][0] < following:
            opened.append((following, []))
        opened[-1][1].extend(groups)
    found = [PrefixGroup(group.shared, sorted(group.members)) for group in opened[0][1]]
    return sorted(found, key=lambda group: group.members[0])


def _join(groups: list[PrefixGroup], shared: int) -> list[PrefixGroup]:
    """Make one group of those that have `shared` tokens in common, if that saves more.

    A group that saves more by itself stays as it is.
    """
    apart = [group for group in groups if shared * len(group.members) <= group.saved]
    joining = [group for group in groups if shared * len(group.members) > group.saved]
    joined = PrefixGroup(shared, [i for group in joining for i in group.members])
    return [*apart, joined] if joined.saved > sum(g.saved for g in joining) else groups
