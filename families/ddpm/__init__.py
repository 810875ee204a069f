"""Unconditional pixel-space pipelines of diffusers."""
