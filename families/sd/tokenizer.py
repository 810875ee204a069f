"""CLIP's tokenizer, from the byte-pair merges that come with the project."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

MERGES = Path(__file__).parent / "clip_merges.txt.gz"
LENGTH = 77  # CLIP's text encoders read this many tokens
START, END = "<|startoftext|>", "<|endoftext|>"


def byte_characters() -> list[str]:
    """Return the 256 printable characters that stand for bytes, in the order of CLIP's vocabulary.

    A byte that is printable in Latin-1 stands for itself. The other bytes get the characters from code point 256 on.
    Source: the byte-level byte-pair encoding of GPT-2, which CLIP (arXiv 2103.00020) uses.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def clip_tokenizer(pad: str = END, length: int = LENGTH) -> Any:
    """Return transformers' CLIPTokenizer.

    `pad` is END for Stable Diffusion 1.x, and "!", token 0, for 2.x. `length` is the number of tokens that the text
    encoder reads; LongCLIP's (arXiv 2403.15378) reads 248.
    """
    from transformers import CLIPTokenizer

    merges = gzip.decompress(MERGES.read_bytes()).decode("utf-8").split("\n")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    characters = byte_characters()
    tokens = [*characters, *(c + "</w>" for c in characters), *map("".join, pairs), START, END]
    make: Any = CLIPTokenizer  # its declared type lacks pairs of words as merges, which it takes
    return make(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=pairs,
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=pad,
        model_max_length=length,
    )
