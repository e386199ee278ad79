"""Sharing examples out over ranks and adding up what they found."""

from __future__ import annotations

import pytest
import torch

from archerchat.distributed import Ranks, joined_ranks, rank_share
from archerchat.runtime import build_runtime


@pytest.mark.parametrize("count", [0, 1, 5, 16, 1319])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_example_has_one_rank(count: int, world_size: int) -> None:
    shares = [rank_share(count, rank, world_size) for rank in range(world_size)]
    assert sorted(index for share in shares for index in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_needs_no_group() -> None:
    with joined_ranks(build_runtime("cpu", "float32")) as ranks:
        assert ranks == Ranks()
        assert list(ranks.share(3)) == [0, 1, 2]
        counts = torch.tensor([1, 2])
        assert ranks.sum(counts) is counts
        assert ranks.first_alone(lambda: "done") == "done"
    assert not torch.distributed.is_initialized()
