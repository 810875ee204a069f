"""The embedded miniature Stable Diffusion: its weights, and the scripts that made them."""
