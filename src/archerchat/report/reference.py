"""The figures that a run is measured against: SPEC section 11, and GPT-2."""

from __future__ import annotations

from dataclasses import dataclass

GPT2_CORE = 0.256525
"""Of GPT-2 XL (1.5B parameters), SPEC section 9."""


@dataclass(frozen=True)
class Reference:
    """What the reference implementation reached at a depth; None is not recorded."""

    depth: int
    setting: str
    """Tokens, hardware, and what is special about the figures."""
    val_bpb: float
    core: float
    sft_val_bpb: float | None = None
    chatcore: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    minutes: float | None = None


REFERENCES = (
    Reference(
        8,
        "503M tokens, RTX 5060 Ti 16 GiB",
        val_bpb=0.938,
        core=0.0976,
        sft_val_bpb=0.4185,
        chatcore=0.2173,
        tokens_per_second=106_000,
        mfu=0.39,
        minutes=76.7,
    ),
    Reference(
        12,
        "1.32B tokens, RTX 5060 Ti 16 GiB; CORE on 200 examples a task",
        val_bpb=0.842,
        core=0.1542,
        sft_val_bpb=0.356,
        chatcore=0.2578,
        tokens_per_second=45_000,
        mfu=0.42,
        minutes=481,
    ),
    Reference(
        24,
        "ratio 8, fp8, eight H100; CORE is the mean of 5 runs",
        val_bpb=0.718,
        core=0.2626,
        minutes=99,
    ),
)


def find_reference(depth: int | None) -> Reference | None:
    """Return the reference's run of this depth, if one is recorded."""
    return next((each for each in REFERENCES if each.depth == depth), None)
