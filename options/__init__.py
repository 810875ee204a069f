"""The options of each command that leaves a run."""
