"""Which patches a layer still reads: against an independent account of what a uniform stride keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dop_compile import Policy
from dop_compile.errors import UnsupportedUsageError
from dop_compile.policy.ranking import Ranking, Stage
from dop_compile.reports.kept_patches import kept_figure, kept_patches, stretches
from tests.command_line import refused, run
from tests.families import FAMILIES
from tests.local_llava import local_llava, local_processor, picture
from tests.support import compile_eagerly, make_batch, shared_model, uniform_kept

SPLIT = {"mha_query_depth": 1, "mha_key_value_depth": 3, "mlp_depth": 2}


def test_what_happens_layer_by_layer() -> None:
    assert [str(part) for part in stretches(Policy.depthwise(6, **SPLIT))] == [
        "layers 0-1: updated",
        "layer 2: read only",
        "layers 3-5: absent",
    ]
    assert [str(part) for part in stretches(Policy.full(4))] == ["layers 0-3: updated"]
    holes = Policy.from_operations(3, [("visual", 1, m) for m in ("mha_query", "mha_key_value", "mlp")])
    assert [part.state for part in stretches(holes)] == ["updated", "absent", "updated"]


@pytest.mark.parametrize(
    "policy", [Policy(4, salient_fraction=0.5), Policy(4, ranking=Ranking("last_token", (Stage(0, tokens=2),)))]
)
def test_tokens_that_are_told_apart_inside_are_refused(policy: Policy) -> None:
    with pytest.raises(UnsupportedUsageError, match="tells visual tokens apart"):
        stretches(policy)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_patches_are_those_that_enter(name: str) -> None:
    """Two pictures of a prompt, in raster order: the ordinals that the reference is given."""
    family = FAMILIES[name]
    batch = make_batch(
        name, [[("text", 3), ("image",), ("text", 2), ("image", 1), ("text", 4)]], model=shared_model(name)
    )
    policy = Policy.depthwise(family.num_layers, **SPLIT, visual_tokens=5)
    compiled = compile_eagerly(batch.model, {"full": Policy.full(family.num_layers), "few": policy})
    found = kept_patches(compiled, batch.inputs, "few")
    sizes = family.item_sizes(batch.model, [[("image",), ("image", 1)]])[0]
    assert [patches.size for patches in found] == sizes
    flat = np.concatenate([patches.ravel() for patches in found])
    assert np.flatnonzero(flat).tolist() == sorted(uniform_kept(batch, 5)[0])
    if (grid := batch.inputs.get("image_grid_thw")) is not None:
        merge = batch.model.config.vision_config.spatial_merge_size
        assert [patches.shape for patches in found] == [(h // merge, w // merge) for _, h, w in grid.tolist()]
    assert all(patches.all() for patches in kept_patches(compiled, batch.inputs))


def test_pictures_in_tiles_and_several_rows_are_refused() -> None:
    batch = make_batch("llava_next", [[("text", 3), ("image",), ("text", 4)]], model=shared_model("llava_next"))
    compiled = compile_eagerly(batch.model, Policy.depthwise(batch.family.num_layers, mlp_depth=1))
    with pytest.raises(UnsupportedUsageError, match="cut into tiles"):
        kept_patches(compiled, batch.inputs)
    two = make_batch("llava", [[("image",)], [("image",)]], model=shared_model("llava"))
    with pytest.raises(ValueError, match="one row, got 2"):
        kept_patches(compile_eagerly(two.model, Policy.full(two.family.num_layers)), two.inputs)


def test_dropped_patches_fade() -> None:
    pytest.importorskip("matplotlib")
    shown = np.zeros((8, 8, 3))
    shown[..., 0] = 1.0  # red
    kept = np.array([[True, False], [False, False]])
    panels = kept_figure(
        [shown], [kept], Policy.depthwise(3, mha_query_depth=1, mha_key_value_depth=2, mlp_depth=1)
    ).axes
    updated, read, absent = (np.asarray(panel.images[0].get_array()) for panel in panels)
    assert np.allclose(updated[:4, :4], [1, 0, 0])
    assert (updated[4:] > 0.8).all()
    assert 0 < read[0, 0, 1] < read[0, 0, 0] < 1, "only read: greyer"
    assert np.allclose(absent, updated[7, 7])
    assert "1 of 4 patches" in panels[0].get_title()
    assert "0 of 4 patches" in panels[2].get_title()


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    local_llava(layers=2, hidden=32, image_size=56).save_pretrained(tmp_path / "model")
    local_processor(56).save_pretrained(tmp_path / "model")
    picture().save(tmp_path / "a.png")
    out = tmp_path / "kept.png"
    argv: list[Any] = ["run", str(tmp_path / "model"), "--image", str(tmp_path / "a.png"), "--prompt", "What is it ?"]
    argv += ["--visual-tokens", "5", "--mlp-depth", "1", "--max-new-tokens", "1", "--show-kept"]
    code, _, said = run(capsys, *argv, str(out))
    assert code == 0
    assert f"saved picture {out}" in said
    assert out.read_bytes().startswith(b"\x89PNG")
    assert "there already" in refused(capsys, *argv, str(out))
    assert run(capsys, *argv, str(out), "--force")[0] == 0
    assert "ends in .svg, .png, .pdf" in refused(capsys, *argv, str(tmp_path / "kept.jpeg"))
    assert torch.is_grad_enabled()
