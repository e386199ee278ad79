"""Fine-tuning's speed against pretraining's, same model, same shapes, in one process.

    python benchmarks/finetune.py

Both recipes are built on one small model: pretraining on text, fine-tuning on the generated tasks.
Their steps take turns, so that a busy machine slows both alike, and each one's median counts. The
last line is JSON; `ratio` is fine-tuning's tokens per second over pretraining's.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console

from archerchat.data.shards import write_shards
from archerchat.dial import DialConfig
from archerchat.home import Home
from archerchat.runtime import Runtime, build_runtime, prepare_process
from archerchat.tasks.conversation import text_of
from archerchat.tasks.generated import SpellingBeeTask
from archerchat.tasks.registry import MixtureConfig
from archerchat.tokenizer.bpe import train_tokenizer
from archerchat.training.pretrain import PretrainConfig, Pretraining, pretrain
from archerchat.training.recipe import Recipe
from archerchat.training.sft import FinetuneConfig, Finetuning


def build_recipes(home: Home, dial: DialConfig, rows: int, compile: bool) -> tuple[Recipe, Recipe]:
    """Return pretraining's and fine-tuning's recipe at one shape."""
    task = SpellingBeeTask("train", 4000)
    texts = [text_of(conversation["messages"][-1]["content"]) for conversation in task]
    directory = home.data_dir("text")
    write_shards(texts, directory, documents_per_row_group=500, documents_per_shard=2000)
    train_tokenizer(texts, 1024).save(home.tokenizer_dir("default"))
    config = PretrainConfig(
        dial=dial, data="text", device_batch_size=rows, compile=compile, eval_tokens=1,
        model_tag="base",
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        pretrain(config, home, Console(file=io.StringIO()))
    tuning = FinetuneConfig(data=MixtureConfig("generated"), compile=compile)
    stages = Pretraining(config, home), Finetuning(tuning, home)
    for stage in stages:
        stage.build(None)
    return stages


def take_step(recipe: Recipe, runtime: Runtime) -> float:
    """Return the seconds that a step of one micro-batch takes."""
    runtime.synchronize()
    started = time.perf_counter()
    recipe.loss(*recipe.next_micro_batch()).backward()  # type: ignore[no-untyped-call]
    recipe.optimizer.step(0.5, 0.9, 0.0)
    recipe.optimizer.zero_grad()
    runtime.synchronize()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true")
    given = parser.parse_args()
    runtime = build_runtime()
    prepare_process(runtime)
    tokens = given.rows * given.sequence_length
    dial = DialConfig(
        given.depth,
        head_dim=given.head_dim,
        max_seq_len=given.sequence_length,
        num_iterations=1,
        total_batch_size=tokens,
    )
    with tempfile.TemporaryDirectory(prefix="archerchat-benchmark-") as directory:
        home = Home(Path(directory))
        recipes = build_recipes(home, dial, given.rows, not given.no_compile)
        seconds: list[list[float]] = [[], []]
        for step in range(given.warmup + given.steps):
            for recipe, times in zip(recipes, seconds, strict=True):
                taken = take_step(recipe, runtime)
                if step >= given.warmup:
                    times.append(taken)
        for recipe in recipes:
            recipe.loader.close()
    base, tuned = (tokens / statistics.median(times) for times in seconds)
    print(
        json.dumps(
            {
                "ratio": tuned / base,
                "pretrain_tokens_per_second": base,
                "sft_tokens_per_second": tuned,
                "compiled": not given.no_compile,
                "device": runtime.device_name,
            }
        )
    )


if __name__ == "__main__":
    main()
