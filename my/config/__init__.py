"""Typed configuration."""

from my.config.layers import *  # noqa: F403
