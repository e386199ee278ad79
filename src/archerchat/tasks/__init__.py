"""Conversations for training and evaluation: data sets, JSONL files, generated ones."""
