"""The requests that wait for a place, and the prompts that run when they get one.

A request's prompt runs once, however many samples it has; prompts that begin alike share that
beginning (`scheduling.group_by_prefix`), also where places come free one at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from archerchat.inference.kv_cache import Prefix
from archerchat.inference.prefill import iter_batches, prefill
from archerchat.inference.requests import Request
from archerchat.inference.scheduling import group_by_prefix
from archerchat.model.transformer import Transformer

Prompt = tuple[Prefix, Tensor]
"""A prompt that ran: what a row needs of it, and the logits (vocab_size,) that follow."""


@dataclass
class _Group:
    """Waiting requests that share a prefix."""

    shared: list[int]
    waiting: int
    """Members that have not run."""
    prefix: Prefix | None = None
    """Run with its first member, dropped with its last."""


@dataclass
class Job:
    """A request that has samples to start."""

    number: int
    request: Request
    started: int = 0
    """Samples that have a place, or had one."""
    prompt: Prompt | None = None
    """Between its first sample's start and its last's."""
    group: _Group | None = None


class WaitingRequests:
    """A queue whose order follows shared prefixes."""

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._jobs: deque[Job] = deque()
        self._grouped = True
        self.prefilled_tokens = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def add(self, job: Job) -> None:
        """Queue a request."""
        self._jobs.append(job)
        self._grouped = False

    def remove(self, number: int) -> list[Job]:
        """Take a request back; return it unless it is not here."""
        found = [job for job in self._jobs if job.number == number]
        for job in found:
            self._jobs.remove(job)
            _leave_group(job)
        return found

    def clear(self) -> None:
        """Drop everything."""
        self._jobs.clear()

    def take(self, places: int) -> list[tuple[Job, int, Prompt]]:
        """Start so many samples at most: run the prompts that they need, and number them."""
        if not self._grouped:
            self._group()
        self._run(self._to_run(places))
        started: list[tuple[Job, int, Prompt]] = []
        while len(started) < places and self._jobs:
            job = self._jobs[0]
            assert job.prompt is not None
            started.append((job, job.started, job.prompt))
            job.started += 1
            if job.started == job.request.num_samples:
                job.prompt = None
                self._jobs.popleft()
        return started

    def _to_run(self, places: int) -> list[Job]:
        """Return the requests whose samples come into so many places and have not run."""
        jobs: list[Job] = []
        for job in self._jobs:
            if places <= 0:
                break
            places -= job.request.num_samples - job.started
            if job.prompt is None:
                jobs.append(job)
        return jobs

    def _group(self) -> None:
        """Find shared prefixes, and let each group's members follow each other.

        A request that has begun stays in front.
        """
        begun = [job for job in self._jobs if job.prompt is not None]
        jobs = [job for job in self._jobs if job.prompt is None]
        self._jobs = deque(begun)
        for found in group_by_prefix([job.request.prompt for job in jobs]):
            members = [jobs[i] for i in found.members]
            group = None
            if found.shared:
                shared = list(members[0].request.prompt[: found.shared])
                old = members[0].group  # may have run this very prefix already
                prefix = old.prefix if old is not None and old.shared == shared else None
                group = _Group(shared, len(members), prefix)
            for job in members:
                job.group = group
            self._jobs.extend(members)
        self._grouped = True

    def _run(self, jobs: Sequence[Job]) -> None:
        """Run prompts, in batches of those with the same shared prefix and similar lengths."""
        groups: dict[int, list[Job]] = {}
        for job in jobs:
            groups.setdefault(id(job.group), []).append(job)
        for members in groups.values():
            group = members[0].group
            shared = None if group is None else self._run_shared(group)
            start = 0 if shared is None else shared.length
            rows = [list(job.request.prompt[start:]) for job in members]
            for batch in iter_batches([len(row) for row in rows]):
                ran = prefill(self._model, [rows[i] for i in batch], shared)
                self.prefilled_tokens += sum(ran.lengths)
                logits = ran.last_logits()
                for place, i in enumerate(batch):
                    members[i].prompt = (ran.prefix(place), logits[place])
            for job in members:
                _leave_group(job)

    def _run_shared(self, group: _Group) -> Prefix:
        if group.prefix is None:
            group.prefix = prefill(self._model, [group.shared]).prefix(0)
            self.prefilled_tokens += len(group.shared)
        return group.prefix


def _leave_group(job: Job) -> None:
    if job.group is not None:
        job.group.waiting -= 1
        if job.group.waiting == 0:
            job.group.prefix = None
        job.group = None
