"""The process that sends what a run's directory holds, beside the trainer and after it."""
