"""The reference's two small models, and a home in which training one takes a second."""

from __future__ import annotations

import functools
import gc
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor

from archerchat.checkpoint import list_checkpoints
from archerchat.cli import main
from archerchat.exchange.nanochat import CONFIG_NAMES, NAMES, to_archerchat_names
from archerchat.exchange.weights import rename
from archerchat.files import write_json
from archerchat.home import Home
from archerchat.model.attention import Backend
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Transformer
from archerchat.planning.peak_flops import CACHE_FILE, cache_key
from archerchat.runtime import DTYPES, build_runtime
from archerchat.tokenizer.bpe import Tokenizer, train_tokenizer


def signal_this_process(number: signal.Signals) -> None:
    """Send a signal as a terminal does, and wait until it is here: another thread may take it."""
    arrived, here = os.pipe()
    os.set_blocking(here, False)
    before = signal.set_wakeup_fd(here)
    try:
        os.kill(os.getpid(), number)
        os.read(arrived, 1)
    finally:  # its handler may raise
        signal.set_wakeup_fd(before)
        os.close(arrived)
        os.close(here)


def to_nanochat_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of our state dict as the reference saves them."""
    return rename(state, {ours: theirs for theirs, ours in NAMES.items()})


@dataclass(frozen=True)
class ModelGolden:
    """One of the oracle's models: what it is and what the reference computed with it."""

    config: ModelConfig
    weights: dict[str, Tensor]
    """Float32, under our names."""
    io: dict[str, Tensor]
    """Inputs, targets, logits, losses, activations; gradients under the reference's names."""
    facts: dict[str, Any]
    """The JSON beside it: counts, FLOPs, generations, gradient statistics."""

    def build(self, dtype: torch.dtype = torch.float32, backend: Backend = "matmul") -> Transformer:
        """Return the model with these weights."""
        model = Transformer(self.config, dtype, backend)
        model.load_state_dict(self.weights)
        return model


@pytest.fixture(scope="session")
def load_model_golden(oracle_dir: Path) -> Callable[[str], ModelGolden]:
    """Load a model golden by its name, once a session."""

    @functools.cache
    def load(name: str) -> ModelGolden:
        facts = json.loads((oracle_dir / f"{name}.json").read_text())
        scales = facts["int8_scales"]
        stored = load_file(oracle_dir / f"{name}.safetensors")
        weights = {k: tensor.float() * scales.get(k, 1.0) for k, tensor in stored.items()}
        return ModelGolden(
            config=ModelConfig(**{CONFIG_NAMES[k]: v for k, v in facts["config"].items()}),
            weights=to_archerchat_names(weights),
            io=load_file(oracle_dir / f"{name}_io.safetensors"),
            facts=facts,
        )

    return load


@pytest.fixture(scope="session", params=["model_a", "model_b_gqa"])
def model_golden(
    request: pytest.FixtureRequest, load_model_golden: Callable[[str], ModelGolden]
) -> ModelGolden:
    """Each model golden in turn; the second has grouped queries and a padded vocabulary."""
    return load_model_golden(request.param)


