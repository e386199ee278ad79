"""`archerchat import nanochat DIR`: turn the reference's checkpoint and tokenizer into ours."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from archerchat.checkpoint import list_checkpoints, save_checkpoint
from archerchat.config import Config, PositiveFloat
from archerchat.console import build_console
from archerchat.errors import TokenizerError, UsageError
from archerchat.exchange.nanochat import TOKENIZER_FILE, ImportedModel, load_model, load_tokenizer
from archerchat.home import Home
from archerchat.model.config import ModelConfig
from archerchat.tokenizer.bpe import Tokenizer


@dataclass(frozen=True)
class ImportNanochatConfig(Config):
    """Import a model and its tokenizer from nanochat."""

    directory: Path
    """nanochat's checkpoint directory, which holds model_<step>.pt and meta_<step>.json."""
    tokenizer: Path | None = None
    """Directory with its tokenizer.pkl; by default DIRECTORY, then ../../tokenizer from there."""
    tag: str | None = None
    """What to call the model and its tokenizer; by default the directory's name."""
    step: int | None = None
    """Which step to import; by default the latest."""
    stage: Literal["base", "sft", "rl"] = "base"
    """What kind of model it is."""
    qk_gain: PositiveFloat = ModelConfig.qk_gain
    """Factor on normalised queries and on keys, which nanochat's files do not tell."""


def import_nanochat(config: ImportNanochatConfig, home: Home) -> None:
    """Import one step as a checkpoint without optimizer state, and the tokenizer if it is found.

    Everything is read and checked before anything is written.

    Raises:
        UsageError: the files are not there, or the tag is taken.
        CheckpointError: the checkpoint is broken or of an unknown version.
        TokenizerError: the tokenizer is broken, or not the model's.
    """
    source = config.directory.resolve()
    tag = source.name if config.tag is None else config.tag
    target = home.checkpoint_dir(config.stage, tag)
    if steps := list_checkpoints(target):
        raise UsageError(
            f"{config.stage} model {tag!r} is there already ({target}, step {steps[-1]}): "
            "choose another --tag, or delete it first"
        )
    model = load_model(source, config.step, config.qk_gain)
    tokenizer = _find_tokenizer(config.tokenizer, source)
    if tokenizer is not None:
        _save_tokenizer(tokenizer, model, tag, home)
    meta = {
        "model_config": asdict(model.config),
        "tokenizer": tokenizer and {"name": tag, "fingerprint": tokenizer.fingerprint},
        "source": f"nanochat {model.path}",
        "stage": config.stage,
        "nanochat_meta": model.meta,
    }
    path = save_checkpoint(target, model.step, {"model": model.tensors}, meta)
    _report(build_console(), model, tokenizer, path)


def _find_tokenizer(given: Path | None, source: Path) -> Tokenizer | None:
    places = [source, source.parent.parent / "tokenizer"] if given is None else [given]
    for place in places:
        if (file := place / TOKENIZER_FILE).is_file():
            return load_tokenizer(file)
    if given is not None:
        raise UsageError(f"no {TOKENIZER_FILE} in {given}: give the directory that holds it")
    return None


def _save_tokenizer(tokenizer: Tokenizer, model: ImportedModel, tag: str, home: Home) -> None:
    if tokenizer.vocab_size != model.config.vocab_size:
        raise TokenizerError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model "
            f"{model.config.vocab_size}: give the one it was trained with (--tokenizer)"
        )
    directory = home.tokenizer_dir(tag)
    if directory.exists():
        if Tokenizer.load(directory).fingerprint != tokenizer.fingerprint:
            raise UsageError(f"{directory} is another tokenizer: choose another --tag")
        return
    tokenizer.save(directory)


def _report(
    console: Console, model: ImportedModel, tokenizer: Tokenizer | None, path: Path
) -> None:
    parameters = sum(tensor.numel() for tensor in model.tensors.values())
    console.print(
        f"imported step {model.step}: {model.config.num_layers} layers, width "
        f"{model.config.model_dim}, {parameters:,} parameters: {path}"
    )
    if tokenizer is None:
        console.print("no tokenizer.pkl was found: give its directory with --tokenizer to use text")
    if model.lacking:
        console.print(
            f"it has no {', '.join(model.lacking)}, as older versions do not: they are switched "
            "off. Such a version may differ in more than its tensors (--qk-gain, for one): check "
            "the model's bits per byte before using it"
        )
