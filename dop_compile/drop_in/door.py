"""What is refused at the door, before anything is traced."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dop_compile.drop_in.frame import GENERATE_REPLACED
from dop_compile.drop_in.wrapped_forward import wrapped_forward
from dop_compile.errors import UnsupportedModelError
from dop_compile.hf.copies import copy_path, rebound
from dop_compile.hf.fingerprint import model_fingerprint
from dop_compile.hf.kernels import is_flash
from dop_compile.hf.model_path import decoder_path, path_modules, placeholder_ids
from dop_compile.policy.policy import Policy
from dop_compile.reducers import create

__all__ = ["check_model", "check_policy"]

ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")


def check_model(model: PreTrainedModel, has_groups: bool) -> None:
    """Refuse a model that would not be pruned rightly.

    Raises:
        UnsupportedModelError: saying what is in the way, and what to do.
    """
    for name, module in path_modules(model, decoder_path(model)):
        if hasattr(module, "_hf_hook"):
            raise UnsupportedModelError(
                f"{name or 'the model'} ({type(module).__name__}) has a hook of accelerate, which spreads or offloads "
                "weights and which dop_compile would bypass; load the model onto one device (device_map={'': 0}), or "
                "by tensor parallelism (tp_plan='auto')"
            )
        if "forward" in vars(module) and (name or wrapped_forward(module) is None):
            raise UnsupportedModelError(
                f"the forward of {name or 'the model'} ({type(module).__name__}) was replaced on the instance, and "
                "dop_compile would bypass it; remove what replaced it (what accelerate puts around it for mixed "
                "precision may stay)"
            )
    generate = vars(model).get("generate")
    if generate is not None and rebound(generate, {id(model): nn.Module()}) is generate:
        raise UnsupportedModelError(GENERATE_REPLACED.format(type(model).__name__))
    decoder: Any = model.get_submodule(decoder_path(model))
    implementation = decoder.config._attn_implementation
    if implementation not in ATTENTION_IMPLEMENTATIONS and not is_flash(implementation):
        raise UnsupportedModelError(
            f"attention implementation {implementation!r} is not supported; load the model with attn_implementation="
            f"{', '.join(map(repr, ATTENTION_IMPLEMENTATIONS))} or 'flash_attention_2'"
        )
    multimodal = model.config.get_text_config(decoder=True) is not model.config
    says = any(hasattr(type(module), "get_placeholder_mask") for module in copy_path(model, decoder_path(model)))
    if multimodal and not says and not placeholder_ids(model.config) and not has_groups:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not say which tokens are visual (no get_placeholder_mask, no placeholder id "
            "in its configuration); pass token_groups"
        )
    devices = {parameter.device for parameter in decoder.parameters()}
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"the decoder's weights are on several devices ({', '.join(sorted(map(str, devices)))}); move the model to "
            "one device"
        )


def check_policy(model: PreTrainedModel, tier: str, policy: Any) -> None:
    """Refuse what is no policy for this model.

    Raises:
        TypeError, ValueError: naming the tier.
    """
    if not isinstance(policy, Policy):
        raise TypeError(f"tier {tier!r}: expected a Policy, got {type(policy).__name__}")
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    try:
        policy.check_layers(layers)
    except ValueError as error:
        raise ValueError(f"tier {tier!r}: {error}") from error
    if policy.reducer != "given":
        try:
            create(policy.reducer, policy.options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"tier {tier!r}: {error}") from error
    wanted = policy.provenance.model_fingerprint if policy.provenance is not None else None
    if wanted is not None and wanted != (found := model_fingerprint(model)):
        raise ValueError(
            f"tier {tier!r}: the policy was made for another model (fingerprint {wanted[:12]}, this model has "
            f"{found[:12]}); use policy.replace(provenance=None) to apply it all the same"
        )
