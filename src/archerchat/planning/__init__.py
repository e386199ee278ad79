"""Estimates of the memory, time and cost that training a depth takes."""
