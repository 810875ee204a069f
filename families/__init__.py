"""The diffusion families: one folder each."""
