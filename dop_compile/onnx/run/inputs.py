"""What enters the runtime: a processor's output, by the directory's own files or from the caller."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from dop_compile.hf.images import load_image
from dop_compile.hf.processors import load_processor
from dop_compile.hf.prompts import prompt_inputs
from dop_compile.onnx.contract.manifest import Manifest

# Typed loosely: transformers annotates only a part of what is used here
hf: Any = transformers

__all__ = ["Reader", "as_batch", "as_images", "generation_settings", "skeleton"]

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "guidance_scale": (None, 1.0),
    "stop_strings": (None,),
    "exponential_decay_length_penalty": (None,),
    "watermarking_config": (None,),
    "no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "bad_words_ids": (None, []),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "suppress_tokens": (None, []),
    "begin_suppress_tokens": (None, []),
    "sequence_bias": (None, {}),
}
"""Settings that change which token is next, and the values under which they do not."""


def generation_settings(folder: Path) -> Any:
    """The directory's generation configuration.

    Raises:
        ValueError: it asks for what this runtime does not do to logits.
    """
    settings = hf.GenerationConfig.from_pretrained(folder)
    for name, harmless in _UNSUPPORTED.items():
        if (value := getattr(settings, name, None)) not in harmless:
            raise ValueError(
                f"{folder / 'generation_config.json'}: {name} is {value!r}, which this runtime does not support; "
                "remove it from the model's generation_config and export again"
            )
    return settings


def skeleton(folder: Path, manifest: Manifest) -> Any:
    """The model without its weights, where its own rule for positions is needed; else None."""
    if manifest.positions != "model":
        return None
    name = manifest.model.class_name
    if not hasattr(hf, name):
        raise ValueError(f"the export is of {name}, which the installed transformers {hf.__version__} does not have")
    with torch.device("meta"):
        return getattr(hf, name)(hf.AutoConfig.from_pretrained(folder)).eval()


class Reader:
    """The directory's processor, or at least its tokenizer.

    Attributes:
        processor, tokenizer: None where they cannot be loaded.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self._folder = folder
        self._pad = manifest.model.pad_token_id
        self.processor: Any = None
        self.tokenizer: Any = None
        self._reason = "it was exported without its processor"
        names = {data.file for data in manifest.files}
        if names & {"processor_config.json", "preprocessor_config.json"}:
            try:
                self.processor = load_processor(folder)
                self.tokenizer = getattr(self.processor, "tokenizer", None)
            except (ImportError, OSError, ValueError) as error:
                self._reason = " ".join(str(error).split())[:200]
        if self.tokenizer is None and "tokenizer_config.json" in names:
            self.tokenizer = hf.AutoTokenizer.from_pretrained(folder)

    def read(self, images: Sequence[Sequence[Image.Image]], prompts: Sequence[str]) -> dict[str, Tensor]:
        """One batch, padded on the left; `images` are each prompt's own.

        Raises:
            ValueError: no processor can be loaded.
        """
        if self.processor is None:
            raise ValueError(
                f"{self._folder}: its processor cannot be loaded ({self._reason}); give a processor's output to "
                "generate()"
            )
        rows = [prompt_inputs(self.processor, text, own) for text, own in zip(prompts, images, strict=True)]
        return merged([as_batch(row) for row in rows], self._pad)

    def text(self, ids: Sequence[int]) -> str:
        """Special tokens left out; "" without a tokenizer."""
        if self.tokenizer is None:
            return ""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def as_batch(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """A processor's output, numpy arrays or tensors, with an attention mask.

    Raises:
        ValueError: no token ids of shape (batch, tokens), or arrays that do not go with them.
    """
    found = {}
    for name, value in inputs.items():
        if value is None:
            continue
        array = value.detach().cpu() if isinstance(value, Tensor) else np.asarray(value)
        if isinstance(array, np.ndarray) and array.dtype.kind not in "biuf":
            raise ValueError(f"{name}: expected numbers, as a processor returns them, got {array.dtype}; leave it out")
        found[name] = array if isinstance(array, Tensor) else torch.from_numpy(array)
    ids = found.get("input_ids")
    if ids is None or ids.dim() != 2 or not ids.numel() or ids.is_floating_point():
        got = "none" if ids is None else f"{tuple(ids.shape)} {ids.dtype}"
        raise ValueError(f"input_ids: expected integers of shape (batch, tokens), got {got}")
    mask = found.setdefault("attention_mask", torch.ones_like(ids))
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask: expected the shape of input_ids {tuple(ids.shape)}, got {tuple(mask.shape)}")
    if bool((mask.bool()[:, :-1] & ~mask.bool()[:, 1:]).any()):
        raise ValueError("attention_mask: expected padding on the left alone")
    return {**found, "input_ids": ids.long(), "attention_mask": mask.long()}


def merged(rows: Sequence[Mapping[str, Tensor]], pad_id: int) -> dict[str, Tensor]:
    """Prompts of one row as one batch: tokens padded on the left, pixels one after the other."""
    width = max(row["input_ids"].shape[1] for row in rows)
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        parts = [row[name] for row in rows if name in row]
        if all(row[name].shape == row["input_ids"].shape for row in rows if name in row):
            if len(parts) < len(rows):  # token types of a prompt without images
                parts = [row.get(name, torch.zeros_like(row["input_ids"])) for row in rows]
            value = pad_id if name == "input_ids" else 0
            parts = [pad(part, (width - part.shape[1], 0), value=value) for part in parts]
        elif parts[0].dim() > 1:  # tiles are padded to the largest image
            tiles = max(part.shape[1] for part in parts)
            parts = [pad(p, (0, 0) * (p.dim() - 2) + (0, tiles - p.shape[1])) for p in parts]
        found[name] = torch.cat(parts)
    return found


def as_images(image: Any) -> list[Image.Image]:
    """One prompt's images: none, one (a picture or a file), or a list of them; upright and in RGB."""
    if image is None:
        return []
    if isinstance(image, list | tuple):
        return [picture for one in image for picture in as_images(one)]
    if not isinstance(image, str | os.PathLike | Image.Image):
        raise TypeError(f"image: expected a PIL image, a file, or a list of them, got {type(image).__name__}")
    return [load_image(image)]
