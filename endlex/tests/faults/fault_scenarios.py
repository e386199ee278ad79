"""The faults themselves, each a function that breaks things and returns what was left of the data.

Every scenario works in a folder of its own, with a real server, a real trainer and the shipper that
the trainer starts. The tests run them short, `benchmarks/endlex_faults.py` long.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_checks import (
    Difference,
    ask,
    compare,
    download_digest,
    logged_steps_in_journal,
    write_random_file,
)
from fault_processes import (
    RECOVERY_SECONDS,
    START_SECONDS,
    ServerProcess,
    TrainerProcess,
    small_disk,
    wait_until,
)
from fault_proxy import FaultProxy, Seen, always_pass, random_faults
from fault_uploads import Upload

from endlex.client.transfers import sync_directory
from endlex.client.transport import Transport
from endlex.client.verify import compare_directory
from endlex.reading import session_files

Report = Callable[[str], None]


@dataclass
class Outcome:
    """What a scenario did, and what was wrong in the end."""

    kills: dict[str, int] = field(default_factory=dict)
    outages: int = 0
    difference: Difference = field(default_factory=lambda: Difference(0, 0, True, 0))
    lost_by_log: int = 0
    """Steps that `log` returned from and that no journal has."""
    checkpoints: int = 0
    """That the server has published."""
    not_verified: list[str] = field(default_factory=list)
    """Why the machine could not be torn down in the end."""
    seen: Seen = field(default_factory=Seen)

    @property
    def is_whole(self) -> bool:
        """Whether nothing is missing, nothing is there twice, and the server never failed."""
        same = self.difference.hashes_equal and not self.difference.duplicated
        whole = not (self.difference.missing or self.lost_by_log or self.seen.server_errors)
        return same and whole and not self.not_verified and self.difference.points > 0


def run_kills(folder: Path, kills: int, seed: int = 0, report: Report = print) -> Outcome:
    """kill -9 of trainer, shipper and server, at random moments, each started again."""
    chance = random.Random(seed)
    outcome = Outcome(kills={"trainer": 0, "shipper": 0, "server": 0})
    with ServerProcess(folder / "data") as server, FaultProxy(server.port) as proxy:
        trainer = TrainerProcess(folder / "run", proxy.url, "--save-every", "300")
        trainer.start()
        trainer.wait_for_step(0)
        while sum(outcome.kills.values()) < kills:
            time.sleep(chance.uniform(0.02, 1.5))
            victim = chance.choice(list(outcome.kills))
            if victim == "trainer":
                trainer.kill()
                trainer.start()
            elif victim == "shipper":
                if not trainer.kill_shipper():
                    continue
                if chance.random() < 0.5:  # else the trainer's next session starts it
                    trainer.start_shipper()
            else:
                server.kill()
                server.start(wait=False)
            outcome.kills[victim] += 1
            report(f"kill {sum(outcome.kills.values())} of {kills}: {victim}")
        wait_until("the server answers", server.answers)
        _finish(trainer, server, proxy, outcome)
    return outcome


def run_outages(folder: Path, outages: int, seed: int = 0, report: Report = print) -> Outcome:
    """A server that starts only after the run's end, then one that is gone again and again."""
    chance = random.Random(seed)
    server = ServerProcess(folder / "data")
    outcome = Outcome(outages=1)
    with FaultProxy(server.port) as proxy:
        trainer = TrainerProcess(folder / "run", proxy.url)
        trainer.start()
        trainer.wait_for_step(50)
        trainer.finish()
        server.start()
        trainer.start()
        while outcome.outages < outages:
            trainer.wait_for_step(trainer.steps_logged + 20)
            server.kill()
            time.sleep(chance.uniform(0.05, 2.0))
            server.start()
            outcome.outages += 1
            report(f"outage {outcome.outages} of {outages}")
        _finish(trainer, server, proxy, outcome)
    server.stop()
    return outcome


def run_network_faults(folder: Path, seconds: float, share: float = 0.3, seed: int = 0) -> Outcome:
    """A share of all requests fails: dropped, 503, cut in the body, or the answer lost."""
    outcome = Outcome()
    with (
        ServerProcess(folder / "data") as server,
        FaultProxy(server.port, random_faults(seed, share), seed) as proxy,
    ):
        trainer = TrainerProcess(folder / "run", proxy.url, "--save-every", "1000")
        trainer.start()
        time.sleep(seconds)
        _finish(trainer, server, proxy, outcome)
    return outcome


def run_clock_jumps(folder: Path, steps: int) -> Outcome:
    """A trainer whose clock jumps by up to an hour, in both directions, at every record."""
    outcome = Outcome()
    with ServerProcess(folder / "data") as server, FaultProxy(server.port) as proxy:
        trainer = TrainerProcess(folder / "run", proxy.url, "--jump-clock", "--pace", "0")
        trainer.start()
        trainer.wait_for_step(steps)
        _finish(trainer, server, proxy, outcome)
        run = trainer.run_id
        by_time = ask(server.url, f"/runs/{run}/series", metric="train/metric_0", x="time")
        assert by_time["series"]["train/metric_0"]["count"] == outcome.difference.points // 10
    return outcome


