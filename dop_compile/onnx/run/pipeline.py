"""`OnnxPipeline`: an exported directory as a server uses it, image and prompt in, text out.

    processor -> embed, vision graphs -> reduction, by a graph or Python -> prefill of a tier -> decode, token by token

The decoder, the vision tower and all weights are ONNX Runtime's. torch and transformers prepare the prompt (processor,
positions, reduction), hold the buffers, and never load a weight.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dop_compile.onnx.contract.manifest import Manifest
from dop_compile.onnx.run.bound_sessions import BoundStages
from dop_compile.onnx.run.decode import Decoder
from dop_compile.onnx.run.inputs import Reader, as_batch, as_images, generation_settings, skeleton
from dop_compile.onnx.run.latency import TierLatency, largest_fitting, measure_tier, measure_vision, tier_tokens
from dop_compile.onnx.run.plain import vision_items
from dop_compile.onnx.run.prepare import placeholders
from dop_compile.onnx.run.providers import choose_provider
from dop_compile.onnx.run.sampling import Sampler, Sampling
from dop_compile.onnx.run.stream import Token, TokenStream

__all__ = ["Generation", "OnnxPipeline", "Sampling", "Token"]

MEMORY = ("fast", "shared")
NEW_TOKENS = 64
"""Generated at most where neither the caller nor the model's generation configuration says."""


@dataclass(frozen=True)
class Generation:
    """What was generated for a batch.

    Args:
        texts: per row, without special tokens; "" without a tokenizer in the directory.
        ids: per row, with the token that ended it.
        tier: that was used.
        first_token_ms, total_ms: measured, from processed inputs to the first and to the last token.
    """

    texts: list[str]
    ids: list[list[int]]
    tier: str
    first_token_ms: float
    total_ms: float


