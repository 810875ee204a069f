"""What makes the embedded weights: the miniature Stable Diffusion of `mini_sd/`, and the judge of `toyworld/`."""
