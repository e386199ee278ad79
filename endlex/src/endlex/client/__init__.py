"""The half of Endlex that runs beside the trainer: the standard library and nothing else."""
