"""Images, sound, video and other files of a run: content-addressed parts, sent like checkpoints'.

    media/SHA256    a part that the server does not have yet

The journal names a file's parts; equal files are kept and sent once. Figures and arrays become PNG
images: of matplotlib, PIL, plotly (with kaleido), NumPy, torch and what else `numpy.asarray` takes.
"""

from __future__ import annotations

import hashlib
import io
import mimetypes
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from endlex.client.process import write_whole
from endlex.protocol import MEDIA_DIR, PART_BYTES, EndlexError, Part

PNG, OTHER = "image/png", "application/octet-stream"


def keep_media(directory: Path, content: bytes, mime: str, caption: str | None) -> dict[str, Any]:
    """Keep a file in a run's directory until it is sent; return what the journal says of it."""
    parts: list[Part] = []
    for start in range(0, len(content), PART_BYTES):
        part = content[start : start + PART_BYTES]
        digest = hashlib.sha256(part).hexdigest()
        parts.append({"sha256": digest, "bytes": len(part)})
        path = directory / MEDIA_DIR / digest
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_whole(path, part)
    kind = mime.partition("/")[0]
    kind = kind if kind in ("image", "audio", "video") else "file"
    return {"kind": kind, "mime": mime, "bytes": len(content), "parts": parts, "caption": caption}


def read_file(path: Path | str) -> tuple[bytes, str]:
    """Return a file's content, and its type by its name."""
    return Path(path).read_bytes(), mimetypes.guess_type(str(path))[0] or OTHER


def encode_image(image: Any) -> tuple[bytes, str]:
    """Return a picture's content and type.

    Args:
        image: a path, a figure, a PIL image, or an array of [H, W] or [H, W, 1, 3 or 4], of 0 to
            255 as uint8, else of 0 to 1; [3, H, W] as torch has it, too.

    Raises:
        EndlexError: it is none of these.
    """
    if isinstance(image, str | Path):
        return read_file(image)
    buffer = io.BytesIO()
    figure: Any = image if hasattr(image, "savefig") else getattr(image, "figure", None)
    if figure is not None and hasattr(figure, "savefig"):  # of matplotlib, or its axes
        figure.savefig(buffer, format="png")
    elif hasattr(image, "to_image") and hasattr(image, "to_json"):  # of plotly
        try:
            buffer.write(image.to_image(format="png"))
        except Exception:  # no kaleido here, or no browser for it: the figure's data is kept
            return image.to_json().encode(), "application/vnd.plotly.v1+json"
    elif hasattr(image, "save") and hasattr(image, "mode"):  # of PIL
        image.save(buffer, format="PNG")
    else:
        return _encode_array(image), PNG
    return buffer.getvalue(), PNG


def as_array(value: Any) -> Any:
    """Return numbers as a NumPy array, wherever they are."""
    try:
        import numpy as np
    except ModuleNotFoundError as error:
        raise EndlexError("arrays need NumPy: pip install numpy, or log a file") from error
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
    return np.asarray(value)


def _encode_array(image: Any) -> bytes:
    array = as_array(image)
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    array = array[:, :, None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or not array.size:
        raise EndlexError(f"an image is [H, W] or [H, W, 1, 3 or 4], not {list(array.shape)}")
    if array.dtype != "uint8":
        array = (array.astype("float64").clip(0, 1) * 255 + 0.5).astype("uint8")
    height, width, channels = array.shape
    rows = b"".join(b"\0" + row.tobytes() for row in array)
    color = {1: 0, 3: 2, 4: 6}[channels]
    head = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


HISTOGRAM = ["low", "high", "count"]
"""Columns of the tables that hold histograms."""


def count_values(values: Any, bins: int, edges: Sequence[float] | None) -> list[list[float]]:
    """Return a histogram's rows; non-finite values are left out.

    Args:
        edges: if given, `values` are the counts between them.

    Raises:
        EndlexError: there are no numbers, or the edges do not fit.
    """
    array = as_array(values).ravel()
    if edges is None:
        import numpy as np

        finite = array[np.isfinite(array)]
        if not len(finite):
            raise EndlexError(f"none of the {len(array):,} values is finite")
        counts, limits = np.histogram(finite, bins)
    else:
        counts, limits = array, as_array(edges)
        if len(limits) != len(counts) + 1:
            raise EndlexError(f"{len(counts)} counts need {len(counts) + 1} edges")
    low, high = limits[:-1].tolist(), limits[1:].tolist()
    return [list(row) for row in zip(low, high, counts.tolist(), strict=True)]
