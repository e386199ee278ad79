"""What a depth takes: memory, time, cost."""
