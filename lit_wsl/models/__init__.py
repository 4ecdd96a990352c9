"""The older import paths, kept for users who have them in their notes; nothing else."""
