"""How fast `archerchat serve` answers many clients, and what they cost.

    python benchmarks/serve.py                          # the first model of ARCHERCHAT_HOME
    python benchmarks/serve.py --model d12:base --clients 16 --tokens 128 --requests 1000

The server is a process of its own; clients stream over loopback from this one. `ratio` is the total
tokens/s of all clients at once over that of one after another; `efficiency` is the same total over
what the engine's own batch makes in this process without HTTP. `first_token_ratio` is the 95th
percentile of the time to the first token under load, with all clients over a quarter of them: each
asks again as soon as it has its answer, and answers are of many lengths, so that a request meets
others at work. `burst_first_token_ratio` is the same where all ask at one moment. Then requests
come whose clients leave at random: `leaked_rows` are rows still in use afterwards, `errors` failed
requests, `memory_growth` the server's memory at the end over that at a third. The last line is one
JSON object. Run it alone: a second busy process slows two threads many times over.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from archerchat.home import Home
from archerchat.inference.engine import Engine
from archerchat.inference.loading import load_model
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.sequence import Request
from archerchat.runtime import build_runtime, prepare_process
from measuring import percentile, timed

PROMPT_TOKENS, PROMPT_IDS = 16, 256
LOADED_ANSWERS = 6
"""Answers of each client under load."""


@dataclass
class Answer:
    """What a client saw."""

    tokens: int
    first_token_seconds: float
    failed: bool


async def ask(port: int, body: dict[str, Any], leave_after: int | None = None) -> Answer:
    """Stream an answer; leave after some tokens where that is given."""
    content = json.dumps(body | {"stream": True}).encode()
    started, first, tokens, done = time.perf_counter(), 0.0, 0, False
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(content)}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
    received = b""
    while not received.endswith(b"[DONE]\n\n\r\n0\r\n\r\n") and tokens != leave_after:
        part = await reader.read(2**16)
        received += part
        if not part or b'data: {"error"' in received or b" 200 " not in received[:20]:
            break
        tokens = received.count(b"data: {")
        first = first or (time.perf_counter() - started if tokens else 0.0)
        tokens = tokens if leave_after is None else min(tokens, leave_after)
    else:
        done = True
    writer.close()
    return Answer(tokens, first, not done)


async def ask_at_once(port: int, bodies: Sequence[dict[str, Any]]) -> list[Answer]:
    return list(await asyncio.gather(*(ask(port, body) for body in bodies)))


async def ask_in_turn(port: int, bodies: Sequence[dict[str, Any]]) -> list[Answer]:
    return [await ask(port, body) for body in bodies]


async def keep_asking(port: int, body: dict[str, Any], clients: int, answers: int) -> list[float]:
    """Let each client ask for one answer after another; return the times to the first token."""

    async def client(number: int) -> list[float]:
        random, times = Random(number), []
        for _ in range(answers + 1):
            length = random.randrange(body["max_tokens"] // 2, body["max_tokens"] * 3 // 2)
            prompt = [random.randrange(PROMPT_IDS) for _ in range(PROMPT_TOKENS)]
            given = body | {"prompt": prompt, "max_tokens": length}
            times.append((await ask(port, given)).first_token_seconds)
        return times[1:]  # all begin at one moment

    found = await asyncio.gather(*(client(number) for number in range(clients)))
    return [seconds for times in found for seconds in times]


async def leave_at_random(port: int, bodies: Sequence[dict[str, Any]], clients: int) -> int:
    """Send requests, `clients` at a time, most of which are left early; count failures."""
    random, waiting = Random(1), list(bodies)

    async def client() -> int:
        failed = 0
        while waiting:
            body = waiting.pop()
            leave = random.choice([0, 1, 2, 5, 10, None])
            failed += (await ask(port, body, leave)).failed
        return failed

    return sum(await asyncio.gather(*(client() for _ in range(clients))))


def stats(port: int) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/stats") as response:
        found: dict[str, Any] = json.load(response)
        return found


def memory(pid: int) -> int:
    """Return a process's resident memory in KB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def measure_engine(options: argparse.Namespace, prompts: Sequence[list[int]]) -> float:
    """Return the engine's tokens/s for the same requests in one batch."""
    tag, _, stage = options.model.partition(":")
    runtime = build_runtime(options.device)
    prepare_process(runtime)
    loaded = load_model(Home.from_environment(), runtime, stage, tag)
    engine = Engine(loaded.model, max_batch=options.clients)
    params = SamplingParams(options.tokens, logit_bias={loaded.tokenizer.bos_id: -100})
    decode = loaded.tokenizer.decode
    requests = [Request(prompt, params, decode=decode) for prompt in prompts]
    engine.generate(requests[:2])
    seconds = min(timed(runtime.synchronize, lambda: engine.generate(requests))[0]
                     for _ in range(options.rounds))  # fmt: skip
    return float(len(prompts) * options.tokens / seconds)


