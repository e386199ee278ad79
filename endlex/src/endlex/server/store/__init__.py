"""Keep runs, journals, series and checkpoints on disk, and read them back."""
