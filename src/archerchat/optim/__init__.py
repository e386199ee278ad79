"""Muon, AdamW and their schedules."""
