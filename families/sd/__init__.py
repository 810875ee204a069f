"""Stable Diffusion checkpoints: where they are, what they are, and the five parts that are loaded from them."""
