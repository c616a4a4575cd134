"""Text encoders and autoencoders as ONNX, with the inputs and outputs that optimum-onnx gives them.

    text_encoder*/   input_ids [, attention_mask] -> what the model gives [, hidden_states.0 ...]
    vae_encoder/     sample -> latent_parameters (mean and log variance), or latents where they have none
    vae_decoder/     latent_sample -> sample

They stay in float32: they run once per image, and autoencoders overflow in half precision.
Letters: B images, C latent channels, H, W, S tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trtq.errors import UsageError

__all__ = ["Component", "autoencoder_components", "text_component"]

_BATCH = 2
_LATENT = 16
"""Height and width of the latents that an autoencoder is traced with; its graph takes any."""
_LONGEST = 512
HIDDEN_STATES = "hidden_states.{}"


@dataclass(frozen=True)
class Component:
    """A part of a pipeline that can be traced.

    Attributes:
        folder: where its graph goes.
        config: the model whose configuration goes beside it, of diffusers or transformers.
        module: takes and gives bare tensors.
        inputs: examples by name.
        outputs: names of what it gives.
        axes: axes of the inputs, beside the batch, whose length is free.
        cells: inputs `[B,C,H,W]` whose H and W are free, in multiples of this.
    """

    folder: str
    config: Any
    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: list[str]
    axes: Mapping[int, str] = field(default_factory=dict)
    cells: Mapping[str, int] = field(default_factory=dict)

    def save_config(self, folder: Path) -> None:
        """Write the model's configuration beside its graph."""
        if isinstance(self.config.config, dict):
            self.config.save_config(folder)
        else:
            self.config.config.save_pretrained(folder)


class _TextEncoder(nn.Module):
    def __init__(self, encoder: Any, names: list[str], layers: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.names = names
        self.layers = layers

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        found = _encode(self.encoder, input_ids, attention_mask, hidden_states=self.layers > 0)
        hidden = tuple(found["hidden_states"][: self.layers]) if self.layers else ()
        return tuple(found[name] for name in self.names) + hidden


def _encode(
    encoder: Any, input_ids: Tensor, attention_mask: Tensor | None, *, hidden_states: bool
) -> Any:
    """What the model gives, by name; models that give a bare tuple give the last states first."""
    options: dict[str, Any] = {"output_hidden_states": True} if hidden_states else {}
    if attention_mask is not None:
        options["attention_mask"] = attention_mask
    found = encoder(input_ids, **options)
    return {"last_hidden_state": found[0]} if isinstance(found, tuple) else found


@torch.no_grad()
def text_component(
    name: str, encoder: Any, tokenizer: Any, *, masked: bool, hidden_states: bool
) -> Component:
    """A text encoder.

    Args:
        name: of the component in its pipeline.
        encoder: the model.
        tokenizer: what makes its ids.
        masked: its pipeline passes an attention mask.
        hidden_states: its pipeline asks for the states between the layers.
    """
    longest = getattr(encoder.config, "max_position_embeddings", _LONGEST)
    length = min(int(tokenizer.model_max_length), int(longest))
    ids = torch.zeros(_BATCH, length, dtype=torch.long)
    inputs = {"input_ids": ids}
    if masked:
        inputs["attention_mask"] = torch.ones_like(ids)
    found = _encode(encoder, ids, inputs.get("attention_mask"), hidden_states=False)
    names = [key for key, value in found.items() if isinstance(value, Tensor)]
    layers = int(encoder.config.num_hidden_layers) if hidden_states else 0
    outputs = names + [HIDDEN_STATES.format(index) for index in range(layers)]
    # T5 has no bound of its own, and pipelines differ in the length they ask of it.
    axes = {} if hasattr(encoder.config, "max_position_embeddings") else {1: "tokens"}
    return Component(name, encoder, _TextEncoder(encoder, names, layers), inputs, outputs, axes)


class _Decoder(nn.Module):
    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, latent_sample: Tensor) -> Tensor:
        decoded: Tensor = self.autoencoder.decode(latent_sample, return_dict=False)[0]
        return decoded


class _Encoder(nn.Module):
    def __init__(self, autoencoder: Any) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, sample: Tensor) -> Tensor:
        found = self.autoencoder.encode(sample, return_dict=False)[0]
        parameters: Tensor = found if isinstance(found, Tensor) else found.parameters
        return parameters


@torch.no_grad()
def autoencoder_components(autoencoder: Any) -> list[Component]:
    """Both halves of an autoencoder, for images of any size.

    Args:
        autoencoder: the model.

    Raises:
        UsageError: it is of another kind, and its configuration does not tell what it takes.
    """
    factor = 2 ** (len(autoencoder.config.block_out_channels) - 1)
    latents = torch.zeros(_BATCH, autoencoder.config.latent_channels, _LATENT, _LATENT)
    side = _LATENT * factor
    channels = getattr(autoencoder.config, "in_channels", None)
    if channels is None:
        raise UsageError(
            f"the autoencoder {type(autoencoder).__name__} cannot be exported: its configuration has no "
            "in_channels; put an AutoencoderKL into the pipeline before trtq quantize"
        )
    pixels = torch.zeros(_BATCH, channels, side, side)
    variational = hasattr(autoencoder.encode(pixels[:1]), "latent_dist")
    parameters = "latent_parameters" if variational else "latents"
    halves = (
        ("vae_decoder", _Decoder(autoencoder), "latent_sample", latents, "sample", 1),
        ("vae_encoder", _Encoder(autoencoder), "sample", pixels, parameters, factor),
    )
    return [
        Component(
            folder,
            autoencoder,
            module,
            {name: example},
            [output],
            cells={name: cell},
        )
        for folder, module, name, example, output, cell in halves
    ]
