"""What an example's prompts share, and what has to be run to score them.

The tokens that all options begin with are the trunk, which is run once; what follows it in each
option is a branch. A token's logits come from the position before it, so no prompt's last token
is run: the options of "Answer: A" have no branch at all and take their logits from the trunk's
end. A prompt of language modelling is a trunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from archerchat.evals.core.prompts import Ids, Prompt, common_prefix


@dataclass(frozen=True)
class Tree:
    """One example, ready to run."""

    index: int
    """Of the example."""
    trunk: Ids
    branches: tuple[Ids, ...]
    """Those that are not empty."""
    branch: Ids
    """For each scored token, the branch that its logits come from; -1 is the trunk."""
    offset: Ids
    """For each, the position there."""
    target: Ids
    option: Ids
    """For each, the option that it counts for."""
    num_options: int

    @property
    def tokens(self) -> int:
        """Tokens of the trunk and all branches."""
        return len(self.trunk) + sum(map(len, self.branches))

    @property
    def first_scored(self) -> int:
        """The earliest position of the trunk that has to give logits; its length if none has."""
        inside = self.offset[self.branch < 0]
        return int(inside.min()) if len(inside) else len(self.trunk)


def build_tree(index: int, prompts: Sequence[Prompt]) -> Tree:
    """Cut an example's prompts into a trunk and branches."""
    inputs = [prompt.token_ids[:-1] for prompt in prompts]
    length = common_prefix(inputs)
    branches: list[Ids] = []
    branch, offset, target, option = [], [], [], []
    for number, (prompt, row) in enumerate(zip(prompts, inputs, strict=True)):
        sources = np.arange(prompt.start - 1, len(row))
        beyond = sources >= length
        branch.append(np.where(beyond, len(branches), -1))
        offset.append(sources - length * beyond)
        target.append(prompt.token_ids[prompt.start :])
        option.append(np.full(len(sources), number))
        if len(row) > length:
            branches.append(row[length:])
    return Tree(
        index,
        trunk=inputs[0][:length],
        branches=tuple(branches),
        branch=np.concatenate(branch).astype(np.int32),
        offset=np.concatenate(offset).astype(np.int32),
        target=np.concatenate(target).astype(np.int32),
        option=np.concatenate(option).astype(np.int32),
        num_options=len(prompts),
    )
