"""The words of a command line as flags: `--key value` or `--key=value`, and bare words where a command takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from my.config.describe import describe, quoted, unknown
from my.config.options import Option
from my.errors import UserError

ANSWERS = ("-h", "--help", "--version")  # flags that are answered at once, whatever else is given


def split_argv(
    argv: Sequence[str], options: Mapping[str, Option], positional: str | None
) -> dict[str, str | list[str]]:
    """Return {name: text} of the flags in `argv`, or the one of ANSWERS alone that comes first.

    positional: the option that gets the list of the words outside flags; None where there must be none.
    Raises UserError for an unknown flag, a flag without a value or one that is given twice, and an unexpected word.
    """
    found: dict[str, str | list[str]] = {}
    bare, words = [], iter(argv)
    for word in words:
        if word in ANSWERS:
            return {word: ""}
        if not word.startswith("--"):
            if positional is None or word.startswith("-"):
                raise UserError(
                    f"unexpected word {quoted(word)}: options are --key value, and a value with spaces needs quotes"
                )
            bare.append(word)
            continue
        name, equals, text = word[2:].partition("=")
        name = name.replace("σ", "sigma")  # as some published flags are spelled
        if name not in options:
            raise UserError(f"--{name}: {unknown(name, options, '--')}")
        if name in found:
            raise UserError(f"--{name} is given twice; give it once")
        text = text if equals else next(words, "--")
        if not equals and text.startswith("--"):
            raise UserError(f"--{name} needs a value: {describe(options[name].kind)}")
        found[name] = text
    if bare and positional is not None:
        if positional in found:
            raise UserError(f"--{positional} is given twice: as words and as a flag; give it once")
        found[positional] = bare
    return found
