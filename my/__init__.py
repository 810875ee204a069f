"""What every command needs: configuration, errors, seeds, checkpoints, files of a run, media."""
