"""Write a tokenizer as Hugging Face's `tokenizer.json`, and read one that encodes as ours would.

In this format a special token is recognised in any text that spells it, where ArcherChat never
reads one from text. Exported names begin with `MARK`, a code point that Unicode reserves for no
character: ordinary text does not hold it, and the chat template removes it from messages. The
template writes the mark before each special token, and decoding leaves it out.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from archerchat.errors import TokenizerError, UsageError
from archerchat.files import UNREADABLE
from archerchat.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer

TOKENIZER_FILE = "tokenizer.json"
MARK = "\ufdd0"
_KEPT = [*range(33, 127), *range(161, 173), *range(174, 256)]
_MOVED = [byte for byte in range(256) if byte not in _KEPT]
CHARACTERS = {byte: chr(byte) for byte in _KEPT} | {b: chr(256 + i) for i, b in enumerate(_MOVED)}
"""The visible character that stands for each byte in the file."""
BYTES = {character: byte for byte, character in CHARACTERS.items()}


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of a `tokenizer.json`; encoding with special tokens adds BOS in front."""
    lengths = tokenizer.token_bytes
    names = {i: MARK + tokenizer.token(i).decode() for i, n in enumerate(lengths) if n == 0}
    ranks = {tokenizer.token(i): i for i, n in enumerate(lengths) if n}
    flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False}
    flags["normalized"] = False
    bos, pattern = names[tokenizer.bos_id], {"Regex": tokenizer.pattern}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = False
    without_mark = {"type": "Replace", "pattern": {"String": MARK}, "content": ""}
    begin = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": each, "type_id": 0}} for each in "AB")
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": name} | flags for i, name in names.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, first],
            "pair": [begin, first, second],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": [without_mark, byte_level]},
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {_spell(token): rank for token, rank in ranks.items()},
            "merges": _merges(ranks),
        },
    }


def load_hf_tokenizer(directory: Path, provenance: dict[str, Any]) -> Tokenizer:
    """Read a `tokenizer.json` of byte-level BPE.

    Raises:
        UsageError: it is missing or broken, or gives other ids than ArcherChat can.
    """
    path = directory / TOKENIZER_FILE
    try:
        content = json.loads(path.read_bytes())
        given, added = _parts(content), {t["id"]: t["content"] for t in content["added_tokens"]}
        ranks = {bytes(map(BYTES.__getitem__, token)): i for token, i in given["vocab"].items()}
        steps = content["pre_tokenizer"]["pretokenizers"]
        (pattern,) = (step["pattern"]["Regex"] for step in steps if step["type"] == "Split")
        names = [*dict.fromkeys(added[i].removeprefix(MARK) for i in sorted(added))]
        if missing := [name for name in SPECIAL_TOKENS if name not in names]:
            raise TokenizerError(f"it lacks {missing[0]}")
        tokenizer = Tokenizer(ranks, pattern=pattern, special_tokens=names, provenance=provenance)
        ours = _parts(tokenizer_json(tokenizer))
        if differing := [name for name in given | ours if given.get(name) != ours.get(name)]:
            raise TokenizerError(f"it differs in {', '.join(differing)}")
    except (*UNREADABLE, KeyError, TypeError, AttributeError, TokenizerError) as error:
        raise UsageError(
            f"{path} cannot be used with the same ids here ({error}): restore the tokenizer that "
            "the model was exported with"
        ) from error
    return tokenizer


def _parts(content: dict[str, Any]) -> dict[str, Any]:
    """Return what decides about ids, by name; special tokens in the vocabulary count once."""
    added, model = content["added_tokens"], content["model"]
    names = {token["content"] for token in added}
    return {
        **{name: setting for name, setting in model.items() if setting},  # others are switched off
        "merges": [each.split(" ") if isinstance(each, str) else each for each in model["merges"]],
        "vocab": {token: rank for token, rank in model["vocab"].items() if token not in names},
        "added_tokens": sorted(token["id"] for token in added),
        **{name: content[name] for name in ("normalizer", "pre_tokenizer")},
    }


def _spell(token: bytes) -> str:
    return "".join(CHARACTERS[byte] for byte in token)


def _merges(ranks: dict[bytes, int]) -> list[list[str]]:
    """Return the two parts that each token was merged from, in the order of the ranks.

    A token that no merges produce is left out; it is found only as a whole piece.
    """
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
            first = pairs.index(min(pairs))
            if pairs[first] == len(ranks):
                break
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        if len(parts) == 2:
            merges.append([_spell(part) for part in parts])
    return merges
