"""What a prompt must not contain: syntax of web UIs, and words that a closed vocabulary lacks. No heavy imports."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from my.errors import UserError, note, shown

REFUSED = (  # a pattern, what it is, and what to do
    (
        r"<(?:lora|lyco):([^:<>]+)(:[^:<>]+)?[^<>]*>",
        "a LoRA inside a prompt",
        r"take it out, and give its file: --sd.lora \1.safetensors\2",
    ),
    (r"<hypernet:[^<>]+>", "a hypernetwork, which is not supported", "take it out"),
    (r"\bembedding:[^\s,]+", "a textual inversion, which is not supported", "describe it in words"),
)
PLAIN = (  # a pattern, and what web UIs take it for; here it does no harm, but it does not do what the user expects
    (r"\([^()]*:\s*[0-9]*\.?[0-9]+\s*\)", "a weight"),
    (r"\[[^\[\]]*:[^\[\]]*\]|\[[^\[\]]*\|[^\[\]]*\]", "a change of words while drawing"),
    (r"\b(?:BREAK|AND)\b", "a join of prompts"),
    (r"\(\(|\[\[|\{\{", "an emphasis"),
    (r"__\w+__", "a wildcard"),
)
WORDS = re.compile(r"\w+|[^\w\s]")  # a tokenizer of CLIP parts words and punctuation likewise
Told = Mapping[str, Sequence[str]]  # {option: the texts that it makes the model read}


def check(told: Told) -> None:
    """Raise UserError for a part of a prompt that asks for an unsupported file, and note what is read as plain words.

    `told` is {option: texts}: all texts that the model will be told.
    """
    for option, text in ((option, text) for option, texts in told.items() for text in texts):
        for pattern, what, to_do in REFUSED:
            if m := re.search(pattern, text, re.IGNORECASE):
                raise UserError(f"{option}: {shown(m[0])} is {what}; {shown(m.expand(to_do))}")
        for pattern, what in PLAIN:
            if m := re.search(pattern, text):
                note(f"{option}: {shown(m[0])} is {what} in web UIs; here it is read as plain words")
                break


def refuse_unknown_words(told: Told, tokenizer_config: Mapping[str, Any]) -> None:
    """Raise UserError for words in `told`, {option: texts}, that are not in the tokenizer's closed vocabulary.

    Only a tokenizer whose settings have the key `closed_vocabulary` has one, such as the embedded miniature's.
    """
    known: list[str] = tokenizer_config.get("closed_vocabulary") or []
    for option, texts in told.items() if known else ():
        unknown = sorted({w for text in texts for w in WORDS.findall(text.lower()) if w not in known})
        if not unknown:
            continue
        if not any(w.isalnum() for w in unknown):
            raise UserError(f"{option}: this model knows no {', '.join(map(repr, unknown))}; leave that out")
        raise UserError(
            f"{option}: this model has no word for {', '.join(map(repr, unknown))}; it knows: "
            f"{' '.join(w for w in known if w.isalnum())}; for other words give --sd.checkpoint PATH or --sd.variant v1"
        )
