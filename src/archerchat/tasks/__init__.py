"""Conversations to learn from and to be examined on: data sets, JSONL files, generated ones."""
