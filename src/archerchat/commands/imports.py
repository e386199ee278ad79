"""Import other people's models: `archerchat import nanochat`, `import huggingface` and `pull`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download

from archerchat.checkpoint import list_checkpoints, save_checkpoint
from archerchat.config import Config, PositiveFloat
from archerchat.console import build_console
from archerchat.downloads import explained_hub
from archerchat.errors import UsageError
from archerchat.exchange.hf_tokenizer import load_hf_tokenizer
from archerchat.exchange.huggingface import read_about, read_folder
from archerchat.exchange.nanochat import TOKENIZER_FILE, load_model, load_optimizer, load_tokenizer
from archerchat.exchange.weights import ImportedModel
from archerchat.files import remove_directory
from archerchat.home import Home
from archerchat.model.config import ModelConfig
from archerchat.tokenizer.bpe import Tokenizer

StageName = Literal["base", "sft", "rl"]


@dataclass(frozen=True)
class ImportNanochatConfig(Config):
    """Import a model and its tokenizer from nanochat."""

    directory: Path
    """nanochat's checkpoint directory, which holds model_<step>.pt and meta_<step>.json."""
    tokenizer: Path | None = None
    """Directory that holds tokenizer.pkl. Defaults to DIRECTORY or its ../../tokenizer."""
    tag: str | None = None
    """Name for the model and its tokenizer. Defaults to the directory's name."""
    step: int | None = None
    """Step to import. Defaults to the latest."""
    stage: StageName = "base"
    """Stage of the model: base, sft or rl."""
    qk_gain: PositiveFloat = ModelConfig.qk_gain
    """Factor on normalised queries and keys; nanochat's files do not record it."""


@dataclass(frozen=True)
class ImportHuggingFaceConfig(Config):
    """Import a Hugging Face folder: `archerchat import huggingface DIRECTORY`.

    The folder was written by `archerchat export huggingface`, or holds transformers'
    NanoChatForCausalLM.
    """

    directory: Path
    """Folder with config.json, tokenizer.json and the weights."""
    tag: str | None = None
    """Name for the model and its tokenizer. Defaults to the directory's name."""
    stage: StageName | None = None
    """Stage of the model: base, sft or rl. Defaults to the one that the folder names, or base."""


@dataclass(frozen=True)
class PullConfig(Config):
    """Download a model from the Hugging Face hub and import it.

    `archerchat pull REPO`
    """

    repo: str
    """Name of the repository, OWNER/NAME."""
    tag: str | None = None
    """Name for the model and its tokenizer. Defaults to the repository's name."""
    stage: StageName | None = None
    """Stage of the model: base, sft or rl. Defaults to the one in the repository, or base."""
    revision: str | None = None
    """Branch, tag or commit. Defaults to the main branch."""


def import_nanochat(config: ImportNanochatConfig, home: Home) -> None:
    """Import one step, with the optimizer's state and the tokenizer if they are found."""
    source, console = config.directory.resolve(), build_console()
    tag = source.name if config.tag is None else config.tag
    _require_free(home, config.stage, tag)
    model = load_model(source, config.step, config.qk_gain)
    tokenizer, optimizer = _find_tokenizer(config.tokenizer, source), load_optimizer(model)
    meta = {"source": f"nanochat {model.path}", "nanochat_meta": model.meta}
    _save(home, config.stage, tag, model, tokenizer, optimizer, meta)
    if tokenizer is None:
        console.print("no tokenizer.pkl was found: to use text, import again with --tokenizer")
    console.print(f"optimizer state: {'imported' if optimizer else 'none was found'}")
    if model.lacking:
        console.print(
            f"the checkpoint is of an older version without {', '.join(model.lacking)}: these "
            "are switched off. The version may differ in other ways, such as --qk-gain, so check "
            "the model's bits per byte before you use it"
        )


def import_huggingface(config: ImportHuggingFaceConfig, home: Home) -> None:
    """Import the model and the tokenizer of a Hugging Face folder."""
    source = config.directory.resolve()
    tag, about = config.tag or source.name, read_about(source)
    said: str = about.get("stage", "")
    stage = config.stage or (said if said in ("base", "sft", "rl") else "base")
    _require_free(home, stage, tag)
    model = read_folder(source)
    tokenizer = load_hf_tokenizer(source, {"source": "huggingface"})
    if about.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UsageError(
            f"{source / 'tokenizer.json'} is not the tokenizer that the model was exported with: "
            "its ids differ. Copy it again"
        )
    _save(home, stage, tag, model, tokenizer, {}, {"source": f"huggingface {source.name}"})


def pull(config: PullConfig, home: Home) -> None:
    """Download a repository into the hub's own cache and import it."""
    tag = config.tag or config.repo.rpartition("/")[2]
    if config.stage:
        _require_free(home, config.stage, tag)
    with explained_hub(config.repo):
        kinds = ["*.json", "*.safetensors"]
        found = snapshot_download(config.repo, revision=config.revision, allow_patterns=kinds)
    import_huggingface(ImportHuggingFaceConfig(Path(found), tag, config.stage), home)


def _require_free(home: Home, stage: str, tag: str) -> None:
    target = home.checkpoint_dir(stage, tag)
    if steps := list_checkpoints(target):
        raise UsageError(
            f"{stage} model {tag!r} already exists ({target}, step {steps[-1]}): "
            "choose another --tag, or delete it first"
        )


def _find_tokenizer(given: Path | None, source: Path) -> Tokenizer | None:
    places = [source, source.parent.parent / "tokenizer"] if given is None else [given]
    for place in places:
        if (file := place / TOKENIZER_FILE).is_file():
            return load_tokenizer(file)
    if given is not None:
        raise UsageError(f"no {TOKENIZER_FILE} in {given}: give the directory that holds it")
    return None


def _save(
    home: Home,
    stage: str,
    tag: str,
    model: ImportedModel,
    tokenizer: Tokenizer | None,
    optimizer: dict[str, Any],
    meta: dict[str, Any],
) -> None:
    """Write the tokenizer and the checkpoint, or neither."""
    config, tensors = model.config, model.tensors
    sections = {"model": tensors} | ({"optimizer": optimizer} if optimizer else {})
    meta |= {
        "model_config": asdict(config),
        "tokenizer": tokenizer and {"name": tag, "fingerprint": tokenizer.fingerprint},
        "stage": stage,
    }
    with ExitStack() as undo:
        directory = home.tokenizer_dir(tag)
        if tokenizer is not None and _save_tokenizer(tokenizer, config.vocab_size, directory):
            undo.callback(remove_directory, directory)
        path = save_checkpoint(home.checkpoint_dir(stage, tag), model.step, sections, meta)
        undo.pop_all()
    parameters = sum(tensor.numel() for tensor in tensors.values())
    build_console().print(
        f"imported step {model.step}: {config.num_layers} layers, width {config.model_dim}, "
        f"{parameters:,} parameters: {path}"
    )


def _save_tokenizer(tokenizer: Tokenizer, vocab_size: int, directory: Path) -> bool:
    """Write the tokenizer of a model unless it exists; return whether it was written."""
    if tokenizer.vocab_size != vocab_size:
        raise UsageError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {vocab_size}: give the "
            "one it was trained with (--tokenizer)"
        )
    if not directory.exists():
        tokenizer.save(directory)
        return True
    if Tokenizer.load(directory).fingerprint != tokenizer.fingerprint:
        raise UsageError(f"{directory} holds a different tokenizer: choose another --tag")
    return False
