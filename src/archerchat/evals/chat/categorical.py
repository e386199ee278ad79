"""Answer multiple-choice questions: the letter with the greatest logit where the answer begins.

Nothing is generated. Prompts of similar length run as one batch padded on the right, and logits
are formed for the last token of each alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from archerchat.errors import DataError
from archerchat.inference.prefill import iter_batches, prefill
from archerchat.model.transformer import Transformer
from archerchat.tokenizer.bpe import Tokenizer


def letter_token(tokenizer: Tokenizer, letter: str) -> int:
    """Return the one token that an answer of this letter is.

    Raises:
        DataError: it takes several.
    """
    ids = tokenizer.encode(letter)
    if len(ids) != 1:
        raise DataError(
            f"the letter {letter!r} takes {len(ids)} tokens, so its logit is not to be compared: "
            "give the choices single letters or digits"
        )
    return ids[0]


def choose_letters(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    letters: Sequence[Sequence[str]],
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Return the letter that the model prefers after each prompt; the first on ties.

    Args:
        prompts: token ids up to where the assistant is to speak.
        letters: each prompt's choices.
        on_progress: called after each batch with how many prompts are done.
    """
    chosen = [""] * len(prompts)
    done = 0
    for batch in iter_batches([len(prompt) for prompt in prompts]):
        logits = prefill(model, [prompts[i] for i in batch]).last_logits().cpu()
        for row, index in zip(logits, batch, strict=True):
            choices = letters[index]
            tokens = [letter_token(tokenizer, letter) for letter in choices]
            chosen[index] = choices[int(row[tokens].argmax())]
        done += len(batch)
        on_progress(done)
    return chosen
