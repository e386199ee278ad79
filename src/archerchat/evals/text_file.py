"""Any text file as batches for bits per byte: every byte of it is predicted exactly once.

A row is BOS and T - 1 tokens as inputs and T tokens as targets, so that the model sees what rows
look like in training; the last row is filled up with targets that do not count. The file is read
and tokenized in parts, cut after a line's end where the split pattern starts afresh.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from archerchat.errors import DataError
from archerchat.model.loss import IGNORED
from archerchat.tokenizer.bpe import Tokenizer

PART_CHARACTERS = 2**20


def iter_text(path: Path, part: int = PART_CHARACTERS) -> Iterator[str]:
    """Yield a file's text in parts of about `part` characters that can be tokenized apart.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    rest = ""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            while read := file.read(part):
                text = rest + read
                cut = _last_cut(text)
                if cut:
                    yield text[:cut]
                rest = text[cut:]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}): convert it first") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if rest:
        yield rest


def _last_cut(text: str) -> int:
    """Return where the last line begins that starts with something visible; 0 where none does."""
    end = len(text)
    while (found := text.rfind("\n", 0, end)) >= 0:
        if found + 1 < len(text) and not text[found + 1].isspace():
            return found + 1
        end = found
    return 0


def iter_text_batches(
    path: Path, tokenizer: Tokenizer, batch_size: int, sequence_length: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets (B, T) that hold each of the file's tokens once as a target.

    Raises:
        DataError: the file cannot be read, or is not UTF-8.
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
