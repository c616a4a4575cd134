"""Float-equivalent forms of a denoiser in which every product that can be low-bit is a module.

diffusers computes attention in one fused call and a skip connection's concatenated input in one
convolution. Before quantisation, attention is decomposed into two `Product`s, and such a convolution is
split into one per source, so that each source has a separate quantiser (QuEST, arXiv 2402.03666). A
`Structure` in the manifest records both changes, so that they can be applied to a new model of the same
class.

Letters: B images; H heads; S, S' tokens; C channels; D channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trtq.errors import QuantizationError
from trtq.quant.input_transform import TransformTensors

__all__ = [
    "DecomposedAttention",
    "Product",
    "SplitConv2d",
    "Structure",
    "apply_structure",
    "attention_modules",
    "replace_module",
    "skip_splits",
]


class Product(nn.Module):
    """`a @ b` of two activations, as a module that can be replaced.

    Attributes:
        transform: factors of the operands' channels that the weights around the product contain, see
            `trtq.quant.attention_channels`; None: unchanged.
    """

    def __init__(self) -> None:
        super().__init__()
        self.transform: TransformTensors | None = None

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """a[..., M, K], b[..., K, N] -> [..., M, N]."""
        return a @ b


class DecomposedAttention(nn.Module):
    """A diffusers attention processor with its two products as children.

    The result equals that of diffusers' `AttnProcessor2_0` up to rounding.

    Attributes:
        scores: product of query and transposed key.
        mix: product of probabilities and value.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scores: nn.Module = Product()
        self.mix: nn.Module = Product()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Entry point for diffusers' `Attention`, which inspects the argument names of the signature."""
        result: Tensor = super().__call__(
            attn, hidden_states, encoder_hidden_states, attention_mask, temb
        )
        return result

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        temb: Tensor | None,
    ) -> Tensor:
        """hidden_states[B,S,C] or [B,C,H,W] -> the same shape."""
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape
        if len(image_shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)

        def heads(x: Tensor) -> Tensor:
            return x.reshape(*x.shape[:2], attn.heads, -1).transpose(1, 2)

        query = heads(attn.to_q(hidden_states))
        key = heads(attn.to_k(context))
        value = heads(attn.to_v(context))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        scores = self.scores(query, key.transpose(-1, -2)) * query.shape[-1] ** -0.5
        if attention_mask is not None:
            batch, tokens = context.shape[:2]
            mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
            scores = scores + mask.reshape(batch, attn.heads, *mask.shape[1:])
        out = self.mix(scores.softmax(-1), value)
        out = out.transpose(1, 2).flatten(2).to(query.dtype)
        out = attn.to_out[1](attn.to_out[0](out))
        if len(image_shape) == 4:
            out = out.transpose(1, 2).reshape(image_shape)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor  # type: ignore[no-any-return]


class SplitConv2d(nn.Module):
    """A convolution of concatenated channels as the sum of one convolution per part.

    Args:
        source: convolution; its weight is copied in two slices.
        split: number of input channels of the first part.
    """

    def __init__(self, source: nn.Conv2d, split: int) -> None:
        super().__init__()
        if source.groups != 1 or not 0 < split < source.in_channels:
            raise QuantizationError(
                f"cannot split a convolution of {source.in_channels} channels in {source.groups} "
                f"groups at channel {split}"
            )
        self.split = split
        slices = (source.weight[:, :split], source.weight[:, split:])
        self.parts = nn.ModuleList()
        for index, weight in enumerate(slices):
            part = nn.Conv2d(
                weight.shape[1],
                source.out_channels,
                source.kernel_size,  # type: ignore[arg-type]
                source.stride,  # type: ignore[arg-type]
                source.padding,  # type: ignore[arg-type]
                source.dilation,  # type: ignore[arg-type]
                bias=source.bias is not None and index == 0,
            ).to(source.weight)
            with torch.no_grad():
                part.weight.copy_(weight)
                if part.bias is not None and source.bias is not None:
                    part.bias.copy_(source.bias)
            self.parts.append(part)

    def forward(self, x: Tensor) -> Tensor:
        """x[B,C,H,W] -> [B,N,H',W']."""
        first, second = self.parts
        out: Tensor = first(x[:, : self.split]) + second(x[:, self.split :])
        return out


@dataclass(frozen=True)
class Structure:
    """Changes to the structure of a denoiser.

    Attributes:
        attention: paths of the decomposed attention modules.
        splits: number of input channels of the first part, by path of the split convolution.
    """

    attention: tuple[str, ...] = ()
    splits: Mapping[str, int] = field(default_factory=dict)


def replace_module(root: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the module of `root` at path `name` with `new`."""
    parent, _, leaf = name.rpartition(".")
    owner = root.get_submodule(parent)
    if isinstance(owner, nn.Sequential | nn.ModuleList):
        owner[int(leaf)] = new
    else:
        setattr(owner, leaf, new)


def attention_modules(denoiser: nn.Module) -> list[str]:
    """Paths of the attention modules that `DecomposedAttention` can replace."""
    from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

    return [
        name
        for name, module in denoiser.named_modules()
        if isinstance(module, Attention)
        and type(module.processor) in (AttnProcessor, AttnProcessor2_0)
        and module.added_kv_proj_dim is None
    ]


def skip_splits(denoiser: Any) -> dict[str, int]:
    """Channels at which to split the skip convolutions of a UNet's decoder into their two sources.

    Returns:
        The number of input channels from the decoder, by path of the `conv_shortcut`.
    """
    splits: dict[str, int] = {}
    middle = getattr(denoiser, "mid_block", None)
    blocks = getattr(denoiser, "up_blocks", None)
    if middle is None or blocks is None:
        return splits
    channels = int(middle.resnets[-1].conv2.out_channels)
    for outer, block in enumerate(blocks):
        for inner, resnet in enumerate(getattr(block, "resnets", ())):
            skip = resnet.conv_shortcut
            if isinstance(skip, nn.Conv2d) and 0 < channels < skip.in_channels:
                splits[f"up_blocks.{outer}.resnets.{inner}.conv_shortcut"] = channels
            channels = int(resnet.conv2.out_channels)
    return splits


def apply_structure(denoiser: nn.Module, structure: Structure) -> None:
    """Apply the changes to a float denoiser, in place.

    Raises:
        QuantizationError: the denoiser does not have a module that the structure names.
    """
    modules: dict[str, Any] = dict(denoiser.named_modules())
    missing = [name for name in (*structure.attention, *structure.splits) if name not in modules]
    if missing:
        raise QuantizationError(f"the denoiser has no module {missing[0]!r}")
    for name in structure.attention:
        if not hasattr(modules[name], "set_processor"):
            raise QuantizationError(f"{name!r} is not an attention module and cannot be decomposed")
        modules[name].set_processor(DecomposedAttention())
    for name, split in structure.splits.items():
        if not isinstance(modules[name], nn.Conv2d):
            raise QuantizationError(f"{name!r} is not a convolution and cannot be split")
        replace_module(denoiser, name, SplitConv2d(modules[name], split))
