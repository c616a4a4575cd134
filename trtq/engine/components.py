"""Text encoders and autoencoders that run on engines, with the interface of diffusers' pipelines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trtq.engine.base import Engine
from trtq.engine.shared import SharesEngines
from trtq.errors import ArtefactError, UsageError

__all__ = ["EngineAutoencoder", "EngineTextEncoder"]


class _EngineModule(SharesEngines, nn.Module):
    """A module without weights, with the device and data type that diffusers reads."""

    def __init__(self, config: Any, engine: Engine) -> None:
        super().__init__()
        self.config = config
        self.device = torch.device(engine.device)
        self.dtype = torch.float32
        # The hooks of `enable_model_cpu_offload` take the model's device from the first parameter.
        self.place = nn.Parameter(torch.empty(0, device=self.device), requires_grad=False)


def _run(engine: Engine, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
    unknown = [name for name in feeds if name not in engine.inputs]
    if unknown:
        raise ArtefactError(
            f"the graph has no input {unknown[0]!r}, it has {', '.join(engine.inputs) or 'none'}"
        )
    given = next(iter(feeds.values()))
    return {name: value.to(given.device) for name, value in engine.run_tensors(feeds).items()}


class EngineTextEncoder(_EngineModule):
    """Replaces the text encoder of transformers in a pipeline.

    Args:
        engine: engine of the exported graph.
        config: configuration of the exported model.
    """

    def __init__(self, engine: Engine, config: Any) -> None:
        super().__init__(config, engine)
        self.engine = engine

    def get_input_embeddings(self) -> Any:
        """Not available; only `load_textual_inversion` calls this method.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "this text encoder is an exported graph, whose embeddings are fixed; call "
            "load_textual_inversion on the float pipeline before trtq quantize"
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        **_: Any,
    ) -> Any:
        """input_ids[B,S] -> transformers' `ModelOutput` with the graph's outputs in order.

        Raises:
            UsageError: the graph has no outputs for the hidden states that are requested.
        """
        from transformers.utils.generic import ModelOutput

        feeds = {"input_ids": input_ids}
        if "attention_mask" in self.engine.inputs:
            feeds["attention_mask"] = (
                torch.ones_like(input_ids) if attention_mask is None else attention_mask
            )
        outputs: dict[str, Any] = _run(self.engine, feeds)
        names = [name for name in outputs if name.startswith("hidden_states.")]
        hidden = tuple(outputs.pop(name) for name in names)
        if output_hidden_states:
            if not hidden:
                raise UsageError(
                    "this text encoder was exported without its hidden states (clip_skip needs them)"
                )
            outputs["hidden_states"] = (*hidden, outputs["last_hidden_state"])
        return ModelOutput(**outputs)  # type: ignore[no-untyped-call]


class EngineAutoencoder(_EngineModule):
    """Replaces the autoencoder of diffusers in a pipeline.

    Args:
        decoder: engine of the exported decoder.
        encoder: engine of the exported encoder.
        config: configuration of the exported model.
    """

    def __init__(self, decoder: Engine, encoder: Engine, config: Any) -> None:
        super().__init__(config, decoder)
        self.decoder = decoder
        self.encoder = encoder

    def decode(self, latents: Tensor, return_dict: bool = True, **_: Any) -> Any:
        """latents[B,C,H,W] -> images[B,3,H',W']."""
        from diffusers.models.autoencoders.vae import DecoderOutput

        sample = _run(self.decoder, {"latent_sample": latents})["sample"]
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def encode(self, sample: Tensor, return_dict: bool = True) -> Any:
        """images[B,3,H',W'] -> a distribution of latents, or the latents of a VQ model."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
        from diffusers.models.autoencoders.vq_model import VQEncoderOutput
        from diffusers.models.modeling_outputs import AutoencoderKLOutput

        outputs = _run(self.encoder, {"sample": sample})
        if "latents" in outputs:
            latents = outputs["latents"]
            return VQEncoderOutput(latents=latents) if return_dict else (latents,)
        distribution = DiagonalGaussianDistribution(outputs["latent_parameters"])
        return AutoencoderKLOutput(latent_dist=distribution) if return_dict else (distribution,)
