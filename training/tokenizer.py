"""A CLIP tokenizer with a closed vocabulary: every caption word is one token."""

import json

END_OF_WORD = "</w>"
MAX_LENGTH = 16


def byte_pair_merges(words):
    """Return (vocabulary, merges) under which byte-pair encoding gives one token for each word.

    Each word is first split by the merges so far; what is left is merged from the left. Later
    merges have lower priority, so that they never undo the words before.
    """
    vocabulary, merges = [], []
    for word in words:
        symbols = [*word[:-1], word[-1] + END_OF_WORD]
        vocabulary += [s for s in symbols if s not in vocabulary]
        symbols = _apply(symbols, merges)
        while len(symbols) > 1:
            merges.append((symbols[0], symbols[1]))
            symbols[:2] = ["".join(symbols[:2])]
            vocabulary.append(symbols[0])
    return list(dict.fromkeys(vocabulary)), merges


def _apply(symbols, merges):
    for a, b in merges:
        i = 0
        while i + 1 < len(symbols):
            if (symbols[i], symbols[i + 1]) == (a, b):
                symbols[i : i + 2] = [a + b]
            i += 1
    return symbols


def build(words, folder):
    """Write a CLIPTokenizer for `words` to `folder` and return it, reloaded.

    The words are also listed under "closed_vocabulary" in its configuration, by which a loader can
    refuse prompts that the model cannot know. Raises ValueError if a word is not one token.
    """
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = byte_pair_merges(words)
    specials = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate([*vocabulary, *specials])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        model_max_length=MAX_LENGTH,
        closed_vocabulary=list(words),
    )
    tokenizer.save_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    split = [w for w in words if len(tokenizer(w).input_ids) != 3]
    if split:
        raise ValueError(f"not one token each: {' '.join(split)}")
    return tokenizer
