"""How fast `archerchat serve` answers many clients, and what they cost.

    python benchmarks/serve.py                          # the first model of ARCHERCHAT_HOME
    python benchmarks/serve.py --model d12:base --clients 16 --tokens 128 --requests 1000

The server is a process of its own; clients stream over loopback from this one. Every prompt is new,
so nobody reuses one that has run. A round sends the same prompts to the server, all at once, and to
an engine in this process, in one batch, and asks one client alone. `efficiency` is the median over
`rounds` of the server's tokens/s over the engine's; `ratio` is that of all clients over one.
`first_token_ratio` is the 95th percentile of the time to the first token under load, with all
clients over a quarter of them: each asks again as soon as it has its answer, and answers are of
many lengths, so that a request meets others at work. `burst_first_token_ratio` is the same where
all ask at one moment. Then requests come whose clients leave at random: `leaked_rows` are rows
still in use afterwards, `errors` failed requests, `memory_growth` the server's memory at the end
over that at a third. The last line is one JSON object. Run it alone: a second busy process slows
two threads many times over.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median, quantiles
from typing import Any

from archerchat.home import Home
from archerchat.inference.engine import Engine
from archerchat.inference.loading import load_model
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.sequence import Request
from archerchat.runtime import build_runtime, prepare_process
from archerchat.tokenizer.bpe import Tokenizer
from measuring import percentile, timed

Measure = Callable[[Sequence[Sequence[int]]], float]

PROMPT_TOKENS, PROMPT_IDS = 16, 256
LOADED_ANSWERS = 64
"""Answers of all clients together in a phase under load."""
LOADED_PHASES = 3
"""Phases under load with all clients, each followed by one with a quarter of them."""
SHORT_TOKENS = 16
"""Tokens of an answer that is not there to be timed."""


@dataclass
class Answer:
    """What a client saw."""

    tokens: int
    """As the answer's end counts them; 0 without an end."""
    first_token_seconds: float
    failed: bool


async def ask(port: int, body: dict[str, Any], leave_after: int | None = None) -> Answer:
    """Stream an answer; leave after some chunks where that is given."""
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    content = json.dumps(body).encode()
    started, first, chunks, done = time.perf_counter(), 0.0, 0, False
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(content)}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
    received = b""
    while not received.endswith(b"[DONE]\n\n\r\n0\r\n\r\n") and chunks != leave_after:
        part = await reader.read(2**16)
        received += part
        if not part or b'data: {"error"' in received or b" 200 " not in received[:20]:
            break
        chunks = received.count(b"data: {")
        first = first or (time.perf_counter() - started if chunks else 0.0)
        chunks = chunks if leave_after is None else min(chunks, leave_after)
    else:
        done = True
    writer.close()
    counted = re.findall(rb'"completion_tokens":(\d+)', received)
    return Answer(int(counted[-1]) if counted else 0, first, not done)


