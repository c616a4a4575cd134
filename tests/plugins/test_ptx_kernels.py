"""The kernels as NVRTC compiles them for each architecture, run on the CPU, against the reference."""

from __future__ import annotations

import contextlib

import pytest

from tests.conftest import shared
from tests.plugins.emulator import HostMachine
from tests.plugins.ptx import PtxMachine, needs_ptx
from trtq.plugins.variants import all_variants, fused_variants
from trtq.selftest.cases import checks_for

pytestmark = needs_ptx

ARCHITECTURES = ("sm75", "sm80", "sm90", "sm120")
"""One for each form of the PTX: small products, products of 4 bits, bytes only, the newer compiler."""
FAST = {
    *(
        "two launches/w8a8-odd-nhwc",
        "two launches/w4a8-groups-nchw",
        "two launches/native-odd-nchw",
    ),
    *("tiles/w8a8-64x64-1", "tiles/w4a8-64x64-2", "tiles/native-64x64-3"),
    *("residual/whole stores-w8a8-nchw", "residual/single stores-native-nhwc"),
    *("norms/half-w4a8-layer norm", "norms/half-native-group norm, SiLU, shift"),
    *("tokens/w4a4", "outside/native", "not finite/w8a8", "extreme/w8a8"),
}
"""Cases of `make test`: few variants, because building one takes longer than all its cases."""
FUSED = {("sm80", "fused/half-w4a8-odd-nchw"), ("sm120", "fused/float-w8a8-groups-nhwc")}


def _cases():
    for architecture in ARCHITECTURES:
        for check in checks_for(architecture):
            name = f"{check.group}/{check}"
            fast = name in FAST or (architecture, name) in FUSED
            marks = () if fast else (pytest.mark.slow,)
            yield pytest.param(architecture, check, id=f"{architecture}/{name}", marks=marks)


@pytest.fixture(scope="session")
def machines(tmp_path_factory):
    folder = shared(tmp_path_factory, "ptx", lambda _: None)
    return {name: PtxMachine(folder, name) for name in ARCHITECTURES}


class Recorder(HostMachine):
    """A machine that notes the variants of launches, and runs nothing."""

    def __init__(self):
        self.variants = set()

    def run(self, launch, seed, memory):
        self.variants.add(launch.variant)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_variant_has_a_case(architecture):
    recorder = Recorder()
    for check in checks_for(architecture):
        with contextlib.suppress(AssertionError):
            check.call(recorder)
    plain = {v for v in recorder.variants if not (v.residual or v.silu or v.form)}
    assert plain == set(all_variants(architecture))
    norms = {v for v in recorder.variants if v.form}
    assert norms == {v for v in fused_variants(architecture) if v.form}


@pytest.mark.parametrize(("architecture", "check"), [*_cases()])
def test_the_ptx_computes_the_reference(machines, architecture, check):
    check.call(machines[architecture])
