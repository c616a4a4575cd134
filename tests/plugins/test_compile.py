"""Kernels are compiled to cubins without a GPU."""

import pytest

from trtq.errors import KernelError, MissingDependencyError
from trtq.plugins import compile as compiling
from trtq.plugins.compile import build_all, cubin
from trtq.plugins.variants import ARCHITECTURES, TILES, Variant, all_variants, fused_variants

ELF = b"\x7fELF"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRTQ_CACHE", str(tmp_path))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_for_every_architecture(architecture):
    """Compile convolutions with small tiles and half values; `build_all` compiles all variants."""
    norms = [variant for variant in fused_variants(architecture) if variant.form]
    for variant in (*all_variants(architecture), *norms):
        conv = not (variant.pointwise or variant.channels_last)
        if variant.half and conv and variant.tile in (None, TILES[0]):
            assert cubin(variant, architecture)[:4] == ELF, variant


@pytest.mark.slow
def test_every_variant_compiles_for_every_architecture():
    built = build_all()
    assert sorted(built) == sorted(ARCHITECTURES)
    assert "low_bit-f16-w4-a4-1x1-nhwc-128x128" in built["sm86"]
    assert "low_bit-f32-w8-residual-nchw-64x64" in built["sm120"]
    assert "norm_codes-rows-f16-w4" in built["sm75"]
    assert not any("a4" in name for name in built["sm90"])


def test_a_cubin_is_compiled_once(monkeypatch):
    variant = Variant("quantize", half=True, native_4=False)
    code = cubin(variant, "sm80")
    monkeypatch.setattr(compiling, "_compile", lambda *_: pytest.fail("compiled again"))
    assert cubin(variant, "sm80") == code


def test_a_changed_source_is_compiled_again(monkeypatch):
    variant = Variant("quantize", half=True, native_4=False)
    cubin(variant, "sm80")
    changed = {**compiling.sources("quantize"), "kernel.cu": "syntax error"}
    monkeypatch.setattr(compiling, "sources", lambda _: changed)
    with pytest.raises(KernelError, match=r"quantize-f16 for sm80: kernel.cu\(1\): error"):
        cubin(variant, "sm80")


def test_an_unknown_architecture_is_named():
    with pytest.raises(KernelError, match="cannot compile quantize-f16 for sm19"):
        cubin(Variant("quantize", half=True, native_4=False), "sm19")


def test_without_nvrtc_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingDependencyError, match=r"trtq\[plugins\]"):
        compiling._nvrtc()


def test_without_a_cache_folder_kernels_are_compiled_each_time(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRTQ_CACHE", str(tmp_path / "file"))
    assert cubin(Variant("quantize", half=True, native_4=False), "sm80")[:4] == ELF
