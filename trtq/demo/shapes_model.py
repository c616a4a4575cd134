"""Parts of the shapes model: tokenizer, text encoder, configurations of VAE, UNet and scheduler."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from trtq.demo.shapes import COLOURS, SHAPES, SIZE

TIMESTEPS = 1000
TOKENS = 12
WORDS = ("a", *COLOURS, *SHAPES, "above", "below", "left", "right", "of")
SPECIAL = ("<|startoftext|>", "<|endoftext|>")

TEXT_ENCODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": TOKENS,
    "projection_dim": 64,
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (12, 24, 48),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 6,
    "sample_size": SIZE,
}
UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (64, 112),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
SCHEDULER = {
    "num_train_timesteps": TIMESTEPS,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def merges() -> list[tuple[str, str]]:
    """Byte-pair merges that turn every word of `WORDS` into one token."""
    pairs: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        for pair in pairs:
            for place in range(len(pieces) - 1, 0, -1):
                if (pieces[place - 1], pieces[place]) == pair:
                    pieces[place - 1 : place + 1] = ["".join(pair)]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            pairs.append(pair)
            pieces[:2] = ["".join(pair)]
    return pairs


def build_tokenizer() -> Any:
    """Build a CLIP tokenizer: 256 bytes, 256 word-final bytes, the merges, and two special tokens."""
    from transformers import CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())  # type: ignore[no-untyped-call]
    pairs: Any = merges()
    entries = [*letters, *(letter + "</w>" for letter in letters), *map("".join, pairs), *SPECIAL]
    vocabulary = {entry: index for index, entry in enumerate(dict.fromkeys(entries))}
    return CLIPTokenizer(vocab=vocabulary, merges=pairs, model_max_length=TOKENS)


def build_text_encoder(tokenizer: Any) -> Any:
    """Build an untrained CLIP text encoder for this tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    special_ids: dict[str, Any] = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = CLIPTextConfig(vocab_size=len(tokenizer), **special_ids, **TEXT_ENCODER)
    return CLIPTextModel(config)


def tokenize(tokenizer: Any, captions: list[str]) -> Tensor:
    """Token ids LongTensor[B, TOKENS] of B captions."""
    encoded = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    ids: Tensor = encoded.input_ids
    return ids
