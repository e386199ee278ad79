"""What fine-tuning says of itself before it starts and when it ends."""

from __future__ import annotations

from rich.console import Console

from archerchat.runtime import dtype_name
from archerchat.tasks.base import TaskMixture
from archerchat.training.finetune_recipe import FinetuneRecipe
from archerchat.training.finetune_setup import Inheritance


def announce(
    console: Console,
    recipe: FinetuneRecipe,
    inherited: Inheritance,
    train: TaskMixture,
    val: TaskMixture,
) -> None:
    """Print what will run, and the choices that were made for the user."""
    base, runtime = recipe.meta["identity"]["base"], recipe.runtime
    length = recipe.model.config.sequence_length
    steps = recipe.num_iterations
    for line in (
        f"base       {base['tag']}, step {base['step']}; optimizer moments "
        f"{recipe.meta['moments']}",
        f"mixture    {len(train):,} conversations of {_names(train)}",
        f"validation {len(val):,} conversations of {_names(val)}",
        f"training   {f'{steps:,}' if steps else f'about {recipe.first_estimate:,}'} steps of "
        f"{inherited.total_batch_tokens:,} tokens ({inherited.grad_accum_steps} x "
        f"{inherited.device_batch_size} rows of {length})",
        f"device     {runtime.device_name}, {dtype_name(runtime.compute_dtype)} "
        f"({runtime.dtype_reason})",
        f"attention  {recipe.meta['attention']}",
    ):
        console.print(line)


def _names(mixture: TaskMixture) -> str:
    names = [task.name for task in mixture.tasks]
    counts = {name: names.count(name) for name in names}
    return ", ".join(f"{name} x{n}" if n > 1 else name for name, n in counts.items())


def tell_conversations(console: Console, recipe: FinetuneRecipe) -> None:
    """Print what became of the conversations."""
    counts, consumed = recipe.loader.counts, recipe.loader.consumed
    if not counts.targets:
        return
    more = consumed - recipe.loader.share
    used = f"{100 * recipe.loader.progress:.1f} % of the mixture"
    if more >= 0:
        used = "all of the mixture" + (f", and {more:,} again to fill the last step" * (more > 0))
    console.print(
        f"conversations: {consumed:,} used ({used}), {counts.cut:,} cut to a row, "
        f"{counts.dropped:,} dropped; {100 * counts.padding_share:.1f} % of the positions are "
        f"padding, {100 * counts.trained_share:.1f} % are learned from"
    )
