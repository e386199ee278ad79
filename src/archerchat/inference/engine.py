"""Serve many requests at once: continuous batching over one cache.

    engine = Engine(model)
    params = SamplingParams(max_new_tokens=64, temperature=0.7)
    for event in engine.stream([Request(ids, params)]): ...
    completions = engine.generate(requests)    # a list of samples for each request

Sequences in work have the first rows of the cache. When one finishes, the last row moves into its
place, and waiting requests get the places at the end. What a sequence says depends on its own
prompt, parameters and seed alone: greedy tokens are those of the plain forward pass in float32, up
to ties within rounding (1e-6 of a logit). In 16 bits another batch size may give other tokens.

With `overlap` a step is launched before the tokens of the one before it are read, so that a GPU
never waits for the host. Forced tokens replace the sampled ones before anything is computed from
them. A sequence whose end is seen one step late has one token too many, which is dropped.
"""

from __future__ import annotations

from collections import abc, deque

import torch

from archerchat.errors import UsageError
from archerchat.inference.loading import refresh_weights
from archerchat.inference.model_runner import Fetch, ModelRunner
from archerchat.inference.sampler import SamplingPlan
from archerchat.inference.scheduler import Scheduler
from archerchat.inference.sequence import Completion, Event, Request, Sequence
from archerchat.model.transformer import Transformer


