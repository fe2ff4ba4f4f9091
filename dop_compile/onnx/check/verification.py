"""Compare an exported directory with the PyTorch model that it was exported from, on real samples.

Every tier runs in ONNX Runtime with graph optimisations on and off, from pixels and ids to text, and every stage is the
exported one. A tier passes if the largest logit difference is within the tolerance (relative to the largest logit), KL
of the first token within it too, and every generated text is the same. Texts are greedy, without the logits processors
of the model's generation configuration.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from dop_compile.compiler import dop_compile
from dop_compile.hf.fingerprint import model_fingerprint
from dop_compile.onnx.contract.manifest import Manifest
from dop_compile.onnx.contract.parts import TierCheck, Verification
from dop_compile.onnx.run.plain import PlainPipeline
from dop_compile.onnx.run.providers import choose_provider
from dop_compile.onnx.run.sessions import UnrunnableError
from dop_compile.search.metrics import full_kl

__all__ = ["TOLERANCES", "verify"]

TOLERANCES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""By dtype, relative to the largest logit: rounding of that many bits through a decoder."""


def verify(
    directory: str | os.PathLike[str],
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    *,
    new_tokens: int = 16,
    provider: str = "CPUExecutionProvider",
    tolerance: float | None = None,
    samples_sha256: str = "",
    progress: bool = False,
) -> Verification:
    """Compare, keep the result in the directory's manifest, and return it.

    Args:
        directory: what `export_onnx` wrote.
        model: the model that was exported, in the same dtype, in eval mode.
        samples: prompts of one row as a processor returns them (`answers` are not looked at).
        new_tokens: length of the texts that are compared.
        provider: of ONNX Runtime.
        tolerance: see the module; by dtype if None.
        samples_sha256: recorded; of the samples' file.

    Raises:
        FileNotFoundError, ValueError: the directory is damaged, was exported from another model, no samples, or a
            provider that does not run here.
    """
    folder = Path(directory)
    manifest = Manifest.load(folder, hashes=True)
    choose_provider(folder / manifest.graphs[manifest.embed].data.file, [provider])
    if not len(samples):
        raise ValueError("samples: expected at least one, got none")
    found = str(model.dtype).removeprefix("torch.")
    if found != manifest.model.dtype:
        raise ValueError(f"the export is in {manifest.model.dtype}, the model in {found}; load it in that dtype")
    if (fingerprint := model_fingerprint(model)) != manifest.model.fingerprint:
        raise ValueError(
            f"{folder}: exported from another model (fingerprint {manifest.model.fingerprint[:12]}, this one has "
            f"{fingerprint[:12]})"
        )
    limit = TOLERANCES[found] if tolerance is None else tolerance
    result = Verification(
        runnable=True,
        reason="",
        provider=provider,
        samples_sha256=samples_sha256,
        new_tokens=new_tokens,
        tolerance=limit,
        passed=False,
        checks=(),
        versions=dict(_versions()),
    )
    try:
        checks = tuple(_checks(folder, manifest, model, samples, new_tokens, provider, limit, progress))
        result = replace(result, checks=checks, passed=all(check.passed for check in checks))
    except UnrunnableError as error:
        result = replace(result, runnable=False, reason=f"not runnable here: {error}")
    replace(manifest, verification=result).save(folder)
    return result


def _versions() -> Iterator[tuple[str, str]]:
    for name in ("torch", "transformers", "onnxruntime", "onnxruntime-gpu"):
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue


def _checks(
    folder: Path,
    manifest: Manifest,
    model: Any,
    samples: Sequence[Mapping[str, Any]],
    new_tokens: int,
    provider: str,
    limit: float,
    progress: bool,
) -> Iterator[TierCheck]:
    compiled = dop_compile(model, {name: tier.policy for name, tier in manifest.tiers.items()}, backend="eager")
    compiled.generation_config = _greedy(model.generation_config, new_tokens)
    total = len(samples) * len(manifest.tiers) * 2
    with tqdm(desc="verify", total=total, disable=not progress, leave=False, file=sys.stderr) as bar:
        runs = {on: PlainPipeline(folder, manifest, model, provider, on) for on in (True, False)}
        for pipeline in runs.values():  # what does not run is found out before PyTorch has worked for it
            pipeline.session(next(iter(manifest.tiers.values())).prefill)
        for tier in manifest.tiers:
            found: dict[bool, list[tuple[float, float, float, bool]]] = {True: [], False: []}
            for sample in samples:
                inputs = {n: v for n, v in sample.items() if n != "answers"}
                expected = _pytorch(compiled, tier, inputs)
                for optimized, pipeline in runs.items():
                    found[optimized].append(_compare(pipeline, tier, inputs, expected, new_tokens))
                    bar.update()
            for optimized, rows in found.items():
                yield _summary(tier, optimized, rows, limit)
                runs[optimized].close(manifest.tiers[tier].prefill)


def _greedy(settings: Any, new_tokens: int) -> GenerationConfig:
    """Settings without what forbids or penalises tokens: the model's own numbers are compared."""
    pad = settings.pad_token_id
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=settings.eos_token_id,
        pad_token_id=pad if isinstance(pad, int) else 0,
        output_logits=True,
        return_dict_in_generate=True,
    )


def _pytorch(compiled: Any, tier: str, inputs: Mapping[str, Any]) -> tuple[Tensor, list[int]]:
    """First-token logits (vocabulary,) and greedy ids of the PyTorch model."""
    moved = {n: v.to(compiled.device) if isinstance(v, Tensor) else v for n, v in inputs.items()}
    moved = {
        n: v.to(compiled.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in moved.items()
    }
    with torch.no_grad():
        result = compiled.generate(**moved, tier=tier)
    ids = result.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return result.logits[0][0].float().cpu(), ids


def _compare(
    pipeline: PlainPipeline, tier: str, inputs: Mapping[str, Any], expected: tuple[Tensor, list[int]], new_tokens: int
) -> tuple[float, float, float, bool]:
    """Largest logit difference, largest logit, KL in nats, and whether the generated ids are the same."""
    logits, ids = pipeline.generate(tier, pipeline.prepare(tier, inputs), new_tokens)
    wanted, text = expected
    difference = float((logits[0] - wanted).abs().max())
    kl = full_kl(wanted[None], logits[:1])
    return (
        difference,
        float(wanted.abs().max()),
        kl,
        _until_end(pipeline, ids[0].tolist()) == _until_end(pipeline, text),
    )


def _until_end(pipeline: PlainPipeline, ids: list[int]) -> list[int]:
    ends = set(pipeline.manifest.model.eos_token_ids)
    stop = next((number for number, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


def _summary(tier: str, optimized: bool, rows: list[tuple[float, float, float, bool]], limit: float) -> TierCheck:
    # Of tensors, since the builtin max drops NaN, which passes no comparison
    worst = torch.tensor([row[:3] for row in rows], dtype=torch.float64).amax(0)
    difference, scale, kl = worst.tolist()
    same = sum(row[3] for row in rows)
    passed = difference <= limit * scale and kl <= limit and same == len(rows)
    difference, scale, kl = worst.nan_to_num(1e38, 1e38).tolist()
    return TierCheck(tier, optimized, len(rows), difference, scale, kl, same, passed)


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file of samples."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