class OnnxPipeline:
    """Sessions of an exported directory; made by `load`. May be used from several threads.

    Attributes:
        manifest: of the directory.
        tiers: names of the loaded tiers, the default first.
        provider: of ONNX Runtime, that runs the graphs.
        latencies: per tier, measured at load; empty if not measured.
        vision_ms: per vision graph, milliseconds of one image or video.
    """

    def __init__(self, stages: BoundStages, reader: Reader, settings: Any, tiers: Sequence[str], provider: str):
        self.manifest = stages.manifest
        self.tiers = tuple(tiers)
        self.provider = provider
        self.latencies: dict[str, TierLatency] = {}
        self.vision_ms: dict[str, float] = {}
        self._stages, self._reader, self._settings = stages, reader, settings

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        *,
        providers: Sequence[str] | None = None,
        memory: Literal["fast", "shared"] = "fast",
        tiers: Sequence[str] | None = None,
        measure: bool = True,
        hashes: bool = True,
    ) -> OnnxPipeline:
        """Open the graphs of a directory.

        Args:
            directory: what `export_onnx` wrote.
            providers: of ONNX Runtime, in order of preference; a line on stderr says where the first does not start.
                None: CUDA if it starts, else the processor.
            memory: "fast" packs weights for the processor, a copy per graph; "shared" leaves them in the mapped file,
                once for all tiers and all processes.
            tiers: to load; None: all.
            measure: run each graph some times, for `max_ms`.
            hashes: read every file once, and compare its content with the manifest.

        Raises:
            FileNotFoundError: no export, or a file of it is missing.
            ValueError: a file that is not the one exported, an unknown tier or provider.
            UnrunnableError: the provider has no kernel for the graphs' dtype or operators.
        """
        if memory not in MEMORY:
            raise ValueError(f"memory: expected 'fast' or 'shared', got {memory!r}")
        folder = Path(directory)
        manifest = Manifest.load(folder, hashes=hashes)
        chosen = list(manifest.tiers) if tiers is None else list(tiers)
        if not chosen or any(name not in manifest.tiers for name in chosen):
            raise ValueError(f"tiers: expected some of {', '.join(manifest.tiers)}, got {chosen}")
        settings = generation_settings(folder)
        provider = choose_provider(folder / manifest.graphs[manifest.embed].data.file, providers)
        stages = BoundStages(folder, manifest, skeleton(folder, manifest), provider, memory == "shared")
        pipeline = cls(stages, Reader(folder, manifest), settings, chosen, provider)
        used = {manifest.embed, *(vision.graph for vision in manifest.vision)}
        for name in chosen:
            used |= manifest.tiers[name].graphs
        for graph in sorted(used):
            stages.session(graph)
        if measure:
            pipeline.measure()
        return pipeline

    def measure(self) -> None:
        """Measure `latencies` and `vision_ms` anew."""
        self.vision_ms = {vision.graph: measure_vision(self._stages, vision) for vision in self.manifest.vision}
        self.latencies = {name: measure_tier(self._stages, name) for name in self.tiers}

    def __call__(self, image: Any, prompt: str | Sequence[str], **options: Any) -> Any:
        """Text for an image and a prompt, or a list of texts for lists of both; options are `generate`'s.

        Args:
            image: a PIL image, a file's path, a list of them (several images in one prompt), or None. With a list of
                prompts: a list with one of these per prompt.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        images = [image] if isinstance(prompt, str) else [None] * len(prompts) if image is None else image
        if not isinstance(images, list | tuple):
            raise TypeError(f"image: expected a list with one entry per prompt, got {type(image).__name__}")
        if not prompts or len(images) != len(prompts):
            raise ValueError(f"image: expected one entry per prompt, got {len(images)} for {len(prompts)}")
        texts = self.generate(self.process([as_images(one) for one in images], prompts), **options).texts
        return texts[0] if isinstance(prompt, str) else texts

    def process(self, images: Sequence[Sequence[Any]], prompts: Sequence[str]) -> dict[str, Tensor]:
        """A batch by the directory's processor: each prompt's images, and the prompts."""
        if self._reader.tokenizer is None:
            raise ValueError("the directory holds no tokenizer, so that there are no texts; use generate()")
        return self._reader.read(images, prompts)

    def predict_ms(self, inputs: Mapping[str, Any]) -> dict[str, float]:
        """Per tier, predicted milliseconds from processed inputs to the first token."""
        if not self.latencies:
            raise ValueError("max_ms: latencies were not measured; load with measure=True, or call measure()")
        batch = as_batch(inputs)
        vision = 0.0
        visual = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
        for modality in {graph.modality for graph in self.manifest.vision}:
            graphs = [graph for graph in self.manifest.vision if graph.modality == modality]
            if (pixels := batch.get(graphs[0].pixels)) is not None:
                vision += sum(self.vision_ms[graph.graph] for graph, _ in vision_items(graphs, pixels, batch))
                visual = placeholders(self.manifest, batch["input_ids"])
        mask = batch["attention_mask"].bool()
        return {
            name: vision + self.latencies[name].prefill_ms(tier_tokens(self.manifest.tiers[name], mask, visual))
            for name in self.tiers
        }

    def choose_tier(
        self,
        inputs: Mapping[str, Any],
        *,
        tier: str | None = None,
        max_ms: float | None = None,
        visual_indices: Sequence[Any] | None = None,
    ) -> str:
        """The tier that `generate` uses. `max_ms` chooses among tiers whose reducer is "given" where visual tokens are
        named, and among the others where not.

        Raises:
            ValueError: an unknown tier, both arguments, or no tier is predicted to fit.
        """
        if tier is not None and max_ms is not None:
            raise ValueError("give a tier or max_ms, not both")
        if max_ms is not None:
            tiers = {
                name: self.manifest.tiers[name]
                for name in self.tiers
                if (self.manifest.tiers[name].policy.reducer == "given") == (visual_indices is not None)
            }
            return largest_fitting(tiers, self.predict_ms(inputs), max_ms)
        if tier is not None and tier not in self.tiers:
            raise ValueError(f"tier {tier!r}: not loaded; expected one of {', '.join(self.tiers)}")
        return self.tiers[0] if tier is None else tier

    def generate(
        self,
        inputs: Mapping[str, Any],
        *,
        tier: str | None = None,
        max_ms: float | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop_token_ids: Collection[int] = (),
        stream: Callable[[Token], None] | None = None,
        visual_indices: Sequence[Any] | None = None,
    ) -> Generation:
        """Generate from a processor's output.

        Args:
            inputs: numpy arrays or tensors, padded on the left: `input_ids` (batch, tokens), `attention_mask`, and what
                the vision graphs take.
            tier: name; None: `max_ms`, else the first tier.
            max_ms: milliseconds to the first token; the tier of the most operations that is predicted to keep to it.
            max_new_tokens: None: of the model's generation configuration, else 64.
            sampling: None: greedy.
            stop_token_ids: end a row, besides the model's own.
            stream: is called with every token.
            visual_indices: per row, for policies whose reducer is "given".

        Raises:
            ValueError: inputs that the export does not take, no tier that fits `max_ms`.
        """
        start = time.perf_counter()
        limit = self._settings.max_new_tokens or NEW_TOKENS if max_new_tokens is None else max_new_tokens
        if limit < 1:
            raise ValueError(f"max_new_tokens: expected a number >= 1, got {limit}")
        batch = as_batch(inputs)
        name = self.choose_tier(batch, tier=tier, max_ms=max_ms, visual_indices=visual_indices)
        logits, decoder = self._prefill(name, batch, visual_indices, limit)
        model, ids = self.manifest.model, batch["input_ids"].numpy()
        sampler = Sampler(self._sampling(sampling), ids, batch["attention_mask"].bool().numpy(), model.vocabulary)
        found = TokenStream(len(ids), {*model.eos_token_ids, *stop_token_ids}, limit, self._reader.text, stream)
        first_ms = 0.0
        while True:
            chosen = sampler.pick(logits.float().cpu().numpy())
            first_ms = first_ms or (time.perf_counter() - start) * 1e3
            found.add(chosen.tolist())
            if found.done:
                break
            assert decoder is not None
            logits = decoder.step(torch.from_numpy(chosen))
        texts = [self._reader.text(row) for row in found.ids]
        return Generation(texts, found.ids, name, first_ms, (time.perf_counter() - start) * 1e3)

    def _prefill(
        self, tier: str, batch: Mapping[str, Tensor], given: Sequence[Any] | None, limit: int
    ) -> tuple[Tensor, Decoder | None]:
        """Logits (batch, vocabulary) of the first token, and what computes the others, if there can be any."""
        stages, info = self._stages, self.manifest.tiers[tier]
        prepared = stages.prepare(tier, batch, given)
        outputs = stages.session(info.prefill).run_in_place(prepared.inputs)
        if limit == 1:
            return outputs["logits"], None
        decode = stages.session(info.decode)
        return outputs["logits"], Decoder(decode, self.manifest, tier, prepared, outputs, limit - 1)

    def _sampling(self, sampling: Sampling | None) -> Sampling:
        sampling = sampling or Sampling()
        if sampling.repetition_penalty is None:
            sampling = replace(sampling, repetition_penalty=self._settings.repetition_penalty or 1.0)
        return sampling
