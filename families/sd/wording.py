"""Numbers in messages, with the noun and the verb that fit them."""

from __future__ import annotations


def several(n: int, noun: str) -> str:
    """Return a number and its noun: "1 layer", "3 layers"."""
    return f"{n} {noun}{'s' * (n != 1)}"


def share(n: int, total: int, noun: str) -> str:
    """Return how many things of several: "its only layer", "1 of its 3 layers"."""
    return f"its only {noun}" if n == total == 1 else f"{n} of its {several(total, noun)}"


def verb(n: int, singular: str, plural: str) -> str:
    """Return the form of a verb that fits the number."""
    return singular if n == 1 else plural
