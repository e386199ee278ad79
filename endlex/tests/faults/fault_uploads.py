"""A large checkpoint over a connection that is cut again and again, and what that cost."""

from __future__ import annotations

import threading
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from fault_checks import ask, download_digest, write_random_file
from fault_processes import RECOVERY_SECONDS, ServerProcess, TrainerProcess
from fault_proxy import FaultProxy, part_cuts

from endlex.protocol import PART_BYTES


@dataclass
class Upload:
    """What an upload with cuts did."""

    cuts: int
    bytes: int
    parts: int
    bytes_resent: int
    """Bytes that went on to the server beyond the file's own."""
    second_upload_share: float
    """Bytes that an identical second upload sent, of the file's."""
    visible_too_early: int
    """How often a file could be had before the checkpoint was published."""
    hashes_equal: bool
    server_errors: int

    @property
    def parts_resent(self) -> int:
        """Parts' worth of bytes that were sent again, rounded up."""
        return -(-self.bytes_resent // PART_BYTES)


def run_checkpoint_cuts(folder: Path, size: int, cuts: int, seed: int = 0) -> Upload:
    """Upload a checkpoint over a connection that is cut in mid-part, then the same again."""
    model = folder / "model.bin"
    expected = write_random_file(model, size)
    parts = -(-size // PART_BYTES)
    share = min(0.9, 2 * cuts / (parts + cuts))
    with (
        ServerProcess(folder / "data", "--min-free-gb", "0.001") as server,
        FaultProxy(server.port, part_cuts(seed, cuts, share), seed) as proxy,
    ):
        trainer = TrainerProcess(
            folder / "run", proxy.url, "--save", str(model), "--name", "first", "--steps", "2"
        )
        trainer.start()
        trainer.wait_for_step(0)
        watcher = _Watcher(server.url, trainer.run_id, "first")
        with watcher:
            trainer.wait_for_end()
            trainer.wait_for_shipper_s_end(RECOVERY_SECONDS + size / 2**21)
        sent = sum(proxy.seen.part_bytes.values())
        made = proxy.seen.faults["cut-body"]
        again = TrainerProcess(
            folder / "run", proxy.url, "--save", str(model), "--name", "second", "--steps", "4"
        )
        again.start()
        again.wait_for_end()
        again.wait_for_shipper_s_end(RECOVERY_SECONDS)
        run = trainer.run_id
        digests = {download_digest(server.url, run, name) for name in ("first", "second")}
        upload = Upload(
            cuts=made,
            bytes=size,
            parts=parts,
            bytes_resent=sent - size,
            second_upload_share=(sum(proxy.seen.part_bytes.values()) - sent) / size,
            visible_too_early=watcher.too_early,
            hashes_equal=digests == {expected},
            server_errors=proxy.seen.server_errors,
        )
    return upload


class _Watcher:
    """Ask all the time whether a file of a checkpoint can be had before all of it is there."""

    def __init__(self, url: str, run: str, name: str) -> None:
        self._url, self._run, self._name = url, run, name
        self.too_early = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Watcher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def _watch(self) -> None:
        where = f"/runs/{self._run}/checkpoints/{self._name}"
        while not self._stop.wait(0.05):
            there = _first_byte_is_there(f"{self._url}/api/v1{where}/files/model.bin")
            if there and ask(self._url, where)["state"] != "published":
                self.too_early += 1


def _first_byte_is_there(address: str) -> bool:
    request = urllib.request.Request(address, headers={"Range": "bytes=0-0"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return bool(answer.read())
    except OSError:
        return False
