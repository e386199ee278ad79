"""Pictures, histograms and files: kept by content, readable by others' tools."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import endlex
from endlex.client.log import encode_image
from endlex.reading import read_run


@pytest.fixture
def run(tmp_path: Path) -> endlex.Run:
    return endlex.init("p", "d4", directory=tmp_path / "run")


def records(run: endlex.Run, kind: str) -> list[dict[str, Any]]:
    assert run.directory is not None
    return [record for record in read_run(run.directory) if record["type"] == kind]


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 3), (4, 6, 4), (3, 40, 60)])
def test_arrays_become_png(shape: tuple[int, ...]) -> None:
    pixels = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    content, mime = encode_image(pixels)
    expected = pixels.transpose(1, 2, 0) if shape[0] == 3 else pixels
    assert mime == "image/png"
    decoded = np.asarray(Image.open(io.BytesIO(content)))
    assert np.array_equal(decoded, expected.squeeze())
    as_floats, _ = encode_image(pixels / 255.0)
    assert as_floats == content


def test_equal_files_are_kept_once_and_named_by_their_content(
    run: endlex.Run, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    from matplotlib.figure import Figure

    figure = Figure()
    figure.add_subplot().plot([1, 2, 3])
    sound = tmp_path / "a.wav"
    sound.write_bytes(b"RIFF")
    run.log_image("figure", figure, step=3, caption="loss")
    run.log_image("pil", Image.new("RGB", (2, 2)), step=3)
    run.log_image("tensor", torch.zeros(3, 8, 8, dtype=torch.bfloat16), step=3)
    for step in (1, 2):
        run.log_file("sound", sound, step=step)
    run.log_image("bad", np.zeros(3))
    run.log_image("gone", tmp_path / "gone.png")
    assert set(run.refused) == {"bad", "gone"}
    found = records(run, "media")
    assert [(m["name"], m["kind"], m["step"]) for m in found] == [
        ("figure", "image", 3),
        ("pil", "image", 3),
        ("tensor", "image", 3),
        ("sound", "audio", 1),
        ("sound", "audio", 2),
    ]
    assert found[0]["caption"] == "loss"
    assert found[3]["parts"] == [{"sha256": hashlib.sha256(b"RIFF").hexdigest(), "bytes": 4}]
    assert run.directory is not None
    assert len(list((run.directory / "media").iterdir())) == 4


def test_histograms_are_tables_of_low_high_and_count(run: endlex.Run) -> None:
    run.log_histogram("weights", [0.0, 0.1, 1.0, float("nan")], bins=2, step=1)
    run.log_histogram("counts", [3, 4], edges=[0, 1, 5], step=1)
    run.log_histogram("empty", [], step=1)
    first, second = records(run, "table")
    assert first["columns"] == ["low", "high", "count"]
    assert first["rows"] == [[0.0, 0.5, 2], [0.5, 1.0, 1]]
    assert second["rows"] == [[0, 1, 3], [1, 5, 4]]
    assert "empty" in run.refused
