"""Serve many requests at once: continuous batching over one cache.

    engine = Engine(model)
    for event in engine.stream([Request(prompt=ids, max_new_tokens=64)]): ...
    completions = engine.generate(requests)    # a list of samples for each request

Rows in use are always the first ones of the cache. A row that ends gives its place to the last
row, and waiting requests fill the places at the end; what a row says depends on its own prompt,
rules and seed alone. A server that gets requests one by one uses `add`, `step` and `cancel`.

Computing and reading may overlap: with `overlap`, a step is launched before the tokens of the one
before it are read, so that a GPU never waits for the host. A token that a hook forces replaces
the drawn one before anything was computed from it, and a row whose stop token was seen one step
late has drawn one token for nothing, which is dropped: the answers are the same.

Greedy tokens equal those of the plain forward pass in float32, whatever the batch, up to ties
within rounding (1e-6 of a logit). In 16-bit dtypes the products of a batch of another size round
otherwise: each answer is as good, but not always the same token for token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from archerchat.inference.decode import Decoder
from archerchat.inference.draws import DrawPlan, DrawRules, row_seed
from archerchat.inference.requests import (
    Completion,
    Event,
    FinishReason,
    Request,
    RowHook,
    check_request,
)
from archerchat.inference.waiting import Job, WaitingRequests
from archerchat.inference.weights import InferenceModel
from archerchat.model.transformer import Transformer


@dataclass
class _Row:
    """A sample in the batch."""

    job: Job
    sample: int
    rules: DrawRules
    hook: RowHook | None
    last: int
    """Index of the last token that it may say."""
    reason: FinishReason
    """Why that is its last."""
    drawn: int = 1
    """Tokens that were drawn for it, read or not."""
    read: int = 0
    forced: dict[int, int] = field(default_factory=dict)
    """Tokens that replace drawn ones, by index."""
    done: bool = False

    @property
    def length(self) -> int:
        """Tokens that the cache keeps of it: all but the one drawn last."""
        return len(self.job.request.prompt) + self.drawn - 1


@dataclass
class _Unread:
    """Drawn tokens on their way to the host."""

    rows: list[_Row]
    tokens: Tensor
    arrived: torch.cuda.Event | None = None


class Engine:
    """Generate from one model.

    Args:
        model: its weights as they are now; `refresh_weights` takes later ones.
        max_batch: rows at a time.
        max_length: tokens of a row, prompt included; by default the model's sequence length.
        compile: compile single-row steps on CPUs in float32: faster, after some seconds.
        overlap: read tokens one step late; by default on CUDA.
    """

    def __init__(
        self,
        model: Transformer,
        max_batch: int = 64,
        max_length: int | None = None,
        compile: bool = False,
        overlap: bool | None = None,
    ) -> None:
        self._inference = InferenceModel(model)
        self.model = self._inference.model
        """The model, or a copy of it in the compute dtype."""
        self.max_batch = max_batch
        self.max_length = max_length or model.config.sequence_length
        self.overlap = model.device.type == "cuda" if overlap is None else overlap
        compile = compile and not self._inference.packed
        self._decoder = Decoder(self.model, max_batch, self.max_length, compile)
        self._waiting = WaitingRequests(self.model)
        self._rows: list[_Row] = []
        self._unread: deque[_Unread] = deque()
        self._events: list[Event] = []
        self.steps = 0
        """Decoding steps so far."""

    @property
    def prefilled_tokens(self) -> int:
        """Tokens of prompts that ran so far, each shared prefix once, padding not counted."""
        return self._waiting.prefilled_tokens

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._waiting or self._rows or self._unread or self._events)

    def check(self, request: Request) -> None:
        """Refuse a request that this engine cannot serve.

        Raises:
            UsageError: its prompt is too long or has unknown tokens.
        """
        check_request(request, self.model.config.vocab_size, self.max_length)

    def refresh_weights(self) -> None:
        """Take over the model's weights after a training step changed them."""
        assert not self._rows, "rows in work were begun with the old weights"
        self._inference.refresh()

    def add(self, number: int, request: Request) -> None:
        """Queue a request; its events carry `number`, which no other request in work may have.

        Raises:
            UsageError: its prompt is too long or has unknown tokens.
        """
        self.check(request)
        self._waiting.add(Job(number, request))

    def cancel(self, number: int) -> None:
        """End a request's rows; their last events say so. Unknown numbers are ignored."""
        for job in self._waiting.remove(number):
            for sample in range(job.started, job.request.num_samples):
                self._events.append(Event(number, sample, None, finish_reason="cancelled"))
        for row in self._rows:
            if row.job.number == number and not row.done:
                row.done = True
                self._events.append(Event(number, row.sample, None, finish_reason="cancelled"))

    def reset(self) -> None:
        """Drop every request; what was in work says nothing more."""
        self._waiting.clear()
        self._rows.clear()
        self._unread.clear()
        self._events.clear()

    def stream(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Yield what happens to the requests' rows as it happens.

        Requests are numbered as they are listed. An iterator that is given up drops them.

        Raises:
            UsageError: a request cannot be served; nothing has run then.
        """
        assert not self.busy, "the engine has other requests in work"
        for request in requests:
            self.check(request)
        return self._stream(requests)

    def _stream(self, requests: Sequence[Request]) -> Iterator[Event]:
        try:
            for number, request in enumerate(requests):
                self.add(number, request)
            while self.busy:
                yield from self.step()
        finally:
            self.reset()

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Return each request's completions, one for each of its samples.

        Raises:
            UsageError: a request cannot be served; nothing has run then.
        """
        completions = [[Completion() for _ in range(r.num_samples)] for r in requests]
        for event in self.stream(requests):
            completions[event.request][event.sample].add(event)
        return completions

    def step(self) -> list[Event]:
        """Let waiting requests in, move every row on by a token, return what happened."""
        self._compact()
        self._admit()
        if not self.overlap:
            self._read_all(but=0)  # first tokens: some rows end with theirs
        self._compact()
        if self._rows:
            self._force()
            self._launch()
        self._read_all(but=1 if self.overlap and self._rows else 0)
        events, self._events = self._events, []
        return events

    def _compact(self) -> None:
        """Close the gaps of rows that ended, or that need no further step."""
        place = 0
        while place < len(self._rows):
            row = self._rows[place]
            if not row.done and row.drawn <= row.last:
                place += 1
                continue
            moved = self._rows.pop()
            if moved is not row:
                self._decoder.move(len(self._rows), place, moved.length)
                self._rows[place] = moved

    def _admit(self) -> None:
        """Fill free places with samples of waiting requests and draw their first tokens."""
        first = len(self._rows)
        logits = []
        started = self._waiting.take(self.max_batch - first)
        # Rows of similar length side by side: a step reads them no further than they reach.
        for job, sample, (prefix, following) in sorted(started, key=lambda item: item[2][0].length):
            row = self._new_row(job, sample)
            self._decoder.begin(len(self._rows), prefix, row.rules)
            self._rows.append(row)
            logits.append(following)
        if not logits:
            return
        new = self._rows[first:]
        plan = DrawPlan.covering([row.rules for row in new])
        self._decoder.draw_first(first, torch.stack(logits), plan)
        self._send(new, first)

    def _new_row(self, job: Job, sample: int) -> _Row:
        request, room = job.request, self.max_length - len(job.request.prompt)
        seed = row_seed(request.seed, sample)
        rules = DrawRules(request.temperature, request.top_k, request.top_p, seed)
        return _Row(
            job=job,
            sample=sample,
            rules=rules,
            hook=request.hook() if request.hook else None,
            last=min(request.max_new_tokens, room) - 1,
            reason="max_tokens" if request.max_new_tokens <= room else "length",
        )

    def _force(self) -> None:
        """Replace drawn tokens that hooks decided otherwise, before they are computed with."""
        for place, row in enumerate(self._rows):
            token = row.forced.get(row.drawn - 1)
            if token is not None:
                self._decoder.force(place, token)

    def _launch(self) -> None:
        rows = self._rows
        plan = DrawPlan.covering([row.rules for row in rows])
        self._decoder.step([row.length for row in rows], plan)
        self.steps += 1
        for row in rows:
            row.drawn += 1
        self._send(rows, 0)

    def _send(self, rows: Sequence[_Row], first: int) -> None:
        """Start copying the rows' new tokens to the host."""
        tokens = self._decoder.tokens[first : first + len(rows)]
        if tokens.is_cuda:
            host = torch.empty(len(rows), dtype=tokens.dtype, pin_memory=True)
            host.copy_(tokens, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
            self._unread.append(_Unread(list(rows), host, arrived))
        else:
            self._unread.append(_Unread(list(rows), tokens.clone()))

    def _read_all(self, but: int) -> None:
        """Take drawn tokens in, oldest first, leaving `but` launches in flight."""
        while len(self._unread) > but:
            unread = self._unread.popleft()
            if unread.arrived is not None:
                unread.arrived.synchronize()
            for row, token in zip(unread.rows, unread.tokens.tolist(), strict=True):
                if not row.done:
                    self._read(row, token)

    def _read(self, row: _Row, drawn: int) -> None:
        """Take a row's next token in: what it says, what must follow, whether it ends."""
        index, number = row.read, row.job.number
        row.read += 1
        forced = index in row.forced
        token = row.forced.get(index, drawn)
        if token in row.job.request.stop_tokens:
            event = Event(number, row.sample, None, forced, "stop", stop_token=token)
        else:
            reason = row.reason if index == row.last else None
            event = Event(number, row.sample, token, forced, reason)
        self._events.append(event)
        row.done = event.finish_reason is not None
        if row.hook is not None and not forced and not row.done:
            row.forced.update(enumerate(row.hook(token), start=index + 1))
