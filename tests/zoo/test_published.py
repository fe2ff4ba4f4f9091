"""Published policies: the papers' numbers, found by name and by a configuration, refused for other models."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest
import transformers as hf

from dop_compile import Policy, dop_compile
from dop_compile.hf.dimensions import DecoderDims
from dop_compile.policy.costs import prefill_flops_ratio
from dop_compile.reducers import registry
from dop_compile.zoo import PublishedPolicy, find, published_for, published_policies, split_reference
from tests.local_llava import local_llava

VICUNA_7B = {"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 11008}
VICUNA_13B = {
    **{"model_type": "llama", "num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 13824},
    **{"num_attention_heads": 40, "num_key_value_heads": 40},
}
QWEN = {
    **{"num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944},
    **{"num_attention_heads": 28, "num_key_value_heads": 4},
}
# What the checkpoints' config.json says, and the visual tokens of the published picture.
MODELS: dict[str, tuple[Any, int]] = {
    "llava-1.5-7b": (hf.LlavaConfig(text_config=VICUNA_7B), 576),
    "llava-1.5-13b": (hf.LlavaConfig(text_config=VICUNA_13B), 576),
    "llava-next-7b": (hf.LlavaNextConfig(text_config=VICUNA_7B), 2880),
    "llava-next-13b": (hf.LlavaNextConfig(text_config=VICUNA_13B), 2880),
    "qwen2.5-vl-7b": (hf.Qwen2_5_VLConfig(text_config=QWEN), 1296),
    "internvl3-8b": (hf.InternVLConfig(text_config={"model_type": "qwen2", **QWEN}), 1280),
}
# DOP's Tables 15 and 16: percent of FLOPs, d_A, d_P, n_v.
TABLES = {
    "llava-1.5-7b": ((37, 25, 19, 192), (28, 26, 19, 97), (23, 25, 16, 51)),
    "llava-1.5-13b": ((37, 40, 20, 192), (28, 40, 21, 96), (23, 31, 16, 58)),
    "llava-next-7b": ((23, 25, 16, 965), (14, 29, 16, 485), (9, 30, 16, 240)),
    "llava-next-13b": ((14, 38, 20, 480), (9, 38, 20, 240)),
    "qwen2.5-vl-7b": ((43, 28, 20, 640), (26, 28, 16, 384), (16, 28, 17, 165)),
    "internvl3-8b": ((27, 28, 17, 361), (18, 28, 19, 169)),
}
# ShortV's table of replaced layers, in its order.
SHORTV = {
    "llava-1.5-7b": "31,29,30,28,0,26,27,25,24,22,23,21,2,3,20,18,17,12,19",
    "llava-1.5-13b": "39,32,28,36,27,37,29,30,1,38,25,31,2,26,23,34,0,33,35,22,24,21,20,17",
    "llava-next-7b": "31,29,30,28,26,27,22,24,21,23,25,20,19,17,18,15,12,0,2",
    "llava-next-13b": "39,32,29,36,27,30,37,23,25,31,26,2,28,22,33,35,34,24,38,21,20,18,1,17",
}
ENTRIES = published_policies()


def reference(entry: PublishedPolicy) -> str:
    return entry.reference


def test_there_are_those_of_the_papers_and_no_others() -> None:
    wanted = {(name, f"{row[0]}%") for name, rows in TABLES.items() for row in rows}
    wanted |= {(name, "shortv") for name in SHORTV}
    assert {(entry.name, entry.budget) for entry in ENTRIES} == wanted
    assert len(ENTRIES) == len(wanted) == 20
    files = {file.name for file in (resources.files("dop_compile.zoo") / "policies").iterdir()}
    assert files == {f"{name}-{budget.rstrip('%')}.json" for name, budget in wanted}


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in TABLES.items() for row in rows])
def test_depths_and_tokens_are_those_of_the_tables(name: str, row: tuple[int, int, int, int]) -> None:
    percent, mha, mlp, tokens = row
    llava = name.startswith("llava")
    assert Policy.published(name, f"{percent}%") == Policy.depthwise(
        MODELS[name][0].get_text_config(decoder=True).num_hidden_layers,
        mha_depth=mha,
        mlp_depth=mlp,
        visual_tokens=tokens,
        reducer="cdpruner" if llava else "resize",
        positions="compact" if llava else "original",
    )
    entry = find(name, f"{percent}%")
    assert entry.flops == pytest.approx(percent / 100)
    assert entry.source == f"DOP, Table {15 if llava else 16}"


@pytest.mark.parametrize("name", SHORTV)
def test_shortv_reads_visual_tokens_in_the_layers_that_do_not_update_them(name: str) -> None:
    layers = sorted(map(int, SHORTV[name].split(",")))
    num_layers = MODELS[name][0].text_config.num_hidden_layers
    frozen = [("visual", layer, module) for layer in layers for module in ("mha_query", "mlp")]
    assert Policy.published(name, "shortv") == Policy.from_operations(num_layers, frozen)


@pytest.mark.parametrize("entry", ENTRIES, ids=reference)
def test_flops_are_the_published_ones(entry: PublishedPolicy) -> None:
    """Eq. 11 at the published geometry: to 1.3 points. ShortV's one number is a round one of its abstract."""
    config, visual = MODELS[entry.name]
    ratio = prefill_flops_ratio(config, Policy.published(entry.name, entry.budget), 35, visual, 100)
    if entry.budget != "shortv":
        assert entry.flops is not None
        assert 100 * ratio == pytest.approx(100 * entry.flops, abs=1.3)
    elif entry.flops is not None:
        assert 100 * ratio == pytest.approx(50, abs=1.5)
    else:  # most of the layers are frozen, and no token leaves
        assert 0.5 < ratio < 0.6
    assert entry.model.visual_tokens == visual


