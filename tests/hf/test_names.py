"""What is known of transformers by name is there: a release that renames it fails here, and not in a user's call."""

from __future__ import annotations

import functools
import inspect
from pathlib import Path

import peft
import pytest
import transformers
from accelerate import accelerator
from transformers.models.llama import modeling_llama

from dop_compile.hf import kernels, names, private, rebuilt

ROOT = Path(transformers.__file__).parent
OF_MODELS = (
    *names.PLACEHOLDER_IDS,
    *names.NEWLINE_EMBEDDINGS,
    *names.FEATURE_METHODS,
    *names.PROJECTORS,
    *names.ATTENTIONS,
    *names.CLASS_TOKENS,
    *names.FIXED_TOWERS,
    *names.REARRANGED,
    *names.CONVERSATION_ATTRIBUTES,
    *names.PACKED_FEATURES,
    *names.PACKED_FEATURES.values(),
    names.PER_LAYER,
    "get_per_layer_inputs",
    *names.UNUSED_ARGUMENTS,
    *names.LEAVES_ROWS_OUT,
    *names.REFUSED_OUTPUTS,
    *names.NOT_OF_EAGER,
    *names.UNPRUNABLE_SETTINGS,
    *names.UNPRUNABLE_LAYERS,
    *names.PLAIN_MLP,
    *names.GATED_PREFIXES,
    *names.ATTENTION_LAYERS,
    *names.MIXER_LAYERS,
    *names.STATE_UPDATES,
    *names.MIXED_BY,
    *names.EXPERT_COUNTS,
    names.EXPERTS_SWITCH,
    names.PER_LAYER_SIZE,
    *[name for name in names.UNLIKE_LAYERS if name != "is_heterogeneous"],
    *names.TYPE_IDS,
    *names.TILED,
    "eager_attention_forward",
    kernels.ATTENTION_REGISTRY,
)


@functools.cache
def sources() -> str:
    files = sorted((ROOT / "models").glob("*/*.py"))
    return "\n".join(file.read_text() for file in files if file.name.startswith(("modeling_", "configuration_")))


@pytest.mark.parametrize("name", sorted(set(OF_MODELS)))
def test_models_have_it(name: str) -> None:
    assert name in sources()


def test_model_types_are_told_apart_by_their_configuration() -> None:
    for name in names.PLAIN_MLP:
        assert name in transformers.CONFIG_MAPPING


def test_a_release_without_a_name_is_noticed() -> None:
    assert "a_name_that_no_model_has" not in sources()


def test_builders_take_what_they_pad() -> None:
    assert any(names.BLOCKS in inspect.signature(builder).parameters for builder in kernels.MASK_BUILDERS)


def test_generation_has_a_server_loop() -> None:
    for name in names.CONTINUOUS_BATCHING:
        assert hasattr(transformers.PreTrainedModel, name) or hasattr(transformers.GenerationMixin, name)


def test_accelerate_notes_what_it_wraps() -> None:
    for name in names.PREPARATION:
        assert name in inspect.getsource(accelerator)


def test_peft_writes_these_files() -> None:
    assert peft.utils.SAFETENSORS_WEIGHTS_NAME in names.ADAPTER_FILES
    assert peft.utils.WEIGHTS_NAME in names.ADAPTER_FILES
    assert peft.utils.CONFIG_NAME in names.ADAPTER_FILES
    assert peft.utils.SAFETENSORS_WEIGHTS_NAME == names.ADAPTER_WEIGHTS


def test_modeling_files_look_kernels_up_by_that_name() -> None:
    assert vars(modeling_llama)[kernels.ATTENTION_REGISTRY] is private.ALL_ATTENTION_FUNCTIONS
    forward = inspect.unwrap(modeling_llama.LlamaAttention.forward)
    assert kernels.ATTENTION_REGISTRY in rebuilt.names_in(forward)


def test_a_rebuilt_function_sees_other_globals_and_the_original_its_own() -> None:
    forward = inspect.unwrap(modeling_llama.LlamaAttention.forward)
    made = rebuilt.with_globals(forward, {**forward.__globals__, kernels.ATTENTION_REGISTRY: None})
    assert made.__globals__[kernels.ATTENTION_REGISTRY] is None
    assert forward.__globals__[kernels.ATTENTION_REGISTRY] is not None
    assert [*inspect.signature(made).parameters] == [*inspect.signature(forward).parameters]
