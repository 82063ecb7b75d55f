"""Which launches overlap: on cards that can, unless it is switched off, with the launch before if early."""

import pytest
import torch
from hybridkv_kernels.launch import OVERLAP_SWITCH, overlap


@pytest.mark.parametrize(
    ("device", "capability", "switch", "expected"),
    [
        ("cuda", (9, 0), None, True),
        ("cuda", (12, 1), "1", True),
        ("cuda", (9, 0), "0", False),
        ("cuda", (8, 9), None, False),
        ("cpu", (9, 0), None, False),
    ],
)
def test_cards_from_hopper_on_overlap(
    device: str,
    capability: tuple[int, int],
    switch: str | None,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Past the cache.
    decide = overlap.__wrapped__
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.delenv(OVERLAP_SWITCH, raising=False)
    if switch is not None:
        monkeypatch.setenv(OVERLAP_SWITCH, switch)
    assert decide(torch.device(device)) == {"OVERLAP": expected}
    # Only such a launch is marked for the driver.
    early = {"OVERLAP": True, "launch_pdl": True} if expected else {"OVERLAP": False}
    assert decide(torch.device(device), early=True) == early
