"""ArcherChat: tokenizer, pretraining, evaluation and chat in one small repository.

`from archerchat import load` gives a model to use from Python (`inference/chat.py`).
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """Import what belongs to the API when it is first used, since torch takes seconds."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module("archerchat.inference.chat").load
