"""What is left of Endlex's data after everything that can go wrong did: should be all of it.

    python benchmarks/endlex_faults.py
    python benchmarks/endlex_faults.py --kills 12 --outages 3 --checkpoint-gb 0.1 --cuts 6

kill -9 of trainer, shipper and server at random moments; a server that starts late, and outages;
30 % of all requests dropped, refused, cut in the body, or their answers lost; clocks that jump;
disks that fill up (skipped where a disk in memory cannot be mounted); a journal cut at every byte
of its last record; a large upload over a connection that is cut again and again. After each the
server is compared with the journal, by hash and point by point. The last line is one JSON object;
exits with 1 when anything is missing, is there twice, or the server failed by itself. The faults
are those of `endlex/tests/faults`, at length.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

FAULTS = Path(__file__).resolve().parents[1] / "endlex" / "tests" / "faults"
GB = 10**9


def main() -> int:
    options = parse_options()
    sys.path.insert(0, str(FAULTS))
    faults = importlib.import_module("fault_scenarios")
    uploads = importlib.import_module("fault_uploads")
    seed, say = options.seed, options.report
    scenarios: dict[str, Callable[[Path], Any]] = {
        "kill -9": lambda folder: faults.run_kills(folder, options.kills, seed, say),
        "outages": lambda folder: faults.run_outages(folder, options.outages, seed, say),
        "30 % of requests fail": lambda folder: faults.run_network_faults(
            folder, options.seconds, 0.3, seed
        ),
        "clock jumps": lambda folder: faults.run_clock_jumps(folder, 2000),
        "journal cut at every byte": faults.run_truncations,
        "server's disk full": lambda folder: faults.run_full_server(folder, seed),
        "trainer's disk full": faults.run_full_trainer,
    }
    outcomes = []
    print(f"{'fault':28} {'seconds':>8} {'points':>10} {'missing':>8} {'twice':>6}  whole")
    for name, run in scenarios.items():
        outcome, seconds = timed(options.folder, run, lambda outcome: outcome.is_whole)
        if outcome is None:
            print(f"{name:28} {'skipped: a disk in memory cannot be mounted here':>8}", flush=True)
            continue
        outcomes.append(outcome)
        found = outcome.difference
        missing = found.missing + outcome.lost_by_log
        print(
            f"{name:28} {seconds:8.1f} {found.points:10,} {missing:8,} {found.duplicated:6,}  "
            f"{'yes' if outcome.is_whole else 'NO'}",
            flush=True,
        )
    size = int(options.checkpoint_gb * GB)
    upload, seconds = timed(
        options.folder,
        lambda folder: uploads.run_checkpoint_cuts(folder, size, options.cuts, seed),
        is_sound,
    )
    print(f"upload of {size:,} bytes, {upload.cuts} cuts: {seconds:.1f} s")
    print(json.dumps({**asdict(upload), "parts_resent": upload.parts_resent}, indent=1))
    figures = faults.as_figures(outcomes, upload)
    figures["second_upload_share"] = upload.second_upload_share
    figures["visible_too_early"] = upload.visible_too_early
    figures["kills_by_process"] = outcomes[0].kills
    print(json.dumps(figures))
    whole = all(outcome.is_whole for outcome in outcomes)
    return 0 if whole and is_sound(upload) else 1


def is_sound(upload: Any) -> bool:
    """Whether an upload that was cut came whole, was seen only then, and sent little twice."""
    whole = upload.hashes_equal and not upload.visible_too_early and not upload.server_errors
    return whole and upload.parts_resent <= upload.cuts and upload.second_upload_share < 0.01


def timed(
    place: Path | None, run: Callable[[Path], Any], went_well: Callable[[Any], bool]
) -> tuple[Any, float]:
    """Run a scenario in a folder of its own; None where this machine does not allow it.

    The folder is removed when the scenario went well, and kept, and named, when it did not.
    """
    folder = Path(tempfile.mkdtemp(prefix="endlex-faults-", dir=place))
    began = time.monotonic()
    try:
        outcome = run(folder)
    except PermissionError:
        shutil.rmtree(folder)
        return None, 0.0
    except BaseException:
        print(f"failed; what was there is kept in {folder}", file=sys.stderr)
        raise
    finally:
        importlib.import_module("fault_processes").stop_all()
    if went_well(outcome):
        shutil.rmtree(folder)
    else:
        print(f"not whole; what was there is kept in {folder}", file=sys.stderr)
    return outcome, time.monotonic() - began


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Break Endlex, and count what is left.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--outages", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120.0, help="of failing requests")
    parser.add_argument("--checkpoint-gb", type=float, default=2.0)
    parser.add_argument("--cuts", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary one)")
    parser.add_argument("--verbose", action="store_true", help="say each kill and outage")
    options = parser.parse_args()
    options.report = (lambda text: print(text, file=sys.stderr)) if options.verbose else str
    return options


if __name__ == "__main__":
    sys.exit(main())