def measure_server(
    options: argparse.Namespace, port: int, pid: int, prompts: Sequence[list[int]], bos: int
) -> dict[str, Any]:
    """Return the server's figures."""
    fields = {"model": options.model, "temperature": 1, "logit_bias": {str(bos): -100}}
    bodies = [{**fields, "prompt": prompt, "max_tokens": options.tokens} for prompt in prompts]
    asyncio.run(ask_at_once(port, bodies[:2]))
    few = bodies[: max(1, options.clients // 4)]
    seconds, first = float("inf"), []
    for _ in range(options.rounds):
        started = time.perf_counter()
        answers = asyncio.run(ask_at_once(port, bodies))
        seconds = min(seconds, time.perf_counter() - started)
        first += [answer.first_token_seconds for answer in answers]
    quarter = [a.first_token_seconds for _ in range(options.rounds)
               for a in asyncio.run(ask_at_once(port, few))]  # fmt: skip
    loaded, lightly = (
        percentile(asyncio.run(keep_asking(port, bodies[0], count, LOADED_ANSWERS)), 0.95)
        for count in (len(bodies), len(few))
    )
    started = time.perf_counter()
    alone = asyncio.run(ask_in_turn(port, few))
    alone_speed = sum(answer.tokens for answer in alone) / (time.perf_counter() - started)
    short = [body | {"max_tokens": 16} for body in bodies] * (options.requests // len(bodies) + 1)
    third = options.requests // 3
    errors = asyncio.run(leave_at_random(port, short[:third], options.clients))
    before = memory(pid)
    errors += asyncio.run(leave_at_random(port, short[third : options.requests], options.clients))
    time.sleep(1)
    left = stats(port)
    return {
        "tokens_per_second": len(bodies) * options.tokens / seconds,
        "one_by_one_tokens_per_second": alone_speed,
        "first_token_p95": loaded,
        "first_token_ratio": loaded / lightly,
        "burst_first_token_p95": percentile(first, 0.95),
        "burst_first_token_ratio": percentile(first, 0.95) / percentile(quarter, 0.95),
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
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=1000, help="with clients that leave")
    parser.add_argument("--device", choices=("cpu", "cuda", "mps"))
    options = parser.parse_args()
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
            tag, _, stage = options.model.partition(":")
            loaded = load_model(Home.from_environment(), build_runtime("cpu"), stage, tag)
            random, size = Random(0), loaded.tokenizer.bos_id
            prompts = [
                [random.randrange(PROMPT_IDS) for _ in range(PROMPT_TOKENS)]
                for _ in range(options.clients)
            ]
            result = measure_server(options, port, server.pid, prompts, size)
        finally:
            server.terminate()
    engine = measure_engine(options, prompts)
    speed = result["tokens_per_second"]
    result |= {
        "model": options.model,
        "engine_tokens_per_second": engine,
        "ratio": speed / result["one_by_one_tokens_per_second"],
        "efficiency": speed / engine,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
