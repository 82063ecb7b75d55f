"""The tuning run: each variant takes hold and is undone, and what is wrong is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hybridkv_kernels.chunk_score import triton as score
from scripts import load
from triton.runtime.errors import OutOfResources

tune = load("tune")
FEW = ("as it ships", "static heads beside the scores too", "scores of 4 chunks, 2 warps, 3 stages")


@pytest.mark.parametrize("name", tune.VARIANTS)
def test_a_variant_is_a_change_and_is_undone(name: str) -> None:
    variant = tune.VARIANTS[name]
    places = [*variant.constants, *variant.options]
    before = [getattr(module, attribute) for module, attribute in places]
    with variant.applied():
        now = [getattr(module, attribute) for module, attribute in places]
    # Two of them change the layer's plan or nothing.
    assert (now != before) == bool(places)
    assert before == [getattr(module, attribute) for module, attribute in places]


def test_a_changed_constant_reaches_the_kernel() -> None:
    from hybridkv_kernels.recall.layout import LandmarkLayout

    shape = (28, 4, 7, LandmarkLayout("sketch2", 128, 2))
    assert score.sketch_options(*shape).constexprs["TILE_CHUNKS"] == 2
    with tune.VARIANTS[FEW[2]].applied():
        options = score.sketch_options(*shape)
        assert (options.constexprs["TILE_CHUNKS"], options.num_warps, options.num_stages) == (4, 2, 3)
    assert score.sketch_options(*shape).constexprs["TILE_CHUNKS"] == 2


def test_all_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "VARIANTS", {name: tune.VARIANTS[name] for name in FEW})
    out = tmp_path / "new" / "tune.json"
    arguments = ["--out", str(out), "--prompt", "256", "--skew", "2"]
    assert tune.main(arguments) == 0
    report = json.loads(out.read_text())
    assert [*report["variants"]] == [*FEW]
    assert all(0 < record["error"] < 1e-2 for record in report["variants"].values())
    assert "static heads beside" in capsys.readouterr().out

    def nothing(*args: object, meanwhile: object, **kwargs: object) -> None:
        pass

    def too_large(*args: object, **kwargs: object) -> None:
        raise OutOfResources(300000, 232448, "shared memory")

    wrong = {
        name: tune.Variant({(tune.recall_decode, "chunk_recall"): kernel})
        for name, kernel in {"does nothing": nothing, "does not fit": too_large}.items()
    }
    monkeypatch.setattr(tune, "VARIANTS", wrong | {FEW[0]: tune.VARIANTS[FEW[0]]})
    assert tune.main(arguments) == 1
    found = json.loads(out.read_text())["variants"]
    assert found["does nothing"]["error"] > 1e-2
    assert found["does not fit"]["failed"].startswith("OutOfResources: out of resource: shared memory")
    assert found[FEW[0]]["error"] < 1e-2
    assert tune.main(["--dynamic", "0.1"]) == 2