TINY_MODEL = {
    "depth": 2,
    "aspect-ratio": 16,
    "head-dim": 16,
    "max-seq-len": 64,
    "data": "tiny",
    "tokenizer": "tiny",
    "model-tag": "tiny",
    "device": "cpu",
    "dtype": "float32",
    "device-batch-size": 4,
    "total-batch-size": 512,
    "num-iterations": 4,
    "eval-tokens": 512,
    "eval-every": 2,
    "save-every": 2,
    "compile": False,
}


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: a second helps no tiny model, and waits on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class TinyHome(Home):
    """A home with a corpus of 40 KB and a tokenizer of 360 ids, and the commands that use it."""

    def copy(self, to: Path) -> TinyHome:
        return TinyHome(shutil.copytree(self.root, to))

    def run(self, *words: str) -> int:
        """Run a command in this process, on one thread, and return its exit code."""
        with pytest.MonkeyPatch.context() as patch, one_thread():
            patch.setenv("ARCHERCHAT_HOME", str(self.root))
            return main(words)

    def pretrain_words(self, **changes: object) -> list[str]:
        """Return a command of a fraction of a second; `changes` by flag."""
        given = {name.replace("_", "-"): value for name, value in changes.items()}
        words = ["pretrain"]
        for name, value in (TINY_MODEL | given).items():
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            else:
                words += [f"--{name}", str(value)]
        return words

    def pretrain(self, **changes: object) -> int:
        return self.run(*self.pretrain_words(**changes))

    def steps(self, tag: str = "tiny") -> list[int]:
        return list_checkpoints(self.checkpoint_dir("base", tag))

    def listing(self) -> dict[str, tuple[int, bytes]]:
        """Return the time and the content of every file."""
        files = (path for path in self.root.rglob("*") if path.is_file())
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture(scope="session", autouse=True)
def _frozen() -> Iterator[None]:
    """What was imported stays frozen (the root's `conftest.py`), whatever a training run does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        yield


@pytest.fixture(scope="session")
def _simulated_once() -> Iterator[None]:
    """The simulation of a packing, half the time of a tiny run, happens once for each corpus."""
    from archerchat.data import text_sample  # Parquet, which other tests do without

    simulate = functools.cache(text_sample.simulate_best_fit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            text_sample, "simulate_best_fit", lambda lengths, row: simulate(tuple(lengths), row)
        )
        yield


def build_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], None]) -> Path:
    """Return a folder that `build` fills once, for all the processes of a test run."""
    folder = factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        folder = folder.parent
    with FileLock(folder / f"{name}.lock"):
        if not (folder / name).exists():
            build(folder / f"{name}.partial")
            (folder / f"{name}.partial").rename(folder / name)
    return folder / name


@pytest.fixture(scope="session")
def tiny_template(tmp_path_factory: pytest.TempPathFactory, _simulated_once: None) -> TinyHome:
    """What every `tiny_home` starts from."""
    return TinyHome(build_once(tmp_path_factory, "tiny", build_tiny_home))


def build_tiny_home(root: Path) -> None:
    from archerchat.data.shards import write_shards  # Parquet, which other tests do without

    home = TinyHome(root)
    random = Random(0)
    words = ["".join(random.choices("abcdefghijklmnop", k=random.randint(2, 7))) for _ in range(60)]
    documents = [" ".join(random.choices(words, k=random.randint(0, 40))) for _ in range(400)]
    documents[7] = " ".join(random.choices(words, k=500))  # longer than a row
    write_shards(
        documents, home.data_dir("tiny"), documents_per_row_group=32, documents_per_shard=150
    )
    train_tokenizer(documents, 360).save(home.tokenizer_dir("tiny"))
    runtime = build_runtime("cpu", "float32")
    entry = {"flops_per_second": 1e11, "shape": [512, 512, 512], "dtype": "float32"}
    with one_thread():
        keys = [cache_key(replace(runtime, compute_dtype=dtype)) for dtype in DTYPES.values()]
    write_json(home.cache_dir / CACHE_FILE, dict.fromkeys(keys, entry))


@pytest.fixture(scope="session")
def trained_template(tiny_template: TinyHome, tmp_path_factory: pytest.TempPathFactory) -> TinyHome:
    """What every `trained_home` starts from."""

    def train(root: Path) -> None:
        assert tiny_template.copy(root).pretrain() == 0

    return TinyHome(build_once(tmp_path_factory, "trained", train))


@pytest.fixture
def tiny_home(tiny_template: TinyHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyHome:
    """A home of the test's own, which its child processes find in the environment."""
    home = tiny_template.copy(tmp_path / "home")
    monkeypatch.setenv("ARCHERCHAT_HOME", str(home.root))
    return home


@pytest.fixture
def trained_home(trained_template: TinyHome, tmp_path: Path) -> TinyHome:
    """A home where the four steps of `pretrain()` are done."""
    return trained_template.copy(tmp_path / "home")


@dataclass(frozen=True)
class Scripted:
    """A model that always says the same: each token decides the next, whatever came before."""

    model: Transformer
    tokenizer: Tokenizer

    def ids(self, words: Sequence[str]) -> list[int]:
        """Return the tokens of special names and texts."""
        found = []
        for word in words:
            special = word.startswith("<|")
            found += [self.tokenizer.special_id(word)] if special else self.tokenizer.encode(word)
        return found


