"""OpenAI's guided-diffusion models on disk: the published ones, architectures read off shapes, and the networks."""
