"""A CLIP tokenizer with a closed vocabulary: every caption word is one token."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from my.run_dir import write_atomic

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

END_OF_WORD = "</w>"
MAX_LENGTH = 16  # tokens per prompt, the two special ones included


def byte_pair_merges(words: Iterable[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Return (vocabulary, merges) under which byte-pair encoding gives one token for each word.

    Each word is first merged by the merges so far. What is left is merged from the left. Later merges have lower
    priority, so they never undo the words before them.
    """
    vocabulary: list[str] = []
    merges: list[tuple[str, str]] = []
    for word in words:
        symbols = [*word[:-1], word[-1] + END_OF_WORD]
        vocabulary += [s for s in symbols if s not in vocabulary]
        symbols = _apply(symbols, merges)
        while len(symbols) > 1:
            merges.append((symbols[0], symbols[1]))
            symbols[:2] = ["".join(symbols[:2])]
            vocabulary.append(symbols[0])
    return list(dict.fromkeys(vocabulary)), merges


def _apply(symbols: list[str], merges: Iterable[tuple[str, str]]) -> list[str]:
    """Merge the symbols of one word, in place, and return them."""
    for a, b in merges:
        i = 0
        while i + 1 < len(symbols):
            if (symbols[i], symbols[i + 1]) == (a, b):
                symbols[i : i + 2] = [a + b]
            i += 1
    return symbols


def build(words: Iterable[str], folder: Path) -> CLIPTokenizer:
    """Write a CLIPTokenizer for `words` to `folder`, read it back, and return it.

    The words are also listed under "closed_vocabulary" in its configuration. With that list a loader can refuse
    prompts that the model cannot know. Raises ValueError if a word is not one token.
    """
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    words = list(words)
    tokens, merges = byte_pair_merges(words)
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    write_atomic(folder / "vocab.json", json.dumps(vocabulary))
    write_atomic(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        model_max_length=MAX_LENGTH,
        closed_vocabulary=words,
    )
    tokenizer.save_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    split = [w for w in words if len(tokenizer(w).input_ids) != 3]
    if split:
        raise ValueError(f"not one token each: {' '.join(split)}")
    return tokenizer
