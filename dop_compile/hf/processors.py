"""A model's processor, also where a part of it needs a package that is missing.

`AutoProcessor` loads all parts or none: without torchvision Qwen2.5-VL's cannot be had at all, for its video processor
alone. Here the parts are then loaded one by one, and the model's own processor class is put together from them, with
its chat template and placeholders:

1. Tokenizer and image processor load; any other part that lacks a package is a `MissingPart`, which says so when it is
   used, and keeps its settings when the processor is saved.
(refused) 2. Tokenizer, image processor or the processor class itself lack a package. 3. Parts of other kinds than
   those of transformers' auto classes. The error is transformers', which names the package.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

import transformers

__all__ = ["MissingPart", "load_processor"]

# Typed loosely: transformers annotates only a part of what is used here
hf: Any = transformers
PushToHubMixin: Any = hf.utils.PushToHubMixin

AUTO_CLASSES = {
    "tokenizer": "AutoTokenizer",
    "image_processor": "AutoImageProcessor",
    "video_processor": "AutoVideoProcessor",
    "feature_extractor": "AutoFeatureExtractor",
}
NEEDED = ("tokenizer", "image_processor")
CLASS_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
)
"""Files that may name the processor's class, in the order in which `AutoProcessor` looks."""
PART_FILES = ("video_preprocessor_config.json", "preprocessor_config.json")
"""Files that may hold a missing part's settings."""


class MissingPart(PushToHubMixin):  # type: ignore[misc]  # transformers writes the settings of these
    """Stands in a processor for a part that cannot be loaded here.

    Args:
        name: of the part in its processor, such as `video_processor`.
        reason: why it cannot be loaded.
        settings: what its files say.
    """

    _auto_class = None
    model_input_names: tuple[str, ...] = ()

    def __init__(self, name: str, reason: str, settings: dict[str, Any]):
        self.name, self.reason, self.settings = name, reason, settings

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ImportError(f"{self.name} is not there: {self.reason}")

    def __getattr__(self, attribute: str) -> NoReturn:
        about = vars(self)  # empty while an instance is copied
        raise AttributeError(f"{about.get('name')}.{attribute} is not there: {about.get('reason')}")

    def to_dict(self) -> dict[str, Any]:
        return dict(self.settings)


def load_processor(name_or_directory: str | os.PathLike[str], **settings: Any) -> Any:
    """A model's processor, with `MissingPart` in place of parts whose package is missing.

    Args:
        name_or_directory: of a model, local or on the hub.
        settings: of `AutoProcessor.from_pretrained`, for example `revision`.

    Raises:
        OSError, ValueError: there is no processor, or a damaged one.
        ImportError: a package is missing without which it reads no text or no images; the message names it.
    """
    name = os.fspath(name_or_directory)
    try:
        return hf.AutoProcessor.from_pretrained(name, **settings)
    except (ImportError, ValueError) as error:
        if not _lacks_package(error):
            raise
        kind = _processor_class(name, settings)
        if kind is None or not set(NEEDED) <= set(kind.get_attributes()) <= set(AUTO_CLASSES):
            raise
        return _assembled(kind, name, settings)


def _lacks_package(error: Exception) -> bool:
    return isinstance(error, ImportError) or "to be installed" in str(error)


def _read(name: str, file: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What one JSON file of a model says; nothing if it is not there."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    path = hf.utils.cached_file(name, file, **quiet, **settings)
    return {} if path is None else dict(json.loads(Path(path).read_text(encoding="utf-8")))


def _processor_class(name: str, settings: dict[str, Any]) -> Any:
    for file in CLASS_FILES:
        if (kind := _read(name, file, settings).get("processor_class")) is not None:
            return getattr(hf, kind, None)
    config = hf.AutoConfig.from_pretrained(name, **settings)
    return hf.models.auto.processing_auto.PROCESSOR_MAPPING.get(type(config), None)


def _assembled(kind: Any, name: str, settings: dict[str, Any]) -> Any:
    """A processor of class `kind` from parts that are loaded one by one."""
    about, unused = kind.get_processor_dict(name, **settings)
    parts = [_part(part, name, about, settings) for part in kind.get_attributes()]

    class Lenient(kind):  # type: ignore[misc]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if isinstance(argument, MissingPart):
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    processor = Lenient.from_args_and_dict(parts, about, **unused)
    processor.__class__ = kind
    return processor


def _part(part: str, name: str, about: dict[str, Any], settings: dict[str, Any]) -> Any:
    try:
        return getattr(hf, AUTO_CLASSES[part]).from_pretrained(name, **settings)
    except (ImportError, ValueError) as error:
        if part in NEEDED or not _lacks_package(error):
            raise
        own = next((found for file in PART_FILES if (found := _read(name, file, settings))), {})
        return MissingPart(part, " ".join(str(error).split()), about.get(part) or own)
