"""Exports for other tools: `archerchat export huggingface`, `export conversations`, `push`."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import HfApi

from archerchat.checkpoint import find_checkpoint, load_checkpoint
from archerchat.commands.models import find_stages, size_text
from archerchat.config import Config, DtypeName, StageName
from archerchat.downloads import explained_hub
from archerchat.errors import CheckpointError, UsageError
from archerchat.exchange.huggingface import OURS, THEIRS, lost_parts, write_folder
from archerchat.home import Home
from archerchat.inference.loading import find_model_tokenizer, read_model_config
from archerchat.model.flops import count_parameters
from archerchat.report.document import build_environment
from archerchat.report.runs import SCORES, latest, load_results
from archerchat.tasks.base import TaskMixture
from archerchat.tasks.collected import JsonlTask
from archerchat.tasks.conversation import Layout, render_layout, write_lines
from archerchat.tasks.hub import TaskFiles
from archerchat.tasks.registry import MixtureConfig, build_mixtures


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Config):
    """Choose a model and its format."""

    tag: str
    """Name of the model."""
    stage: StageName | None = None
    """Stage to export: base, sft or rl. Defaults to the latest stage of the model."""
    step: int | None = None
    """Step of the checkpoint. Defaults to the latest."""
    format: Literal["archerchat", "transformers"] | None = None
    """Format of the folder. `transformers` is the library's own NanoChatForCausalLM, which has only
    some of the model's parts; `archerchat` adds its own model code. Defaults to `transformers` if
    the model has no other parts."""
    dtype: DtypeName | None = None
    """Dtype of the weights. Defaults to the checkpoint's own."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ExportOptions):
    """Write a model as a Hugging Face folder: `archerchat export huggingface TAG DIRECTORY`."""

    directory: Path
    """The folder to write, new or empty."""


@dataclass(frozen=True, kw_only=True)
class PushConfig(ExportOptions):
    """Export a model and upload it to the Hugging Face hub: `archerchat push TAG REPO`.

    Log in with `hf auth login` first. If the upload is interrupted, run the command again: complete
    files are not sent twice.
    """

    repo: str
    """Name of the repository, OWNER/NAME; created if missing."""
    public: bool = False
    """Upload to a public repository. By default a new repository is private, and an existing public
    one is refused."""


@dataclass(frozen=True)
class ConversationsConfig(Config):
    """Write conversations as JSON lines in a layout of other tools.

    `archerchat export conversations SOURCE FILE --layout sharegpt`
    """

    source: str
    """A file or folder of conversations in any layout, or a mixture such as Arithmetic:500."""
    file: Path
    """The file to write, which must be new."""
    layout: Layout = "openai"
    """`openai` (a list of messages), `sharegpt` or `alpaca`."""
    data_dir: Path | None = None
    """Folder with the tasks' files. By default they are downloaded once."""


def export_huggingface(config: ExportConfig, home: Home) -> None:
    """Write the folder and print its size."""
    _write(config, home, config.directory, config.directory.name)
    print(f"exported {config.tag} to {config.directory} ({size_text(config.directory)})")


def push(config: PushConfig, home: Home) -> None:
    """Upload the folder."""
    with tempfile.TemporaryDirectory(prefix="archerchat-push-") as temporary:
        directory, api = Path(temporary) / "model", HfApi()
        message = f"Upload {config.tag} from ArcherChat"
        _write(config, home, directory, config.repo)
        with explained_hub(config.repo):
            api.create_repo(config.repo, private=not config.public, exist_ok=True)
            private = api.model_info(config.repo).private
        if not (private or config.public):
            raise UsageError(
                f"{config.repo} already exists and everyone can see it: add --public to upload to "
                "it, or choose another name"
            )
        with explained_hub(config.repo):
            done = api.upload_folder(
                repo_id=config.repo, folder_path=directory, commit_message=message
            )
    print(f"pushed {config.tag} to {config.repo}: {done.commit_url}")


def _write(options: ExportOptions, home: Home, directory: Path, name: str) -> None:
    """Export a model to `directory`; users will load it by `name`."""
    if options.dtype == "float16":
        raise UsageError("--dtype float16: its squared ReLUs overflow; choose bfloat16 or float32")
    model = find_stages(home, options.tag, options.stage)[-1]
    stage, path = model.parent.name, find_checkpoint(model, options.step)
    checkpoint = load_checkpoint(path, sections=("model",))
    config, tokenizer = read_model_config(checkpoint), find_model_tokenizer(home, checkpoint)
    usual = OURS if lost_parts(config) else THEIRS
    model_type = {"archerchat": OURS, "transformers": THEIRS, None: usual}[options.format]
    results, loop = load_results(home, stage, options.tag), None
    with suppress(CheckpointError):  # an imported model has none
        loop = load_checkpoint(path, sections=("loop",)).state["loop"]
    environment = build_environment(Path(__file__).parent)
    card = environment.get_template("model_card.md").render(
        name=name,
        stage=stage,
        step=checkpoint.step,
        meta=checkpoint.meta,
        config=config,
        parameters=count_parameters(config).total,
        parts=[part.partition(" (")[0].replace("_", " ") for part in lost_parts(config)],
        ours=model_type == OURS,
        loop=loop,
        results=[found for kind in SCORES if (found := latest(results, kind))],
        scores=SCORES,
    )
    write_folder(
        directory,
        checkpoint.state["model"],
        config,
        tokenizer,
        card,
        about={"stage": stage, "step": checkpoint.step, "tokenizer": tokenizer.fingerprint},
        model_type=model_type,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
    )


def export_conversations(config: ConversationsConfig, home: Home) -> None:
    """Write one line per conversation."""
    if config.file.exists():
        raise UsageError(f"{config.file} already exists: choose another name, or delete it first")
    rows: JsonlTask | TaskMixture
    if Path(config.source).exists():
        rows = JsonlTask(Path(config.source))
    else:
        mixture = MixtureConfig(mixture=config.source, data_dir=config.data_dir)
        files = TaskFiles(home.cache_dir / "tasks", config.data_dir, notify=print)
        rows, _ = build_mixtures(mixture, files)
    chosen = (rows[index] for index in range(len(rows)))
    write_lines(config.file, (render_layout(row, config.layout) for row in chosen))
    print(f"wrote {len(rows):,} conversations to {config.file}")
