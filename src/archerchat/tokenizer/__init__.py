"""Byte-level BPE and the chat format."""
