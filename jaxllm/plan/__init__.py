"""Plans: a run's own programs, compiled for hardware that is not there."""
