"""After any fault the server equals the journal: nothing missing, nothing twice, no 5xx.

Short forms of what `benchmarks/endlex_faults.py` does at length, with the same code.
"""

from __future__ import annotations

import re
from pathlib import Path

import fault_scenarios as faults
import pytest
from fault_checks import compare
from fault_processes import ServerProcess, TrainerProcess
from fault_proxy import FaultProxy
from fault_uploads import run_checkpoint_cuts

SEED = 1
STREAKLESS_SEED = 44
"""Never fails one checkpoint so often in a row that the growing waits reach a minute, as 1 does."""


LAST_STEPS = re.compile(rb'"step":(18|19),"values"')


def silent(text: str) -> None:
    """Report nothing."""


@pytest.mark.slow
def test_a_comparison_sees_what_is_missing_and_what_is_twice(tmp_path: Path) -> None:
    """The check itself, on a server that holds something else than the journal."""
    server = ServerProcess(tmp_path / "data")
    server.start()
    with FaultProxy(server.port) as proxy:
        trainer = TrainerProcess(tmp_path / "run", proxy.url, "--steps", "20", "--pace", "0")
        trainer.start()
        trainer.wait_for_end()
        trainer.wait_for_shipper_s_end()
    assert compare(trainer.directory, server.url).hashes_equal
    path = sorted((trainer.directory / "journal").iterdir())[0]
    lines = path.read_bytes().splitlines(keepends=True)
    last = next(line for line in lines if b'"step":19,"values"' in line)
    path.write_bytes(b"".join([*lines, last.replace(b'"step":19', b'"step":20')]))
    more_here = compare(trainer.directory, server.url)
    assert (more_here.hashes_equal, more_here.missing, more_here.duplicated) == (False, 10, 0)
    path.write_bytes(b"".join(line for line in lines if not LAST_STEPS.search(line)))
    less_here = compare(trainer.directory, server.url)
    assert (less_here.hashes_equal, less_here.missing, less_here.duplicated) == (False, 0, 20)
    server.stop()


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_killed_at_random_moments(tmp_path: Path) -> None:
    outcome = faults.run_kills(tmp_path, 12, SEED, silent)
    assert all(outcome.kills.values())
    assert outcome.is_whole, outcome


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_late_server_and_outages(tmp_path: Path) -> None:
    outcome = faults.run_outages(tmp_path, 4, SEED, silent)
    assert outcome.is_whole, outcome


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_three_of_ten_requests_fail(tmp_path: Path) -> None:
    outcome = faults.run_network_faults(tmp_path, 12, 0.3, STREAKLESS_SEED)
    assert len(outcome.seen.faults) >= 3
    assert outcome.is_whole, outcome


@pytest.mark.slow
def test_a_clock_that_jumps(tmp_path: Path) -> None:
    outcome = faults.run_clock_jumps(tmp_path, 300)
    assert outcome.is_whole, outcome


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_journal_cut_at_every_byte_of_its_last_record(tmp_path: Path) -> None:
    outcome = faults.run_truncations(tmp_path)
    assert outcome.is_whole, outcome


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_the_server_s_disk_is_full(tmp_path: Path) -> None:
    try:
        outcome = faults.run_full_server(tmp_path, SEED)
    except PermissionError as error:
        pytest.skip(str(error))
    assert outcome.is_whole, outcome


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_the_trainer_s_disk_is_full(tmp_path: Path) -> None:
    try:
        outcome = faults.run_full_trainer(tmp_path)
    except PermissionError as error:
        pytest.skip(str(error))
    assert outcome.is_whole, outcome


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_an_upload_that_is_cut_resumes_and_is_never_seen_in_part(tmp_path: Path) -> None:
    upload = run_checkpoint_cuts(tmp_path, 6 * 2**24 + 12_345, 6, SEED)
    assert upload.cuts == 6
    assert upload.hashes_equal
    assert 0 <= upload.parts_resent <= upload.cuts
    assert upload.second_upload_share < 0.01
    assert upload.visible_too_early == 0
    assert upload.server_errors == 0
