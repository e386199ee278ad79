"""The transformer, its attention, its loss; imports torch and itself, nothing else."""
