"""CLIP (arXiv 2103.00020): pictures and texts as points of one sphere, and what their distances say of a result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from families.libraries import reason
from my.errors import UserError, note, shown
from retrieval import pictures, texts
from retrieval.files import INSTEAD, NOT_WEIGHTS, Found
from retrieval.measures import measures

Parts = Any  # the networks and the tokenizer are of transformers, whose types do not declare what these have
BATCH = 16  # pictures or texts that the network reads at once
LEGACY_EOS = 2  # an `eos_token_id` for which transformers takes the largest number of a text as its end


class Clip:
    """A CLIP: its two networks, its tokenizer and its preprocessor of pictures."""

    def __init__(self, flag: str, model: Parts, tokenizer: Parts, preprocessor: pictures.Preprocessor) -> None:
        self.flag, self.model, self.tokenizer, self.preprocessor = flag, model, tokenizer, preprocessor
        self.length = model.config.text_config.max_position_embeddings  # tokens of a text, the two special ones too

    @torch.no_grad()
    def of_texts(self, said: Sequence[str]) -> np.ndarray:
        """Return a unit vector (n, d) per text; a note tells those that are longer than the network reads."""
        long = [text for text in said if len(self.tokenizer(text, verbose=False).input_ids) > self.length]
        if long:
            more = f", and {len(long) - 1} more" * (len(long) > 1)
            note(f"{self.flag} reads {self.length} tokens of a text: the end of {shown(long[0])!r}{more} is cut")
        found = []
        for i in range(0, len(said), BATCH):
            ids = self.tokenizer(
                list(said[i : i + BATCH]),
                padding="max_length",
                truncation=True,
                max_length=self.length,
                return_tensors="pt",
            ).input_ids
            pooled = self.model.text_model(input_ids=ids.to(self.model.device)).pooler_output
            found.append(self.model.text_projection(pooled))
        return self.on_sphere(found)

    @torch.no_grad()
    def of_pictures(self, shots: Sequence[np.ndarray]) -> np.ndarray:
        """Return a unit vector (n, d) per square picture (H, W, 3), RGB in [0, 1]."""
        found = []
        for i in range(0, len(shots), BATCH):
            x = torch.from_numpy(np.stack([self.preprocessor(shot) for shot in shots[i : i + BATCH]]))
            pooled = self.model.vision_model(pixel_values=x.to(self.model.device)).pooler_output
            found.append(self.model.visual_projection(pooled))
        return self.on_sphere(found)

    def on_sphere(self, parts: Iterable[torch.Tensor]) -> np.ndarray:
        """Return vectors (n, d) as float64 of length 1; raises UserError where they are not finite."""
        found = F.normalize(torch.cat(list(parts)).cpu().double(), dim=1)
        if not torch.isfinite(found).all():
            raise UserError(f"{self.flag}: gives numbers that are not finite; its weights may be damaged; {INSTEAD}")
        return found.numpy()


def load(found: Found, device: torch.device) -> Clip:
    """Return the CLIP of a folder, in float32; raises UserError where its parts cannot be read or do not fit."""
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.utils import logging

    networks: Parts = CLIPModel
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)  # an error ends in one line of ours
    try:
        preprocessor = pictures.read(found.preprocessor)
        tokenizer = CLIPTokenizer.from_pretrained(found.folder, local_files_only=True)
        model, info = networks.from_pretrained(
            found.folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            dtype=torch.float32,  # whatever the weights are stored in
        )
        refuse_misfits(info, model, tokenizer, preprocessor)
    except Exception as error:  # noqa: BLE001 (damaged settings make the library raise errors of any class)
        raise UserError(f"{found.flag}: cannot be read as a CLIP: {reason(error)}; {INSTEAD}") from None
    return Clip(found.flag, model.eval().requires_grad_(False).to(device), tokenizer, preprocessor)


def refuse_misfits(info: dict[str, Any], model: Parts, tokenizer: Parts, preprocessor: pictures.Preprocessor) -> None:
    """Raise ValueError where weights are missing or too many, or where two parts do not fit; `info` is of loading."""
    for name, there, expected in sorted(info["mismatched_keys"]):
        raise ValueError(f"{shown(name)} is {tuple(there)} in the weights, and {tuple(expected)} by config.json")
    for what, key in (("lack", "missing_keys"), ("have no place for", "unexpected_keys")):
        names = sorted(name for name in info[key] if not name.endswith(NOT_WEIGHTS))
        if names:
            raise ValueError(f"its networks {what} {len(names)} of the weights, {shown(names[0])} first")
    text, size = model.config.text_config, model.config.vision_config.image_size
    if len(tokenizer) > text.vocab_size:
        raise ValueError(f"its tokenizer has {len(tokenizer)} words, and its text encoder {text.vocab_size}")
    if text.eos_token_id not in (LEGACY_EOS, tokenizer.eos_token_id):
        raise ValueError(
            f"its tokenizer ends a text with {tokenizer.eos_token_id}, and its text encoder waits for "
            f"{text.eos_token_id}"
        )
    given = preprocessor.crop or preprocessor.size
    if given != (size, size):
        raise ValueError(f"its preprocessor makes pictures of {given} pixels, and its network reads {(size, size)}")


class Retrieval:
    """A CLIP, and the texts among which a picture has to find its own; `said` are given, each counts once.

    Source: R-precision with CLIP, Park et al., "Benchmark for compositional text-to-image synthesis" (NeurIPS 2021).
    """

    def __init__(self, clip: Clip, said: Iterable[str]) -> None:
        known = texts.distinct(said)
        self.clip, self.keys, self.texts = clip, list(known), list(known.values())
        self.places = clip.of_texts(self.texts)

    def measure(self, prompt: str, shots: Sequence[np.ndarray], elevations: np.ndarray) -> dict[str, Any]:
        """Return the `measures` of the views (H, W, 3) of a result; its prompt is one of the texts."""
        similarity = self.clip.of_pictures(shots) @ self.places.T
        own = self.keys.index(texts.same_for_clip(prompt))
        return {
            **measures(similarity, own, elevations),
            "clip_taken_for": self.texts[similarity.mean(axis=0).argmax()],
            "views": {
                "clip_similarity": similarity[:, own].tolist(),
                "clip_taken_for": [self.texts[i] for i in similarity.argmax(axis=1)],
            },
        }

    def lines(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """Return lines on which CLIP it was, on chance, and on the results that it takes for another text."""
        n = len(self.texts)
        found = [f"{self.clip.flag}: {n} texts, among which chance finds the right one in {1 / n:.3f} of views"]
        found += [
            f"{shown(row['run'])}: taken for {shown(row['clip_taken_for'])!r}"
            for row in rows
            if not row["clip_r_object"]
        ]
        return "\n".join(found)
