"""Bits per byte: a loss that does not depend on the tokenizer (SPEC section 5).

Every byte of a text file is predicted exactly once. A row has BOS and T - 1 tokens as inputs and T
tokens as targets, as in training; the last row is padded with targets that do not count. The file
is read and tokenized in parts. They are cut before lines that begin with a visible character, since
the split pattern never joins a token across such a place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from archerchat.distributed import Ranks
from archerchat.errors import DataError
from archerchat.model.loss import IGNORED
from archerchat.text_files import iter_lines
from archerchat.tokenizer.bpe import Tokenizer

PART_CHARACTERS = 2**20


@torch.no_grad()
def evaluate_bits_per_byte(
    token_losses: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    token_bytes: Tensor,
    ranks: Ranks | None = None,
) -> float:
    """Divide the loss of all targets by the bytes they stand for.

    Args:
        token_losses: maps inputs and targets (B, T) to losses in nats (B, T).
        batches: inputs and targets (B, T); a target of -1 counts in neither sum.
        token_bytes: (V,) byte length of each token, 0 for special ones, which do not count.
        ranks: processes that evaluate together, each on its own batches.

    Raises:
        DataError: no target stands for any byte.
    """
    nats, total_bytes = 0.0, 0
    for inputs, targets in batches:
        sizes = torch.where(targets >= 0, token_bytes[targets.clamp(min=0)], 0)
        losses = token_losses(inputs, targets)
        nats += (losses * (sizes > 0)).sum(dtype=torch.float32).item()
        total_bytes += int(sizes.sum().item())
    ranks = ranks or Ranks()
    nats, all_bytes = ranks.sum(torch.tensor([nats, total_bytes], dtype=torch.float64)).tolist()
    if all_bytes == 0:
        raise DataError("there is no text to evaluate on: the data holds only empty documents")
    return float(nats / (math.log(2) * all_bytes))


def iter_text_batches(
    path: Path, tokenizer: Tokenizer, batch_size: int, sequence_length: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets (B, T) that hold each token of a text file once as a target.

    Raises:
        DataError: the file cannot be read, or is not text.
    """
    size = batch_size * sequence_length
    ids: list[int] = []
    for text in iter_text(path):
        ids += tokenizer.encode(text)
        while len(ids) >= size:
            yield _rows(ids[:size], tokenizer.bos_id, sequence_length, device)
            ids = ids[size:]
    if ids:
        yield _rows(ids, tokenizer.bos_id, sequence_length, device)


def _rows(ids: list[int], bos_id: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows = -(-len(ids) // length)
    targets = torch.full((rows * length,), IGNORED)
    targets[: len(ids)] = torch.tensor(ids)
    targets = targets.view(rows, length)
    inputs = torch.full_like(targets, bos_id)
    inputs[:, 1:] = targets[:, :-1].clamp(min=0)
    return inputs.to(device), targets.to(device)


def iter_text(path: Path, part: int = PART_CHARACTERS) -> Iterator[str]:
    """Yield a file's text in parts of about `part` characters that can be tokenized separately.

    A DataError says that the file cannot be read, or is not text.
    """
    lines: list[str] = []
    size = 0
    for _, line in iter_lines(path, newline="\n"):
        if size >= part and not line[0].isspace():
            yield "".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if lines:
        yield "".join(lines)
