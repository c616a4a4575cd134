"""Warnings of prompts that exceed a text encoder's limit, which diffusers truncates."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trtq.checkpoint.quiet import quiet_diffusers

__all__ = ["Truncation", "find_truncations", "warn_of_truncation"]

logger = logging.getLogger(__name__)

_TOKENIZERS = {
    "tokenizer": "text_encoder",
    "tokenizer_2": "text_encoder_2",
    "tokenizer_3": "text_encoder_3",
}
_MAX_CHARACTERS = 120
_BATCH = 256
_warned: set[str] = set()
_MAX_WARNED = 1024


@dataclass(frozen=True)
class Truncation:
    """The part of a prompt that a text encoder does not read.

    Attributes:
        prompt: the whole prompt.
        encoder: component that reads the tokens.
        tokens: number of tokens of the text, including begin and end tokens.
        kept: number of tokens that the encoder reads.
        lost: text after the last token that the encoder reads.
        complete: names of the pipeline's text encoders that read the whole text.
    """

    prompt: str
    encoder: str
    tokens: int
    kept: int
    lost: str
    complete: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A one-line description for the user."""
        lost = " ".join(self.lost.split())
        shown = lost if len(lost) <= _MAX_CHARACTERS else f"{lost[:_MAX_CHARACTERS]}..."
        also = f"; {' and '.join(self.complete)} reads all of it" if self.complete else ""
        return (
            f"the prompt is too long for {self.encoder}: it has {self.tokens} tokens, {self.kept} are "
            f"kept; cut off: {shown!r}{also}"
        )


@dataclass(frozen=True)
class _Reader:
    """A text encoder with its tokenizer and the maximum number of its tokens."""

    encoder: str
    tokenizer: Any
    limit: int


def find_truncations(pipeline: Any, prompts: Sequence[str]) -> list[Truncation]:
    """The prompts that a pipeline truncates.

    Args:
        pipeline: diffusers pipeline.
        prompts: texts; duplicates count once.

    Returns:
        One entry per truncated prompt, for the text encoder that reads the longest part of it.
    """
    readers = list(_readers(pipeline))
    truncations = []
    texts = list(dict.fromkeys(prompts))
    for first in range(0, len(texts), _BATCH):
        batch = texts[first : first + _BATCH]
        with quiet_diffusers():
            ids = {
                reader.encoder: reader.tokenizer(batch, padding=False, truncation=False).input_ids
                for reader in readers
            }
        for place, text in enumerate(batch):
            tokens = {encoder: rows[place] for encoder, rows in ids.items()}
            truncation = _truncation(text, readers, tokens)
            if truncation is not None:
                truncations.append(truncation)
    return truncations


def _readers(pipeline: Any) -> Iterator[_Reader]:
    for name, encoder in _TOKENIZERS.items():
        tokenizer = getattr(pipeline, name, None)
        if tokenizer is None:
            continue
        if not hasattr(pipeline, encoder) and hasattr(pipeline, "bert"):
            encoder = "bert"
        yield _Reader(encoder, tokenizer, _limit(pipeline, name, encoder))


def _truncation(
    text: str, readers: list[_Reader], tokens: dict[str, list[int]]
) -> Truncation | None:
    """The truncation of one prompt, given its tokens by text encoder; None if no text is lost."""
    truncating = [reader for reader in readers if len(tokens[reader.encoder]) > reader.limit]
    if not truncating:
        return None
    reader = max(truncating, key=lambda candidate: candidate.limit)
    ids = tokens[reader.encoder]
    # The last kept token is the end token.
    lost = reader.tokenizer.decode(ids[reader.limit - 1 : -1], skip_special_tokens=True)
    complete = tuple(other.encoder for other in readers if other not in truncating)
    return Truncation(text, reader.encoder, len(ids), reader.limit, lost, complete)


def _limit(pipeline: Any, name: str, encoder: str) -> int:
    """Maximum number of tokens that a pipeline reads from one of its tokenizers.

    A pipeline whose call has an argument `max_sequence_length` applies it to its last tokenizer.
    """
    last = [other for other in _TOKENIZERS if hasattr(pipeline, other)][-1]
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("max_sequence_length")
    if name == last and parameter is not None and isinstance(parameter.default, int):
        return parameter.default
    limit = int(getattr(pipeline, name).model_max_length)
    config = getattr(getattr(pipeline, encoder, None), "config", None)
    positions = getattr(config, "max_position_embeddings", None)
    return min(limit, positions) if isinstance(positions, int) else limit


def warn_of_truncation(pipeline: Any, prompts: Sequence[str], what: str = "prompts") -> None:
    """Log a warning of truncated prompts, once per text, with the lost part of the first one.

    Args:
        pipeline: diffusers pipeline, with or without tokenizers.
        prompts: texts.
        what: plural noun for the prompts in the message.
    """
    truncations = find_truncations(pipeline, prompts)
    if not truncations:
        return
    line = str(truncations[0])
    if len(set(prompts)) > 1:
        start = " ".join(truncations[0].prompt.split())[:40]
        count = f"{len(truncations)} of {len(set(prompts))}"
        line = f"{count} {what} are truncated, e.g. {start!r}...: {line}"
    if line in _warned:
        return
    if len(_warned) >= _MAX_WARNED:
        _warned.clear()
    _warned.add(line)
    logger.warning("%s", line)