def run_full_server(folder: Path, seed: int = 0) -> Outcome:
    """The server's disk fills up with a checkpoint, and has space again a while later."""
    outcome = Outcome()
    model = folder / "model.bin"
    expected = write_random_file(model, 40 * 2**20)
    data = folder / "disk" / "data"
    with (
        small_disk(folder / "disk", 24) as resize,
        ServerProcess(data, "--min-free-gb", "0.002", log=folder / "data.log") as server,
        FaultProxy(server.port, seed=seed) as proxy,
    ):
        trainer = TrainerProcess(folder / "run", proxy.url, "--save", str(model), "--name", "large")
        trainer.start()
        full = proxy.seen.server_statuses
        wait_until("the server says that its disk is full", lambda: full[507] > 0)
        trainer.wait_for_step(trainer.steps_logged + 200)
        resize(200)
        _finish(trainer, server, proxy, outcome)
        digest = download_digest(server.url, trainer.run_id, "large")
        assert digest == expected, digest
    return outcome


def run_full_trainer(folder: Path) -> Outcome:
    """The trainer's disk fills up under its journal, and has space again a while later."""
    outcome = Outcome()
    with (
        small_disk(folder / "disk", 1) as resize,
        ServerProcess(folder / "data") as server,
        FaultProxy(server.port) as proxy,
    ):
        trainer = TrainerProcess(
            folder / "disk" / "run", proxy.url, "--pace", "0.0002", notes=folder
        )
        trainer.start()
        wait_until(
            "the trainer says that its disk is full", lambda: "cannot write" in _text(trainer.log)
        )
        trainer.wait_for_step(trainer.steps_logged + 200)
        resize(64)
        trainer.wait_for_step(trainer.steps_logged + 200)
        _finish(trainer, server, proxy, outcome)
    return outcome


def run_truncations(folder: Path) -> Outcome:
    """The journal's last record cut after every byte of it, sent and compared each time."""
    outcome = Outcome()
    with ServerProcess(folder / "data") as server, FaultProxy(server.port) as proxy:
        trainer = TrainerProcess(folder / "run", None, "--steps", "20")
        trainer.start()
        trainer.wait_for_end()
        (path,) = session_files(trainer.directory)
        whole = path.read_bytes().splitlines(keepends=True)[:-1]  # as if killed before `finish`
        transport = Transport(proxy.url)
        kept = b"".join(whole[:-1])
        for cut in range(len(whole[-1]) + 1):
            path.write_bytes(kept + whole[-1][:cut])
            sync_directory(trainer.directory, transport)
            assert compare_directory(trainer.directory, transport).missing == [], (
                f"cut at byte {cut}"
            )
        transport.close()
        outcome.difference = compare(trainer.directory, server.url)
        outcome.seen = proxy.seen
    return outcome


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _finish(
    trainer: TrainerProcess, server: ServerProcess, proxy: FaultProxy, outcome: Outcome
) -> None:
    """End the run, wait until the shipper has ended by itself, and compare both sides."""
    trainer.finish()
    trainer.wait_for_shipper_s_end(RECOVERY_SECONDS)
    if not compare(trainer.directory, server.url).hashes_equal:  # its shipper was killed at last
        trainer.start_shipper()
        time.sleep(0.5)
        trainer.wait_for_shipper_s_end(RECOVERY_SECONDS)
    proxy.decide = always_pass
    outcome.not_verified = _verified(trainer.directory, proxy.url)
    outcome.checkpoints = len(ask(server.url, f"/runs/{trainer.run_id}/checkpoints"))
    outcome.difference = compare(trainer.directory, server.url)
    outcome.lost_by_log = logged_steps_in_journal(trainer.directory, trainer.steps_logged)
    outcome.seen = proxy.seen


def _verified(directory: Path, url: str) -> list[str]:
    """Why the machine cannot be torn down, once nothing is at work there."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        missing = compare_directory(directory, Transport(url)).missing
        if not any(m.kind == "live" for m in missing) or time.monotonic() > deadline:
            return [str(m) for m in missing]
        time.sleep(0.1)  # a shipper that was started as the one before it ended


def as_figures(outcomes: list[Outcome], upload: Upload | None) -> dict[str, Any]:
    """Sum outcomes up into what the benchmark prints as its last line."""
    return {
        "kills": sum(sum(o.kills.values()) for o in outcomes),
        "outages": sum(o.outages for o in outcomes),
        "missing": sum(o.difference.missing + o.lost_by_log for o in outcomes),
        "duplicated": sum(o.difference.duplicated for o in outcomes),
        "parts_resent": upload.parts_resent if upload else 0,
        "cuts": upload.cuts if upload else 0,
        "checkpoints": sum(o.checkpoints for o in outcomes),
        "not_verified": sum(len(o.not_verified) for o in outcomes),
        "points": sum(o.difference.points for o in outcomes),
        "requests_failed": sum(sum(o.seen.faults.values()) for o in outcomes),
        "server_errors": sum(o.seen.server_errors for o in outcomes)
        + (upload.server_errors if upload else 0),
        "hashes_equal": all(o.difference.hashes_equal for o in outcomes)
        and (upload is None or upload.hashes_equal),
    }