@pytest.mark.parametrize("entry", ENTRIES, ids=reference)
def test_documents_are_policies_that_are_written_as_they_are_read(entry: PublishedPolicy) -> None:
    policy = Policy.published(entry.name, entry.budget)
    assert policy.to_json() == entry.document.rstrip("\n")
    assert json.loads(entry.document)["format"] == "dop_compile.policy"
    assert policy.reducer in registry.known()
    assert (entry.accuracy is None) == (entry.accuracy_source == "") == (entry.budget == "shortv")
    assert "original ones" in entry.assumes


# --- models


@pytest.mark.parametrize("name", MODELS)
def test_a_configuration_finds_its_own_policies_alone(name: str) -> None:
    config, _ = MODELS[name]
    assert published_for(config) == (name,)
    for entry in ENTRIES:
        if entry.name == name:
            assert entry.model.geometry.dims == DecoderDims.from_config(config)
            assert Policy.published(name, entry.budget, config) == Policy.published(name, entry.budget)
        else:
            with pytest.raises(ValueError, match=rf"{entry.reference} was published for {entry.model.checkpoint}"):
                Policy.published(entry.name, entry.budget, config)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"num_hidden_layers": 31}, "num_hidden_layers 31 instead of 32"),
        ({"hidden_size": 2048}, "hidden_size 2048 instead of 4096"),
        ({"num_attention_heads": 16, "num_key_value_heads": 16}, "num_attention_heads 16 instead of 32"),
        ({"num_key_value_heads": 8}, "num_key_value_heads 8 instead of 32"),
        ({"intermediate_size": 14336}, "intermediate_size 14336 instead of 11008"),
    ],
)
def test_a_decoder_of_other_sizes_is_another_model(change: dict[str, int], difference: str) -> None:
    config = hf.LlavaConfig(text_config=VICUNA_7B | change)
    assert published_for(config) == ()
    with pytest.raises(ValueError, match=rf"this model is another: .*{difference}.*published_for"):
        Policy.published("llava-1.5-7b", "28%", config)


def test_pictures_of_other_sizes_are_of_another_model() -> None:
    tower = {"model_type": "clip_vision_model", "image_size": 224, "patch_size": 14}
    config = hf.LlavaConfig(text_config=VICUNA_7B, vision_config=tower)
    with pytest.raises(ValueError, match="another: picture_tokens 256 instead of 576"):
        Policy.published("llava-1.5-7b", "28%", config)
    half = hf.InternVLConfig(text_config={"model_type": "qwen2", **QWEN}, downsample_ratio=0.25)
    with pytest.raises(ValueError, match="another: picture_tokens 64 instead of 256"):
        Policy.published("internvl3-8b", "27%", half)


def test_text_models_and_towers_that_are_not_known_fit_nothing() -> None:
    llama = hf.LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008, num_attention_heads=32)
    assert published_for(llama) == ()
    with pytest.raises(ValueError, match=r"model_type llama instead of llava, picture_tokens None instead of 576"):
        Policy.published("llava-1.5-7b", "28%", llama)


def test_a_model_of_another_depth_refuses_it_when_compiled() -> None:
    with pytest.raises(ValueError, match="the policy is for 32 layers, the model has 2"):
        dop_compile(local_llava(layers=2, hidden=32, image_size=28), Policy.published("llava-1.5-7b", "28%"))


# --- names


def test_wrong_names_list_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"name: expected one of llava-1\.5-7b, .*internvl3-8b, got 'llava-1\.5-8b'"):
        Policy.published("llava-1.5-8b", "28%")
    with pytest.raises(ValueError, match=r"llava-1\.5-7b: expected one of 37%, 28%, 23%, shortv.*mean '28%'"):
        Policy.published("llava-1.5-7b", "28")
    with pytest.raises(ValueError, match=r"no '23%': .*misprint.*expected one of 14%, 9%, shortv"):
        Policy.published("llava-next-13b", "23%")
    with pytest.raises(TypeError, match=r"budget of llava-1\.5-7b: expected one of"):
        Policy.published("llava-1.5-7b", 0.28)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name: expected one of"):
        published_policies("llava")


def test_references() -> None:
    for entry in ENTRIES:
        assert find(*split_reference(entry.reference)) is entry
    for wrong in ("llava-1.5-7b/28%", "zoo:llava-1.5-7b", "zoo"):
        with pytest.raises(ValueError, match=r"expected zoo:NAME/BUDGET, such as zoo:llava-1\.5-7b/37%"):
            split_reference(wrong)
