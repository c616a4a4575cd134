"""Text encoders and autoencoders as modules to trace, with the inputs and outputs of optimum-onnx.

    text_encoder*/   input_ids [, attention_mask] -> outputs of the model [, hidden_states.0 ...]
    vae_encoder/     sample -> latent_parameters (mean and log variance), or latents without a variance
    vae_decoder/     latent_sample -> sample

They stay in float32: they run once per image, and autoencoders overflow in half precision.
Letters: B images, C channels, H height, W width, S tokens.
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
"""Height and width of the latents with which an autoencoder is traced; its graph accepts any size."""
_MAX_TOKENS = 512
"""Number of tokens for a text encoder whose configuration gives no limit."""
HIDDEN_STATES = "hidden_states.{}"


@dataclass(frozen=True)
class Component:
    """A part of a pipeline that can be traced.

    Attributes:
        folder: name of the graph's folder.
        config: model of diffusers or transformers whose configuration is saved in the folder.
        module: module with bare tensors as inputs and outputs.
        inputs: example inputs by name.
        outputs: names of the outputs, in order.
        axes: names of the inputs' free axes other than the batch.
        cells: granularity of H and W, by name of an input `[B,C,H,W]` with free H and W.
    """

    folder: str
    config: Any
    module: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: list[str]
    axes: Mapping[int, str] = field(default_factory=dict)
    cells: Mapping[str, int] = field(default_factory=dict)

    def save_config(self, folder: Path) -> None:
        """Write the model's configuration into the folder of the graph."""
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
        outputs = _encode(self.encoder, input_ids, attention_mask, hidden_states=self.layers > 0)
        hidden = tuple(outputs["hidden_states"][: self.layers]) if self.layers else ()
        return tuple(outputs[name] for name in self.names) + hidden


def _encode(
    encoder: Any, input_ids: Tensor, attention_mask: Tensor | None, *, hidden_states: bool
) -> Any:
    """Outputs of the model by name; in a bare tuple the last hidden states come first."""
    options: dict[str, Any] = {"output_hidden_states": True} if hidden_states else {}
    if attention_mask is not None:
        options["attention_mask"] = attention_mask
    outputs = encoder(input_ids, **options)
    return {"last_hidden_state": outputs[0]} if isinstance(outputs, tuple) else outputs


@torch.no_grad()
def text_component(
    name: str, encoder: Any, tokenizer: Any, *, masked: bool, hidden_states: bool
) -> Component:
    """Describe a text encoder for tracing.

    Args:
        name: name of the component in the pipeline.
        encoder: model of transformers.
        tokenizer: tokenizer of the model.
        masked: whether the pipeline passes an attention mask.
        hidden_states: whether the pipeline uses the hidden states between the layers.
    """
    positions = getattr(encoder.config, "max_position_embeddings", _MAX_TOKENS)
    length = min(int(tokenizer.model_max_length), int(positions))
    ids = torch.zeros(_BATCH, length, dtype=torch.long)
    inputs = {"input_ids": ids}
    if masked:
        inputs["attention_mask"] = torch.ones_like(ids)
    example = _encode(encoder, ids, inputs.get("attention_mask"), hidden_states=False)
    names = [key for key, value in example.items() if isinstance(value, Tensor)]
    layers = int(encoder.config.num_hidden_layers) if hidden_states else 0
    outputs = names + [HIDDEN_STATES.format(index) for index in range(layers)]
    # T5 has no maximum length, and pipelines differ in the length that they use.
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
        encoded = self.autoencoder.encode(sample, return_dict=False)[0]
        parameters: Tensor = encoded if isinstance(encoded, Tensor) else encoded.parameters
        return parameters


@torch.no_grad()
def autoencoder_components(autoencoder: Any) -> list[Component]:
    """Describe both halves of an autoencoder for tracing, for images of any size.

    Args:
        autoencoder: model of diffusers.

    Raises:
        UsageError: the configuration does not give the number of input channels.
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
