"""Names of layers in LoRA files of all layouts, and the layers that the names refer to.

A file names a layer by a component and a path in the component. Trainers write the path with dots
(diffusers, PEFT, ComfyUI) or underscores (kohya), with the names of diffusers or of the model's first
release. All names are converted to underscores before the look-up. Tables derived from the model's
structure (`trtq.lora.first_release`) translate names of first releases, for any width and depth.

A single layer of the first release (`img_attn.qkv`) can be several layers in diffusers. A `Site` is the
list of layers whose output channels, concatenated, are the rows of the file's matrix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from trtq.lora.converted import converted_rows
from trtq.lora.first_release import first_release_names, flat

__all__ = ["Layer", "Names", "Site"]

_LAYER_CLASSES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Layer:
    """A linear layer or convolution of a pipeline.

    Attributes:
        component: name of the component in the pipeline, e.g. `unet`.
        path: path of the layer in the component.
        module: the layer, with a weight `[N, K, ...]`.
    """

    component: str
    path: str
    module: Any


@dataclass(frozen=True, eq=False)
class Site:
    """The layers that one name of a file refers to.

    Attributes:
        layers: layers whose output channels are concatenated in the file's matrix.
        swapped: whether the halves of the matrix must be swapped, because the file stores shift before
            scale and diffusers scale before shift.
    """

    layers: tuple[Layer, ...]
    swapped: bool = False


# Prefixes of the denoiser, independent of its name in the pipeline.
_DENOISER_PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
_TEXT_PREFIXES = {
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_l.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
    "text_encoders.clip_g.": "text_encoder_2",
    "clip_l.": "text_encoder",
    "clip_g.": "text_encoder_2",
}
_T5_PREFIXES = (
    "lora_te3_",
    "text_encoders.t5xxl.transformer.",
    "text_encoders.t5xxl.",
    "t5xxl.",
    "t5.",
)
_WRAPPERS = ("base_model.model.", "module.")


def _other_names(path: str) -> list[str]:
    """Other names of a layer of diffusers' attention or of a text encoder's attention."""
    names = []
    if path.endswith(".to_out.0"):
        names += [path.removesuffix(".0"), path.removesuffix(".to_out.0") + ".out"]
    for leaf, older in (
        ("q_proj", "to_q"),
        ("k_proj", "to_k"),
        ("v_proj", "to_v"),
        ("out_proj", "to_out"),
    ):
        if path.endswith(f".self_attn.{leaf}"):
            names.append(path.removesuffix(leaf) + older)
    return names


def _sites_of(root: nn.Module, layers: Mapping[str, Layer]) -> dict[str, Site]:
    """The sites of a component, by each name that a file may use, in underscore form."""
    sites = {flat(path): Site((layer,)) for path, layer in layers.items()}
    for path, layer in layers.items():
        for name in _other_names(path):
            sites.setdefault(flat(name), Site((layer,)))
    for name, paths, swapped in first_release_names(root, layers):
        if all(path in layers for path in paths):
            site = Site(tuple(layers[path] for path in paths), swapped)
            sites.setdefault(flat(name), site)
    # transformers 5 removed `text_model` from CLIPTextModel but not from CLIPTextModelWithProjection;
    # files exist in both forms.
    for name, site in list(sites.items()):
        if name.startswith("text_model_"):
            sites.setdefault(name.removeprefix("text_model_"), site)
        elif name.startswith("encoder_layers_"):
            sites.setdefault(f"text_model_{name}", site)
    return sites


class Names:
    """Every linear layer and convolution of a pipeline, by each name that a LoRA may use.

    Args:
        components: float models by name in the pipeline.
        denoiser: component name of the denoiser.
    """

    def __init__(self, components: Mapping[str, nn.Module], denoiser: str) -> None:
        self.components = components
        self.denoiser = denoiser
        self._sites: dict[str, dict[str, Site]] = {}
        for component, root in components.items():
            layers = {
                path: Layer(component, path, module)
                for path, module in root.named_modules()
                if isinstance(module, _LAYER_CLASSES)
            }
            self._sites[component] = _sites_of(root, layers)
        kinds = [(name, type(part).__name__) for name, part in components.items()]
        t5 = next((name for name, kind in kinds if kind.startswith(("T5", "UMT5"))), None)
        self._prefixes = dict.fromkeys(_DENOISER_PREFIXES, denoiser) | _TEXT_PREFIXES
        self._prefixes |= dict.fromkeys(_T5_PREFIXES, t5 or "text_encoder_3")

    @property
    def kind(self) -> str:
        """Name of the denoiser's class."""
        return type(self.components.get(self.denoiser)).__name__

    def split(self, name: str) -> tuple[str | None, str]:
        """Component (None if the name has none) and path of a layer's name in a file."""
        for prefix in _WRAPPERS:
            while name.startswith(prefix):
                name = name.removeprefix(prefix)
        for component in self.components:
            if name.startswith(f"{component}."):
                rest = name.removeprefix(f"{component}.")
                return component, rest.removeprefix("base_model.model.")
        for prefix, component in self._prefixes.items():
            if name.startswith(prefix):
                return component, name.removeprefix(prefix)
        return None, name

    def _site(self, component: str, path: str) -> Site | None:
        name = flat(path.replace(".processor.", ".").replace("_processor_", "_"))
        return self._sites.get(component, {}).get(name)

    def find(self, names: Iterable[str]) -> tuple[dict[str, Site], list[str]]:
        """The sites of a file's names, and the names without a site."""
        sites: dict[str, Site] = {}
        missing: list[str] = []
        bare: list[str] = []
        for name in names:
            component, path = self.split(name)
            site = self._site(component or self.denoiser, path)
            if site is not None:
                sites[name] = site
            elif component is None:
                bare.append(name)
            else:
                missing.append(name)
        if bare and not sites and not missing:
            owner = self._only_owner(bare)
            if owner is not None:
                by_name = {name: self._site(owner, self.split(name)[1]) for name in bare}
                return {name: site for name, site in by_name.items() if site is not None}, []
        return sites, missing + bare

    def _only_owner(self, names: list[str]) -> str | None:
        """The only component that has all these layers, e.g. for a file of just a text encoder."""
        owners = [
            component
            for component in self._sites
            if all(self._site(component, self.split(name)[1]) for name in names)
        ]
        return owners[0] if len(owners) == 1 else None

    def renamed_by_diffusers(self, outputs: Mapping[str, int]) -> dict[str, Site]:
        """Sites of names that only diffusers' converters support; names without a site are omitted.

        Args:
            outputs: number of output channels, by name in the file.
        """
        single = {
            name: site.layers[0]
            for name, site in self._sites.get(self.denoiser, {}).items()
            if len(site.layers) == 1
        }
        rows = converted_rows(self.kind, outputs, lambda path: flat(path) in single)
        parts: dict[str, list[tuple[int, int, Layer]]] = {}
        for name, first, last, path in rows:
            parts.setdefault(name, []).append((first, last, single[flat(path)]))
        sites = {}
        for name, ranges in parts.items():
            ranges.sort(key=lambda part: part[0])
            starts = [1, *(last + 1 for _, last, _ in ranges)]
            # The layers must cover all rows in order.
            if [first for first, _, _ in ranges] == starts[:-1] and starts[-1] == outputs[name] + 1:
                sites[name] = Site(tuple(layer for _, _, layer in ranges))
        return sites
