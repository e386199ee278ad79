"""How fast `eval chat` answers GSM8K, against the plain path, with the same answers.

    python benchmarks/chat_eval.py                              # random weights of depth 6
    python benchmarks/chat_eval.py --oracle ../shared/oracle    # the reference's trained model
    python benchmarks/chat_eval.py --problems 8 --tokens 16     # does it run?

Both paths render the same prompts, have the calculator at hand, decode and judge every answer.
The plain path answers one problem at a time, by a cache that grows by a token a step, each step the
model's own forward pass, each token taken in Python: no batch, no weights cast ahead. `ratio` is
its time over that of `evals.chat`, which `eval chat` runs. Answers are greedy and compared token
for token: `same_answers`. The last line is one JSON object; the exit status is 1 when answers
differ in float32. Problems come from `--data-dir`; where it does not exist, sums and products are
made up. Run it alone: a second busy process slows two threads many times over.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from archerchat.errors import DataError
from archerchat.evals.chat import Answer, build_request, evaluate_task, limited, render_question
from archerchat.inference.engine import Engine
from archerchat.inference.sampling_params import SamplingParams
from archerchat.inference.tools import spoken_text
from archerchat.model.transformer import Transformer
from archerchat.runtime import build_runtime, dtype_name, prepare_process
from archerchat.tasks.base import Task
from archerchat.tasks.collected import GSM8KTask
from archerchat.tasks.conversation import text_of
from archerchat.tasks.generated import ArithmeticTask
from archerchat.tasks.hub import TaskFiles
from archerchat.tokenizer.bpe import Tokenizer, train_tokenizer
from generation import add_model_options, build_model, plain_tokens, report
from measuring import timed
from models import load_golden_tokenizer


@dataclass(frozen=True)
class PlainAnswer:
    """What the plain path made of one problem."""

    token_ids: list[int]
    right: bool


def answer_plainly(
    model: Transformer, tokenizer: Tokenizer, task: Task, params: SamplingParams
) -> list[PlainAnswer]:
    """Answer and judge a task's problems one after the other."""
    answers, length = [], model.config.sequence_length
    for problem in range(len(task)):
        conversation = task[problem]
        prompt, _ = render_question(tokenizer, conversation, length)
        request = build_request(tokenizer, prompt, params, problem)
        ids = plain_tokens(model, request)
        right = task.evaluate(conversation, spoken_text(tokenizer, ids))
        answers.append(PlainAnswer(ids, right))
    return answers


def build_task(data_dir: Path, split: str) -> Task:
    """Return a split of GSM8K, or made-up problems where there are no files."""
    if not data_dir.is_dir():
        return ArithmeticTask(split, 7000)
    return GSM8KTask(TaskFiles(cache=data_dir, local=data_dir), split)


def build_tokenizer(options: argparse.Namespace) -> Tokenizer:
    """Load the trained model's tokenizer, or learn one from questions and answers for training."""
    if options.oracle:
        return load_golden_tokenizer(options.oracle)
    texts = []
    for conversation in build_task(options.data_dir, "train"):
        question, answer = conversation["messages"]
        texts.append(f"{question['content']} {text_of(answer['content'])}")
    for size in (options.vocab_size, 512, 288):
        try:
            return train_tokenizer(texts, size)
        except DataError:  # too little text for that many tokens
            continue
    raise SystemExit(f"{len(texts)} problems hold too little text to train a tokenizer")


def same(ours: Sequence[Answer], plain: Sequence[PlainAnswer]) -> float:
    """Return the share of answers whose tokens and verdicts are equal."""
    pairs = list(zip(ours, plain, strict=True))
    equal = [a.completion.token_ids == b.token_ids and a.right == b.right for a, b in pairs]
    return sum(equal) / len(equal)


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run both paths and return the figures."""
    runtime = build_runtime(options.device, options.dtype)
    prepare_process(runtime)
    task = limited(build_task(options.data_dir, "test"), options.problems)
    tokenizer = build_tokenizer(options)
    model = build_model(options, runtime, tokenizer.vocab_size)
    params = SamplingParams(options.tokens, temperature=0.0)
    engine = Engine(model, options.device_batch_size)
    console.print("warming up")
    evaluate_task(engine, tokenizer, task[:4], params)
    answer_plainly(model, tokenizer, task[:1], params)
    answers: list[Answer] = []
    ours, _ = timed(
        runtime.synchronize,
        lambda: evaluate_task(engine, tokenizer, task, params, on_answer=answers.append),
    )
    console.print(f"evals.chat: {ours:.1f} s; now the plain path")
    seconds, plain = timed(
        runtime.synchronize, lambda: answer_plainly(model, tokenizer, task, params)
    )
    share, tokens = same(answers, plain), sum(len(a.completion.token_ids) for a in answers)
    return {
        "ratio": round(seconds / ours, 2),
        "same_answers": share == 1.0,
        "same_share": round(share, 4),
        "seconds": round(ours, 2),
        "plain_seconds": round(seconds, 2),
        "tokens_per_second": round(tokens / ours, 1),
        "plain_tokens_per_second": round(sum(len(a.token_ids) for a in plain) / seconds, 1),
        "task": task.name,
        "problems": len(task),
        "right": sum(a.right for a in answers),
        "answer_tokens": tokens,
        "layers": model.config.num_layers,
        "model_dim": model.config.model_dim,
        "vocab_size": model.config.vocab_size,
        "device_batch_size": options.device_batch_size,
        "dtype": dtype_name(runtime.compute_dtype),
        "device": runtime.device_name,
        "threads": torch.get_num_threads(),
    }


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_model_options(parser)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/data"))
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=128, help="most in an answer")
    parser.add_argument("--device-batch-size", type=int, default=64)
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    console = Console(stderr=True)
    return report(measure(options, console), options, console)


if __name__ == "__main__":
    sys.exit(main())
