"""Captions of the toy world, and prompts read back into a colour and an object."""

from __future__ import annotations

from my.errors import UserError, shown, some

from .words import COLORS, NAMES, UNSEEN_PAIRS

SPOKEN = (
    "a",
    "an",
    "the",
    "view",
    "of",
    "front",
    "left",
    "right",
    "back",
    "backside",
    "side",
    "high",
    "overhead",
)  # words of captions besides colour and object
ALL_PAIRS = tuple((color, obj) for obj in NAMES for color in COLORS)
TRAIN_PAIRS = tuple(pair for pair in ALL_PAIRS if pair not in UNSEEN_PAIRS)


def caption(color: str, obj: str, view: str = "") -> str:
    """Return e.g. "left side view of a blue duck"; `view` is a prompt of `pose.view_prompt`."""
    return f"{view} a {color} {obj}".strip()


def parse_prompt(prompt: str) -> tuple[str, str]:
    """Return the (color, object) that a prompt names.

    Raises ValueError, listing the world's words, unless it names exactly one of each.
    """
    words = prompt.lower().replace(",", " ").replace(".", " ").split()
    colors, objects = ([w for w in words if w in known] for known in (COLORS, NAMES))
    if len(colors) != 1 or len(objects) != 1:
        raise ValueError(
            f'the toy world knows prompts such as "a blue duck", got {shown(prompt)!r}; '
            f"colours: {' '.join(COLORS)}; objects: {' '.join(NAMES)}"
        )
    return colors[0], objects[0]


def read_prompt(prompt: str, flag: str) -> tuple[str, str]:
    """Return the (color, object) that a prompt names; `flag` is the option that gave the prompt.

    Raises UserError, which begins with `flag`, unless the prompt names exactly one of each. Words that the toy world
    does not know are refused too, because the result would not show them.
    """
    try:
        color, obj = parse_prompt(prompt)
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from None
    unknown = [w for w in prompt.lower().replace(",", " ").replace(".", " ").split() if w not in {color, obj, *SPOKEN}]
    if unknown:
        raise UserError(
            f"{flag}: the toy world has no {some(map(repr, unknown))}, and would draw {caption(color, obj)!r}: "
            "ask for that, or for other words give a real checkpoint with --family sd"
        )
    return color, obj
