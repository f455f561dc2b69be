"""Stages as jobs of a Slurm cluster: planned, submitted, watched, started again, accounted for."""