class Client:
    """Ask the server for completions of prompts that it has never seen.

    Args:
        fields: what all requests have in common.
    """

    def __init__(self, port: int, fields: dict[str, Any]) -> None:
        self._port, self._fields, self._random = port, fields, Random(0)

    def prompts(self, count: int) -> list[list[int]]:
        ids = range(PROMPT_IDS)
        return [self._random.choices(ids, k=PROMPT_TOKENS) for _ in range(count)]

    async def complete(
        self, prompt: Sequence[int], tokens: int, leave_after: int | None = None
    ) -> Answer:
        """Return an answer; one that is read to its end has all of its tokens."""
        body = {**self._fields, "prompt": prompt, "max_tokens": tokens}
        answer = await ask(self._port, body, leave_after)
        assert leave_after is not None or answer.failed or answer.tokens == tokens, answer
        return answer

    def at_once(self, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, list[float]]:
        """Return the tokens/s of all answers together and the times to their first tokens."""

        async def work() -> list[Answer]:
            return await asyncio.gather(*(self.complete(prompt, tokens) for prompt in prompts))

        started = time.perf_counter()
        answers = asyncio.run(work())
        seconds = time.perf_counter() - started
        assert not any(answer.failed for answer in answers), answers
        arrived = sum(answer.tokens for answer in answers)
        return arrived / seconds, [answer.first_token_seconds for answer in answers]

    def keep_asking(self, clients: int, answers: int, tokens: int) -> list[float]:
        """Let each client ask for one answer after another; return the times to the first token."""

        async def client() -> list[float]:
            found = []
            for _ in range(answers // clients + 1):
                length = self._random.randrange(tokens // 2, tokens * 3 // 2)
                found.append(await self.complete(self.prompts(1)[0], length))
            assert not any(answer.failed for answer in found), found
            return [answer.first_token_seconds for answer in found[1:]]  # all begin at one moment

        async def work() -> list[list[float]]:
            return await asyncio.gather(*(client() for _ in range(clients)))

        return [seconds for times in asyncio.run(work()) for seconds in times]

    def leave_at_random(self, requests: int, clients: int) -> int:
        """Send requests, `clients` at a time, most of which are left early; count failures."""
        waiting = self.prompts(requests)

        async def client() -> int:
            failed = 0
            while waiting:
                leave = self._random.choice([0, 1, 2, 3, None])
                failed += (await self.complete(waiting.pop(), SHORT_TOKENS, leave)).failed
            return failed

        async def work() -> int:
            return sum(await asyncio.gather(*(client() for _ in range(clients))))

        return asyncio.run(work())


def stats(port: int) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/stats") as response:
        found: dict[str, Any] = json.load(response)
        return found


def memory(pid: int) -> int:
    """Return a process's resident memory in KB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def build_engine(options: argparse.Namespace) -> tuple[Tokenizer, Measure]:
    """Return the tokenizer and what measures the engine's tokens/s for prompts in one batch."""
    tag, _, stage = options.model.partition(":")
    runtime = build_runtime(options.device)
    prepare_process(runtime)
    loaded = load_model(Home.from_environment(), runtime, stage, tag)
    engine = Engine(loaded.model, max_batch=options.clients)
    params = SamplingParams(options.tokens, logit_bias={loaded.tokenizer.bos_id: -100})
    decode = loaded.tokenizer.decode

    def measure(prompts: Sequence[Sequence[int]]) -> float:
        requests = [Request(prompt, params, decode=decode) for prompt in prompts]
        seconds, found = timed(runtime.synchronize, lambda: engine.generate(requests))
        return sum(len(answer.token_ids) for (answer,) in found) / seconds

    return loaded.tokenizer, measure


def measure_speed(options: argparse.Namespace, client: Client, engine: Measure) -> dict[str, Any]:
    """Return tokens/s of server and engine in alternating rounds, and bursts' first tokens."""
    few = max(1, options.clients // 4)
    speeds: list[tuple[float, float, float]] = []
    burst: list[float] = []
    quarter: list[float] = []
    for number in range(options.rounds + 1):
        prompts = client.prompts(options.clients)
        before = engine(prompts) if number % 2 else 0.0
        served, first = client.at_once(prompts, options.tokens)
        own = before or engine(prompts)
        alone, _ = client.at_once(client.prompts(1), options.tokens)
        _, few_first = client.at_once(client.prompts(few), SHORT_TOKENS)
        if number:  # the first round warms up
            speeds.append((served, own, alone))
            burst += first
            quarter += few_first
    efficiency = [served / own for served, own, _ in speeds]
    server, own, alone = (median(each) for each in zip(*speeds, strict=True))
    return {
        "rounds": options.rounds,
        "tokens_per_second": server,
        "engine_tokens_per_second": own,
        "one_by_one_tokens_per_second": alone,
        "ratio": median(served / alone for served, _, alone in speeds),
        "efficiency": median(efficiency),
        "efficiency_quartiles": quantiles(efficiency)[::2],
        "burst_first_token_p95": percentile(burst, 0.95),
        "burst_first_token_ratio": percentile(burst, 0.95) / percentile(quarter, 0.95),
    }


def measure_load(options: argparse.Namespace, client: Client) -> dict[str, Any]:
    """Return times to the first token under load."""
    times: dict[int, list[float]] = {}
    for _ in range(LOADED_PHASES):
        for clients in (options.clients, max(1, options.clients // 4)):
            found = client.keep_asking(clients, LOADED_ANSWERS, options.tokens)
            times.setdefault(clients, []).extend(found)
    loaded, lightly = (percentile(each, 0.95) for each in times.values())
    return {
        "first_token_p95": loaded,
        "quarter_first_token_p95": lightly,
        "first_token_ratio": loaded / lightly,
    }


def measure_leaving(
    options: argparse.Namespace, client: Client, port: int, pid: int
) -> dict[str, Any]:
    """Return what clients that leave at random cost."""
    third = options.requests // 3
    errors = client.leave_at_random(third, options.clients)
    before = memory(pid)
    errors += client.leave_at_random(options.requests - third, options.clients)
    time.sleep(1)
    left = stats(port)
    return {
        "requests": options.requests,
        "errors": errors,
        "leaked_rows": left["rows"] + left["samples_in_work"],
        "memory_growth": memory(pid) / before,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="TAG:STAGE; by default the server's first")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--requests", type=int, default=1000, help="with clients that leave")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"))
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds is {options.rounds}; quartiles need two or more")
    command = [sys.executable, "-m", "archerchat.cli", "serve", "--port", "0"]
    command += ["--max-batch", str(options.clients)]
    command += ["--model", options.model] if options.model else []
    command += ["--device", options.device] if options.device else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline().split(":")[2].split("/")[0])
            url = f"http://127.0.0.1:{port}/v1/models"
            with urllib.request.urlopen(url) as response:
                options.model = options.model or json.load(response)["data"][0]["id"]
            tokenizer, engine = build_engine(options)
            bias = {str(tokenizer.bos_id): -100}  # which would end an answer
            fields = {"model": options.model, "temperature": 1, "logit_bias": bias}
            client = Client(port, fields)
            result = {
                "model": options.model,
                **measure_speed(options, client, engine),
                **measure_load(options, client),
                **measure_leaving(options, client, port, server.pid),
            }
        finally:
            server.terminate()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
