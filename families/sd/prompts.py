"""What web UIs let a prompt state beyond its words, which Stable Diffusion itself does not read. Light to import."""

import re

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
PLAIN = (  # a pattern, and what it is: harmless, but not what the person meant
    (r"\([^()]*:\s*[0-9]*\.?[0-9]+\s*\)", "a weight"),
    (r"\[[^\[\]]*:[^\[\]]*\]|\[[^\[\]]*\|[^\[\]]*\]", "a change of words while drawing"),
    (r"\b(?:BREAK|AND)\b", "a join of prompts"),
    (r"\(\(|\[\[|\{\{", "an emphasis"),
    (r"__\w+__", "a wildcard"),
)


def check(prompts):
    """Raise UserError for what a prompt asks for and cannot have, and note what is read as plain words.

    `prompts` are {option: texts} of all that the model will be told.
    """
    for option, text in ((option, text) for option, texts in prompts.items() for text in texts):
        for pattern, what, to_do in REFUSED:
            if m := re.search(pattern, text, re.IGNORECASE):
                raise UserError(f"{option}: {shown(m[0])} is {what}; {shown(m.expand(to_do))}")
        for pattern, what in PLAIN:
            if m := re.search(pattern, text):
                note(f"{option}: {shown(m[0])} is {what} in web UIs; here it is read as plain words")
                break
