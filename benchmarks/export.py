"""Export a model as a Hugging Face folder, and see whether it computes the same there.

    python benchmarks/export.py                       # random weights of depth 12
    python benchmarks/export.py --depth 4 --vocab-size 4096 --tokens 16

It needs `transformers`. `export_seconds` and `export_memory_ratio` are the command's, in a process
of its own: the latter is what its peak memory grew by, in sizes of the folder.
`max_logit_difference` is over a batch of rows, `tokens_equal` says whether a greedy answer is the
same by the engine and by `generate`, and `round_trip_equal` whether every tensor comes back bit for
bit. `decode_ratio` is the tokens per second of `generate` over the engine's, for information. The
last line is one JSON object; the exit status is 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from archerchat.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from archerchat.cli import main as archerchat
from archerchat.home import Home
from archerchat.inference.engine import Engine
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.sequence import Request
from archerchat.model.transformer import Transformer
from archerchat.runtime import build_runtime, prepare_process
from archerchat.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer
from generation import add_model_options, build_model
from measuring import run_in_child, timed

TAG = "exported"
PROMPT = 64


def build_tokenizer(vocab_size: int) -> Tokenizer:
    """Return one of the right size: single bytes and pairs of them."""
    tokens = [bytes([value]) for value in range(256)] + [
        bytes(p) for p in product(range(256), repeat=2)
    ]
    return Tokenizer(
        {token: i for i, token in enumerate(tokens[: vocab_size - len(SPECIAL_TOKENS)])}
    )


def save_model(home: Home, model: Transformer, tokenizer: Tokenizer) -> None:
    tokenizer.save(home.tokenizer_dir(TAG))
    about = {"name": TAG, "fingerprint": tokenizer.fingerprint}
    meta = {"model_config": asdict(model.config), "tokenizer": about, "stage": "base"}
    save_checkpoint(home.checkpoint_dir("base", TAG), 0, {"model": model.state_dict()}, meta)


def peak_memory_bytes() -> int:
    """Return this process's peak resident memory, which an `exec` does not take over."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def export(folder: str) -> None:
    """Export in this process, and print what it took."""
    before = peak_memory_bytes()
    seconds, code = timed(lambda: None, lambda: archerchat(["export", "huggingface", TAG, folder]))
    assert code == 0
    print(json.dumps({"seconds": seconds, "memory_bytes": peak_memory_bytes() - before}))


def round_trip_equal(home: Home, folder: Path) -> bool:
    """Import the folder and compare every tensor."""
    if archerchat(["import", "huggingface", str(folder), "--tag", "back"]):
        return False
    paths = [find_checkpoint(home.checkpoint_dir("base", tag)) for tag in (TAG, "back")]
    first, second = (load_checkpoint(path, ("model",)).state["model"] for path in paths)
    return first.keys() == second.keys() and all(
        first[n].dtype == second[n].dtype and torch.equal(first[n], second[n]) for n in first
    )


@torch.inference_mode()
def measure(options: argparse.Namespace, home: Home, folder: Path) -> dict[str, Any]:
    """Export, load, compare and time."""
    from transformers import AutoModelForCausalLM

    runtime = build_runtime("cpu", options.dtype)
    prepare_process(runtime)
    model = build_model(options, runtime, options.vocab_size)
    save_model(home, model, build_tokenizer(model.config.vocab_size))
    exported = run_in_child(__file__, ["--export", folder])
    size = sum(file.stat().st_size for file in folder.iterdir())
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=runtime.compute_dtype
    )
    ids = torch.randint(0, model.config.vocab_size, (2, PROMPT))
    difference = (model(ids) - theirs(ids).logits).abs().max().item()
    request = Request(ids[0].tolist(), SamplingParams(options.tokens, temperature=0))
    engine = Engine(model, max_batch=1)
    given = {"do_sample": False, "eos_token_id": None, "max_new_tokens": options.tokens}
    given["attention_mask"] = torch.ones_like(ids[:1])
    for _ in range(2):  # the first time warms up
        own_seconds, answers = timed(runtime.synchronize, lambda: list(engine.generate([request])))
        their_seconds, row = timed(
            runtime.synchronize, lambda: theirs.generate(ids[:1], **given)[0, PROMPT:].tolist()
        )
    return {
        "max_logit_difference": difference,
        "tokens_equal": answers[0][0].token_ids == row,
        "round_trip_equal": round_trip_equal(home, folder),
        "decode_ratio": round(own_seconds / their_seconds, 2),
        "tokens_per_second": round(options.tokens / their_seconds, 1),
        "export_seconds": round(exported["seconds"], 2),
        "export_memory_ratio": round(exported["memory_bytes"] / size, 2),
        "folder_bytes": size,
        "layers": model.config.num_layers,
        "model_dim": model.config.model_dim,
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_model_options(parser)
    parser.set_defaults(depth=12, vocab_size=32768, max_seq_len=2048)
    parser.add_argument("--tokens", type=int, default=64, help="in the answer that is compared")
    parser.add_argument("--export", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.export:
        export(options.export)
        return 0
    with tempfile.TemporaryDirectory(prefix="archerchat-benchmark-") as directory:
        os.environ["ARCHERCHAT_HOME"] = directory
        os.environ["HF_MODULES_CACHE"] = f"{directory}/modules"
        figures = measure(options, Home(Path(directory)), Path(directory) / "folder")
    for name, value in figures.items():
        Console(stderr=True).print(f"{name:22} {value}")
    print(json.dumps(figures))
    limit = 1e-4 if options.dtype == "float32" else 0.5
    equal = figures["tokens_equal"] or options.dtype != "float32"
    same = equal and figures["round_trip_equal"] and figures["max_logit_difference"] <= limit
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
