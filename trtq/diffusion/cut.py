"""Prompts that are longer than a text encoder reads: diffusers cuts them, and somebody must say so."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trtq.diffusion.quiet import quiet_diffusers

__all__ = ["Cut", "find_cuts", "warn_of_cuts"]

logger = logging.getLogger(__name__)

_TOKENIZERS = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}
_TOKENIZERS["tokenizer_3"] = "text_encoder_3"
# T5's tokenizers read as much as the pipeline's call says; the others what their own settings say.
_BY_CALL = {
    "FluxPipeline": "tokenizer_2",
    "PixArtAlphaPipeline": "tokenizer",
    "PixArtSigmaPipeline": "tokenizer",
    "StableDiffusion3Pipeline": "tokenizer_3",
}
_FIXED = {"LDMTextToImagePipeline": 77}
_SHOWN = 120
_AT_ONCE = 256
_said: set[str] = set()
_MAX_SAID = 1024


@dataclass(frozen=True)
class Cut:
    """What a tokenizer takes off one prompt.

    Attributes:
        prompt: the whole text.
        encoder: the component that reads the tokens.
        tokens: how many the text has, marks of beginning and end included.
        kept: how many of them are read.
        lost: the text behind them.
        whole: names of other text encoders of the pipeline that read all of it.
    """

    prompt: str
    encoder: str
    tokens: int
    kept: int
    lost: str
    whole: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for a user."""
        lost = " ".join(self.lost.split())
        shown = lost if len(lost) <= _SHOWN else f"{lost[:_SHOWN]}..."
        also = f"; {' and '.join(self.whole)} reads all of it" if self.whole else ""
        return (
            f"the prompt is too long for {self.encoder}: it has {self.tokens} tokens, {self.kept} are "
            f"kept; cut off: {shown!r}{also}"
        )


def find_cuts(pipeline: Any, prompts: Sequence[str]) -> list[Cut]:
    """What this pipeline's tokenizers take off prompts.

    Args:
        pipeline: a diffusers pipeline.
        prompts: texts; one that comes again counts once.

    Returns:
        One row per prompt that is cut: that of the text encoder that reads most of it.
    """
    readers = []
    for name, encoder in _TOKENIZERS.items():
        tokenizer = getattr(pipeline, name, None)
        if tokenizer is None:
            continue
        if not hasattr(pipeline, encoder) and hasattr(pipeline, "bert"):
            encoder = "bert"
        readers.append((encoder, tokenizer, _limit(pipeline, name, tokenizer)))
    found = []
    texts = list(dict.fromkeys(prompts))
    for first in range(0, len(texts), _AT_ONCE):
        part = texts[first : first + _AT_ONCE]
        with quiet_diffusers():
            ids = {
                encoder: tokenizer(part, padding=False, truncation=False).input_ids
                for encoder, tokenizer, _ in readers
            }
        for place, text in enumerate(part):
            cut = [
                (encoder, tokenizer, limit, ids[encoder][place])
                for encoder, tokenizer, limit in readers
                if len(ids[encoder][place]) > limit
            ]
            if not cut:
                continue
            encoder, tokenizer, limit, own = max(cut, key=lambda row: row[2])
            # The last token that is kept is the mark of the end.
            lost = tokenizer.decode(own[limit - 1 : -1], skip_special_tokens=True)
            without = {row[0] for row in cut}
            whole = tuple(name for name, _, _ in readers if name not in without)
            found.append(Cut(text, encoder, len(own), limit, lost, whole))
    return found


def _limit(pipeline: Any, name: str, tokenizer: Any) -> int:
    """The most tokens that the pipeline takes of this tokenizer."""
    kind = type(pipeline).__name__
    if kind in _FIXED:
        return _FIXED[kind]
    if _BY_CALL.get(kind) == name:
        told = inspect.signature(type(pipeline).__call__).parameters.get("max_sequence_length")
        if told is not None and isinstance(told.default, int):
            return told.default
    return int(tokenizer.model_max_length)


def warn_of_cuts(pipeline: Any, prompts: Sequence[str], what: str = "prompts") -> None:
    """Say once in the log that prompts are cut, and what of the first one is lost.

    Args:
        pipeline: a diffusers pipeline; nothing is said of one without tokenizers.
        prompts: texts.
        what: what to call them where there are several.
    """
    cuts = find_cuts(pipeline, prompts)
    if not cuts:
        return
    line = str(cuts[0])
    if len(set(prompts)) > 1:
        start = " ".join(cuts[0].prompt.split())[:40]
        line = f"{len(cuts)} of {len(set(prompts))} {what} are cut; of {start!r}...: {line}"
    if line in _said:
        return
    if len(_said) >= _MAX_SAID:
        _said.clear()
    _said.add(line)
    logger.warning("%s", line)
