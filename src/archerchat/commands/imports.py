"""Import other people's models: `archerchat import nanochat`, `import huggingface` and `pull`."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from archerchat.checkpoint import list_checkpoints, save_checkpoint
from archerchat.config import STAGES, Config, PositiveFloat, StageName
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


@dataclass(frozen=True, kw_only=True)
class ImportOptions(Config):
    """Name a model, and say what it is."""

    tag: str | None = None
    """Name for the model and its tokenizer. Defaults to the directory's or the repository's."""
    stage: StageName | None = None
    """Stage of the model: base, sft or rl. Defaults to the one that the folder names, or base."""


@dataclass(frozen=True)
class ImportNanochatConfig(ImportOptions):
    """Import a model and its tokenizer from nanochat."""

    directory: Path
    """nanochat's checkpoint directory, which holds model_<step>.pt and meta_<step>.json."""
    tokenizer: Path | None = None
    """Directory that holds tokenizer.pkl. Defaults to DIRECTORY or its ../../tokenizer."""
    step: int | None = None
    """Step to import. Defaults to the latest."""
    qk_gain: PositiveFloat = ModelConfig.qk_gain
    """Factor on normalised queries and keys; nanochat's files do not record it."""


@dataclass(frozen=True)
class ImportHuggingFaceConfig(ImportOptions):
    """Import a Hugging Face folder: `archerchat import huggingface DIRECTORY`.

    The folder was written by `archerchat export huggingface`, or holds transformers'
    NanoChatForCausalLM.
    """

    directory: Path
    """Folder with config.json, tokenizer.json and the weights."""


@dataclass(frozen=True)
class PullConfig(ImportOptions):
    """Download a model from the Hugging Face hub and import it.

    `archerchat pull REPO`
    """

    repo: str
    """Name of the repository, OWNER/NAME."""
    revision: str | None = None
    """Branch, tag or commit. Defaults to the main branch."""


def import_nanochat(config: ImportNanochatConfig, home: Home) -> None:
    """Import one step, with the optimizer's state and the tokenizer if they are found."""
    source = config.directory.resolve()
    target = _find_place(home, config.stage, source.name if config.tag is None else config.tag)
    model = load_model(source, config.step, config.qk_gain)
    default = (source, source.parent.parent / "tokenizer")
    places = default if config.tokenizer is None else (config.tokenizer,)
    files = [file for place in places if (file := place / TOKENIZER_FILE).is_file()]
    if config.tokenizer is not None and not files:
        raise UsageError(f"no {TOKENIZER_FILE} in {places[0]}: give the directory that holds it")
    tokenizer, optimizer = load_tokenizer(files[0]) if files else None, load_optimizer(model)
    meta = {"source": f"nanochat {model.path}", "nanochat_meta": model.meta}
    _save(home, target, model, tokenizer, meta, optimizer)
    if tokenizer is None:
        print("no tokenizer.pkl was found: to use text, import again with --tokenizer")
    print(f"optimizer state: {'imported' if optimizer else 'none was found'}")
    if model.lacking:
        print(
            f"the checkpoint is of an older version without {', '.join(model.lacking)}: these "
            "are switched off. The version may differ in other ways, such as --qk-gain, so check "
            "the model's bits per byte before you use it"
        )


def import_huggingface(config: ImportHuggingFaceConfig, home: Home) -> None:
    """Import the model and the tokenizer of a Hugging Face folder."""
    source = config.directory.resolve()
    about = read_about(source)
    named = about.get("stage") if about.get("stage") in STAGES else None
    target = _find_place(home, config.stage or named, config.tag or source.name)
    model, tokenizer = read_folder(source), load_hf_tokenizer(source, {"source": "huggingface"})
    if about.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UsageError(
            f"{source / 'tokenizer.json'} is not the tokenizer that the model was exported with: "
            "its ids differ. Copy it again"
        )
    _save(home, target, model, tokenizer, {"source": f"huggingface {source.name}"})


def pull(config: PullConfig, home: Home) -> None:
    """Download a repository into the hub's own cache and import it."""
    tag = config.tag or config.repo.rpartition("/")[2]
    if config.stage:
        _find_place(home, config.stage, tag)  # raises before anything is downloaded
    with explained_hub(config.repo):
        kinds = ["*.json", "*.safetensors"]
        found = snapshot_download(config.repo, revision=config.revision, allow_patterns=kinds)
    import_huggingface(ImportHuggingFaceConfig(Path(found), tag=tag, stage=config.stage), home)


def _find_place(home: Home, stage: str | None, tag: str) -> Path:
    """Return the directory for a model's checkpoints, which must not have any."""
    target = home.checkpoint_dir(stage or "base", tag)
    if steps := list_checkpoints(target):
        raise UsageError(
            f"{target.parent.name} model {tag!r} already exists ({target}, step {steps[-1]}): "
            "choose another --tag, or delete it first"
        )
    return target


def _save(
    home: Home,
    target: Path,
    model: ImportedModel,
    tokenizer: Tokenizer | None,
    meta: dict[str, Any],
    optimizer: dict[str, Any] | None = None,
) -> None:
    """Write the tokenizer, unless it exists, and the checkpoint, or neither."""
    config, tag, tensors = model.config, target.name, model.tensors
    sections = {"model": tensors} | ({"optimizer": optimizer} if optimizer else {})
    meta |= {"model_config": asdict(config), "tokenizer": None, "stage": target.parent.name}
    with ExitStack() as undo:
        if tokenizer is not None:
            meta["tokenizer"] = {"name": tag, "fingerprint": tokenizer.fingerprint}
            if tokenizer.vocab_size != config.vocab_size:
                raise UsageError(
                    f"the tokenizer has {tokenizer.vocab_size} tokens and the model "
                    f"{config.vocab_size}: give the one it was trained with (--tokenizer)"
                )
            directory = home.tokenizer_dir(tag)
            if not directory.exists():
                tokenizer.save(directory)
                undo.callback(remove_directory, directory)
            elif Tokenizer.load(directory).fingerprint != tokenizer.fingerprint:
                raise UsageError(f"{directory} holds a different tokenizer: choose another --tag")
        path = save_checkpoint(target, model.step, sections, meta)
        undo.pop_all()
    parameters = sum(tensor.numel() for tensor in tensors.values())
    print(
        f"imported step {model.step}: {config.num_layers} layers, width {config.model_dim}, "
        f"{parameters:,} parameters: {path}"
    )