class Engine:
    """Generate from one model.

    Args:
        model: its weights as they are now; `refresh_weights` copies later ones.
        max_batch: most rows at a time.
        max_length: most tokens of a row, prompt included; by default the model's sequence length.
        compile: compile steps on CUDA, and single-row steps on CPUs in float32: faster, after
            some seconds.
        overlap: read tokens one step late; by default on CUDA.
        kept_tokens: keep prompts of this many tokens in all, for later ones that continue them.

    Attributes:
        model: the model, or a copy of it in the compute dtype.
        steps: decoding steps so far.
    """

    def __init__(
        self,
        model: Transformer,
        max_batch: int = 64,
        max_length: int | None = None,
        compile: bool = False,
        overlap: bool | None = None,
        kept_tokens: int = 0,
    ) -> None:
        self.max_batch = max_batch
        self.max_length = max_length or model.config.sequence_length
        self.overlap = model.device.type == "cuda" if overlap is None else overlap
        self._runner = ModelRunner(model, max_batch, self.max_length, compile)
        self.model = self._runner.model
        self._scheduler = Scheduler(self.model, kept_tokens)
        self._running: list[Sequence] = []
        self._plan: SamplingPlan | None = None  # of the running sequences; None after a change
        self._unread: deque[tuple[list[Sequence], Fetch]] = deque()
        self._events: list[Event] = []
        self.steps = 0

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._scheduler or self._running or self._unread or self._events)

    @property
    def num_running(self) -> int:
        """Rows in use; a sequence that has finished has none."""
        return sum(not sequence.finished for sequence in self._running)

    @property
    def num_waiting(self) -> int:
        """Requests with samples that have no row yet."""
        return len(self._scheduler)

    def check(self, request: Request) -> None:
        """Refuse, by `UsageError`, a request without room in the context or with unknown tokens."""
        length, longest = len(request.prompt), self.max_length - 1
        if length > longest:
            raise UsageError(
                f"the prompt has {length} tokens and the context {self.max_length}: cut it to "
                f"{longest} or fewer, to leave room for an answer"
            )
        last = self.model.config.vocab_size - 1
        ids = {"the prompt": request.prompt, "--logit-bias": request.params.logit_bias}
        for name, tokens in ids.items():
            if unknown := [token for token in tokens if not 0 <= token <= last]:
                raise UsageError(f"{name} has token {unknown[0]}; the model knows 0 to {last}")

    def refresh_weights(self) -> None:
        """Copy the model's weights after a training step changed them."""
        assert not self.busy, "requests in work were started with the old weights"
        refresh_weights(self.model)
        self._scheduler.kept.clear()

    def add(self, number: int, request: Request) -> None:
        """Queue a request, or raise as `check` does; its events carry `number`, which no other
        request in work may have."""
        self.check(request)
        self._scheduler.add(number, request)

    def cancel(self, number: int) -> None:
        """End a request's sequences; their last events say so. Unknown numbers are ignored."""
        waiting = self._scheduler.remove(number)
        if waiting is not None:
            for sample in range(waiting.started, waiting.request.params.num_samples):
                self._events.append(Event(number, sample, None, finish_reason="cancelled"))
        for sequence in self._running:
            if sequence.number == number and not sequence.finished:
                self._events.append(sequence.cancel())

    def reset(self) -> None:
        """Drop every request without further events."""
        for kept in (self._scheduler, self._running, self._unread, self._events):
            kept.clear()
        self._plan = None

    def stream(self, requests: abc.Sequence[Request]) -> abc.Generator[Event]:
        """Yield what happens to the requests, numbered as they are listed, as it happens.

        Closing the iterator drops them. The call raises as `check` does, before anything runs.
        """
        assert not self.busy, "the engine has other requests in work"
        for request in requests:
            self.check(request)
        return self._stream(requests)

    def _stream(self, requests: abc.Sequence[Request]) -> abc.Generator[Event]:
        try:
            for number, request in enumerate(requests):
                self._scheduler.add(number, request)
            while self.busy:
                yield from self.step()
        finally:
            self.reset()

    def generate(self, requests: abc.Sequence[Request]) -> list[list[Completion]]:
        """Return each request's completions, one per sample; raises as `stream` does."""
        completions = [[Completion() for _ in range(r.params.num_samples)] for r in requests]
        for event in self.stream(requests):
            completions[event.request][event.sample].add(event)
        return completions

    def step(self) -> list[Event]:
        """Run both halves of a step, `admit` and `advance`; return what happened."""
        return [*self.admit(), *self.advance()]

    @torch.no_grad()
    def admit(self) -> list[Event]:
        """Fill free rows with waiting requests; return what is known by now.

        Without `overlap`, or with masks, that includes their first tokens, which a server shows
        without waiting for the other half of the step.
        """
        self._compact()
        self._start_waiting()
        masked = any(sequence.mask for sequence in self._running)
        # Some sequences end with their first token, and masks need all tokens so far.
        return self._read_all(but=len(self._unread) if self.overlap and not masked else 0)

    @torch.no_grad()
    def advance(self) -> list[Event]:
        """Advance every sequence by a token; return what happened."""
        self._compact()
        if self._running:
            self._launch()
        return self._read_all(but=1 if self.overlap and self._running else 0)

    def _compact(self) -> None:
        """Close the gaps of sequences that have finished, or that need no further step."""
        row = 0
        while row < len(self._running):
            if self._running[row].needs_step:
                row += 1
                continue
            last, self._plan = self._running.pop(), None
            if row < len(self._running):
                self._runner.move(len(self._running), row, last.num_cached)
                self._running[row] = last

    def _start_waiting(self) -> None:
        """Fill free places with samples of waiting requests and sample their first tokens."""
        first = len(self._running)
        started = self._scheduler.schedule(self.max_batch - first)
        # Rows of similar length side by side: a step reads them no further than they reach.
        started.sort(key=lambda pair: len(pair[0].request.prompt))
        logits = []
        for row, (waiting, sample) in enumerate(started, start=first):
            request, prompt = waiting.request, waiting.prefix
            assert prompt is not None
            sequence = Sequence(waiting.number, sample, request, self.max_length, waiting.cached)
            self._runner.start(row, prompt, request, sequence.seed)
            self._running.append(sequence)
            self._mask(row, sequence)
            logits.append(prompt.logits)
        if logits:
            self._plan = None
            plan = _covering(self._running[first:])
            self._runner.sample_first(first, torch.stack(logits), plan)
            self._fetch(first, plan)

    def _launch(self) -> None:
        """Launch a step, before which the tokens that hooks forced replace the sampled ones."""
        for row, sequence in enumerate(self._running):
            if (token := sequence.forced_input) is not None:
                self._runner.tokens[row] = token
            self._mask(row, sequence)
        self._plan = self._plan or _covering(self._running)
        self._runner.step([sequence.num_cached for sequence in self._running], self._plan)
        self.steps += 1
        for sequence in self._running:
            sequence.num_drawn += 1
        self._fetch(0, self._plan)

    def _mask(self, row: int, sequence: Sequence) -> None:
        if sequence.mask is not None:
            allowed = sequence.mask(sequence.token_ids)
            self._runner.sampler.allow(row, sequence.request.params, allowed)

    def _fetch(self, first: int, plan: SamplingPlan) -> None:
        """Start copying the new tokens of the rows from `first` on to the host."""
        sequences = self._running[first:]
        self._unread.append((sequences, self._runner.fetch(first, len(sequences), plan)))

    def _read_all(self, but: int) -> list[Event]:
        """Read sampled tokens, oldest first, leaving `but` launches in flight; return all events
        that have not been returned."""
        while len(self._unread) > but:
            sequences, fetch = self._unread.popleft()
            for sequence, sampled in zip(sequences, fetch(), strict=True):
                if not sequence.finished:
                    self._events.append(sequence.read(*sampled))
        events, self._events = self._events, []
        return events


def _covering(sequences: abc.Sequence[Sequence]) -> SamplingPlan:
    params = [sequence.request.params for sequence in sequences]
    return SamplingPlan.covering(params, masked=any(sequence.mask for sequence in sequences))