@pytest.fixture(scope="session")
def scripted() -> Callable[[Sequence[str]], Scripted]:
    """Build a model that greedily goes through these words, no token among them twice.

    Its blocks add nothing, so that only the last token counts; `####` is one token.
    """
    ranks = {bytes([value]): value for value in range(256)} | {b"##": 256, b"####": 257}
    tokenizer = Tokenizer(ranks)

    def build(words: Sequence[str]) -> Scripted:
        model = Transformer(ModelConfig(128, tokenizer.vocab_size, 2, 2, 2, 128), backend="matmul")
        model.init_weights(0)
        found = Scripted(model, tokenizer)
        script = found.ids(words)
        assert len(set(script)) == len(script), "a token can have one successor only"
        with torch.no_grad():
            model.unembedding.weight.zero_()
            for token, following in pairwise(script):
                direction = model.token_embedding.weight[token]
                model.unembedding.weight[following] = direction / direction.norm()
        model.requires_grad_(False)
        return found

    return build


COMMAND = """
import atexit, os, sys, torch
from archerchat.cli import main
os.environ.clear()
os.environ.update(environment)
for number, path in enumerate(outputs, start=1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
torch.set_num_threads(1)
exec(before)
sys.argv = ["archerchat", *words]
try:
    code = main()
finally:
    atexit._run_exitfuncs()
sys.exit(code)
"""
"""What a process of `archerchat` does, after its imports."""
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "archerchat.training.rl", "archerchat.training.sft"])
SPAWNS = multiprocessing.get_context("spawn")
"""A Python of its own, with another order of sets: what forks of one process never differ in."""


@dataclass
class Child:
    """A process that runs a command, forked from one that has imported torch: no seconds to start.

    Killed, interrupted and waited for as any other; its exit code is that of the command.
    """

    process: Any
    out: Path
    err: Path
    """The same file as `out` where a command's two streams are not told apart."""

    def output(self) -> str:
        """Return what it has printed so far."""
        return self.out.read_text() if self.out.exists() else ""

    def wait(self, seconds: float = 600) -> int:
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running: {self.output()}"
        return int(self.process.exitcode)

    def wait_for(self, found: Callable[[], Any]) -> Any:
        """Wait until `found()` is true, while the process lives; return its value."""
        deadline = time.monotonic() + 600
        while not (value := found()):
            assert self.process.is_alive() or found(), self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.003)
        return value

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """Start `archerchat` in a process of its own, on one thread; none outlives the test.

    `before` is code that changes something of the package first.
    """
    children: list[Child] = []

    def start(
        words: Sequence[str],
        parts: bool = False,
        context: Any = FORKS,
        before: str = "",
        **environment: str,
    ) -> Child:
        out = tmp_path / f"process-{len(children)}.out"
        err = out.with_suffix(".err") if parts else out
        given = {
            "words": list(words),
            "before": before,
            "environment": os.environ | environment,
            "outputs": [str(out), str(err)],
        }
        process = context.Process(target=exec, args=(COMMAND, given))
        process.start()
        children.append(Child(process, out, err))
        return children[-1]

    yield start
    for child in children:
        child.process.kill()
        child.process.join()


@pytest.fixture
def run_ranks(launch: Callable[..., Child]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command on some ranks as torchrun does: if one fails, the others are ended.

    `own` has further words and another environment for a rank.
    """

    def run(
        home: Home, ranks: int, words: Sequence[str], own: Mapping[int, Any] = {}
    ) -> subprocess.CompletedProcess[str]:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        shared = {"ARCHERCHAT_HOME": str(home.root), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": port, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        children = []
        for rank in range(ranks):
            more, changes = own.get(rank, ([], {}))
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            context = SPAWNS if 0 < rank == ranks - 1 else FORKS
            environment = shared | place | changes
            children.append(launch([*words, *more], True, context, **environment))
        waiting = {child.process.sentinel: child for child in children}
        code = 0
        while waiting:
            ended = multiprocessing.connection.wait(list(waiting), 300)
            assert ended, [child.output() for child in children]
            for sentinel in ended:
                code = waiting.pop(sentinel).wait() or code
            if code:
                for child in waiting.values():
                    child.process.terminate()
        out = "".join(child.out.read_text() for child in children)
        err = "".join(child.err.read_text() for child in children)
        return subprocess.CompletedProcess(list(words), code, out, err)

    return run
