"""ArcherChat: tokenizer, pretraining, evaluation and chat in one small repository."""

__version__ = "0.1.0"
