"""The search for scales on a GPU: as on the CPU, and without a wait for the host."""

import pytest
import torch

from quantlib.grids.affine import AffineGrid
from quantlib.grids.given_scales import given_scales
from quantlib.methods.fitted_scales import fitted_scales
from quantlib.schemes import scheme_from_name

NAMES = ["W2A16", "W4A16", "W4A16_ASYM", "W8A16", "FP8A16", "NVFP4A16", "MXFP4A16", "NF4"]
ROWS, COLUMNS = 512, 1024


class Search:
    """Of one random weight on a device."""

    def __init__(self, name: str, device: torch.device) -> None:
        made = torch.Generator().manual_seed(4)
        self._scheme = scheme_from_name(name, 128 if name.startswith("W") else None)
        self._weight_RC = (torch.randn(ROWS, COLUMNS, generator=made) * 0.02).to(device)
        self._importance_C = torch.randn(COLUMNS, generator=made).exp().to(device)
        given = given_scales({"w": self._weight_RC}, [["w"]], self._scheme, scale_dtype=torch.bfloat16)
        self._given = given.get("w")

    def grid(self) -> AffineGrid:
        return fitted_scales(
            self._weight_RC,
            self._scheme,
            search="hessian",
            scale_dtype=torch.bfloat16,
            importance_C=self._importance_C,
            given=self._given,
        )


@pytest.mark.parametrize("name", NAMES)
def test_scales_are_those_of_the_cpu_but_for_candidates_as_good(name, device):
    found, expected = (Search(name, there).grid() for there in (device, torch.device("cpu")))
    # None differs on a CPU that sums errors in another order; a real mistake moves nearly all of them.
    close = torch.isclose(found.scale_RG.cpu().float(), expected.scale_RG.float(), rtol=1e-6, atol=0.0)
    assert close.float().mean() >= 0.995
    if expected.zero_RG is not None:
        assert found.zero_RG is not None
        assert (found.zero_RG.cpu() == expected.zero_RG).float().mean() >= 0.995


@pytest.mark.parametrize("name", NAMES)
def test_search_waits_for_nothing(name, device, without_waiting):
    search = Search(name, device)
    expected = search.grid()  # what stays on the device comes there
    with without_waiting():
        found = search.grid()
    assert torch.equal(found.scale_RG, expected.scale_RG)
    assert len(found.scale_RG.unique()) > 1
