"""Where runs are made, and how many at once: here, on a Ray cluster, as jobs of SLURM."""
