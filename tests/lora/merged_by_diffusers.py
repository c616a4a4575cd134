"""The oracle of all LoRA tests: compare trtq's merge of a file with diffusers' and PEFT's."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from trtq.lora import LoraRequest, merge_loras

RELATIVE = 1e-6


def parts(pipe):
    """The models of a pipeline by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def weights(pipe):
    """Copies of all weights: `component.path` -> tensor."""
    return {
        f"{name}.{key}": value.detach().clone()
        for name, part in parts(pipe).items()
        for key, value in part.state_dict().items()
    }


def denoiser_of(pipe):
    return "unet" if hasattr(pipe, "unet") else "transformer"


def by_diffusers(pipe, loras):
    """The weights after diffusers' own merge.

    Args:
        pipe: pipeline, changed in place.
        loras: file or folder, and scale, of each LoRA.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = [f"lora_{i}" for i in range(len(loras))]
        for name, (path, _) in zip(names, loras, strict=True):
            pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
        if len(loras) > 1:
            pipe.set_adapters(names, [scale for _, scale in loras])
        lora_scale = loras[0][1] if len(loras) == 1 else 1.0
        loaded = [
            name
            for name in type(pipe)._lora_loadable_modules
            if getattr(getattr(pipe, name, None), "peft_config", None)
        ]
        pipe.fuse_lora(components=loaded, lora_scale=lora_scale, adapter_names=names)
        pipe.unload_lora_weights()
    return weights(pipe)


def by_trtq(pipe, loras):
    """The weights after trtq's merge."""
    requests = [LoraRequest(path, scale) for path, scale in loras]
    merge_loras(parts(pipe), requests, denoiser_of(pipe))
    return weights(pipe)


def changed(before, after):
    """Names of the tensors that differ."""
    return {key for key in before if not torch.equal(before[key], after[key])}


def assert_same(before, expected, given):
    """Assert equal weights, to 1e-6 of each tensor's norm and of the norm of its change."""
    assert expected.keys() == given.keys()
    differing = changed(before, expected)
    assert differing, "the oracle changed nothing"
    assert changed(before, given) == differing
    for key in differing:
        a, b, start = expected[key].double(), given[key].double(), before[key].double()
        error = float((a - b).norm())
        assert error <= RELATIVE * float(a.norm()), (key, error / float(a.norm()))
        # The weight's rounding to float32 limits the precision of a small change.
        assert error <= 1e-5 * float((a - start).norm()), (key, error / float((a - start).norm()))


def matrices(module, rank, generator):
    """Create small random matrices down[R, K, ...] and up[N, R, ...] for a layer."""
    weight = module.weight
    down = torch.randn((rank, *weight.shape[1:]), generator=generator) * 0.1
    up = torch.randn((len(weight), rank, *(1,) * (weight.ndim - 2)), generator=generator) * 0.1
    return down, up


def write(folder: Path, tensors, name="style.safetensors", metadata=None):
    """Write a safetensors file and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=metadata)
    return path
