"""From a Hugging Face model and a policy to a drop-in model whose decoder skips what the policy prunes.

HF model --trace--> decoder graph --annotate--> blocks (layer, module)
policy   --normalise--> keep table (group, layer, module)
                 graph + keep table --passes--> pruned graph --verify--> pieces: eager | torch.compile
"""

from __future__ import annotations

import copy
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from dop_compile.drop_in.door import check_model, check_policy
from dop_compile.drop_in.following import OriginalFollower, Views
from dop_compile.drop_in.model import drop_in
from dop_compile.drop_in.structure import Structure
from dop_compile.drop_in.typed import CompiledModel
from dop_compile.errors import PassError, UnsupportedModelError
from dop_compile.hf.copies import copy_path
from dop_compile.hf.model_path import block_path, decoder_path, unblocked
from dop_compile.logs import PASSES, TRACE
from dop_compile.passes import PIPELINE, DecoderGraph, check_graph, run_passes
from dop_compile.passes.annotate import ANNOTATE
from dop_compile.passes.cleanup import eliminate_dead_nodes
from dop_compile.policy.keep import KeepTable
from dop_compile.policy.policy import Policy
from dop_compile.runtime.graphs import PrefillGraphs
from dop_compile.runtime.pieces import PieceLibrary, check_backend
from dop_compile.runtime.program import Program
from dop_compile.tokens import Universe
from dop_compile.tracing.local_sizes import localise_sizes
from dop_compile.tracing.side_inputs import default_inputs
from dop_compile.tracing.trace import DecoderInputs, TracedDecoder, trace_decoder

__all__ = ["CompiledState", "build_graph", "dop_compile"]

DEFAULT_TIER = "default"
PROGRAMS = 256
"""How many programs a compiled model keeps; the oldest go first, and are built again if they are asked for."""


def build_graph(
    decoder: nn.Module,
    keep: KeepTable,
    universe: Universe,
    inputs: DecoderInputs | None = None,
    *,
    disable: Sequence[str] = (),
    debug: bool = False,
) -> DecoderGraph:
    """Trace a decoder and run the pipeline: the whole compiler, but for what executes the graph.

    Args:
        decoder: a Hugging Face text decoder; it is not changed.
        keep: who takes part in which module.
        universe: the token groups and which of their rows are requested.
        inputs: the decoder's optional inputs.
        disable: names of optional passes to leave out.
        debug: verify after every pass and keep a diff of each.
    """
    return rewrite(trace(decoder, inputs), keep, universe, disable=disable, debug=debug, diff=debug)


def trace(decoder: nn.Module, inputs: DecoderInputs | None = None) -> TracedDecoder:
    """The decoder's graph, in which every node takes sizes from its own inputs."""
    started = time.perf_counter()
    traced = trace_decoder(decoder, inputs)
    localise_sizes(traced.graph)
    TRACE.info(
        "%s: %d nodes in %.0f ms",
        type(decoder).__name__,
        len(traced.graph.nodes),
        1000 * (time.perf_counter() - started),
    )
    return traced


def rewrite(
    traced: TracedDecoder,
    keep: KeepTable,
    universe: Universe,
    *,
    disable: Sequence[str] = (),
    debug: bool = False,
    diff: bool = False,
) -> DecoderGraph:
    """Run the pipeline on a traced decoder, which it changes; arguments as in `build_graph` and `run_passes`."""
    graph = DecoderGraph(traced, keep, universe, traced.inputs.cached)
    return run_passes(graph, PIPELINE, disable=disable, check=check_graph if debug else None, diff=diff)


class CompiledState:
    """What all tiers and calls of one compiled model share: its policies, programs and compiled pieces."""

    def __init__(
        self,
        model: PreTrainedModel,
        tiers: Mapping[str, Policy],
        library: PieceLibrary,
        token_groups: Tensor | Callable[[Tensor], Tensor] | None,
        disable: Sequence[str],
        debug: bool,
        graphs: PrefillGraphs | None = None,
    ):
        self.model_class = type(model)
        self.decoder_path = decoder_path(model)
        copies = copy_path(model, self.decoder_path)
        block_path(copies, self.decoder_path)
        self.base = copies[0]
        self.base.generation_config = copy.deepcopy(model.generation_config)  # to be set without changing the original
        self.original = OriginalFollower(model, copies, self.decoder_path)
        self.views = Views()
        self.tiers = dict(tiers)
        self.token_groups = token_groups
        self.library = library
        self.graphs = graphs
        self._disable = tuple(disable)
        self._debug = debug
        self._programs: dict[Any, Program] = {}
        self._traces: dict[DecoderInputs, TracedDecoder] = {}
        self._lock = threading.RLock()
        self._structure = Structure(self.base.get_submodule(self.decoder_path))

    @property
    def decoder(self) -> Any:
        return unblocked(self.base.get_submodule(self.decoder_path))

    @property
    def programs(self) -> tuple[Program, ...]:
        """The programs built so far, one per combination of pruning, request and inputs that calls have needed."""
        return tuple(self._programs.values())

    def check_tier(self, name: str) -> str:
        if name not in self.tiers:
            raise ValueError(f"tier {name!r} does not exist; this model was compiled with {', '.join(self.tiers)}")
        return name

    def program(self, keep: KeepTable, universe: Universe, inputs: DecoderInputs) -> Program:
        """The program for a keep table and a kind of request; built on first use."""
        key = (keep, universe, inputs)
        program = self._programs.get(key)
        if program is None:
            with self._lock:
                program = self._programs.get(key)
                if program is None:
                    graph = self._pruned(keep, universe, inputs)
                    program = self._programs[key] = Program(graph, self.library)
                    while len(self._programs) > PROGRAMS:
                        del self._programs[next(iter(self._programs))]
        return program

    def _pruned(self, keep: KeepTable, universe: Universe, inputs: DecoderInputs) -> DecoderGraph:
        logged = PASSES.isEnabledFor(logging.INFO)  # nobody else sees the lines that a pass has changed
        return rewrite(
            self._traced(inputs), keep, universe, disable=self._disable, debug=self._debug, diff=self._debug and logged
        )

    def _traced(self, inputs: DecoderInputs) -> TracedDecoder:
        """A copy of the decoder's graph for these inputs: tiers and requests differ in what they rewrite alone."""
        return self._trace(inputs).copy()

    def _trace(self, inputs: DecoderInputs) -> TracedDecoder:
        if inputs not in self._traces:
            self._traces[inputs] = trace(self.decoder, inputs)
        return self._traces[inputs]

    def can_begin_at(self, layer: int) -> bool:
        """Whether a run can go on from the residual stream that enters a layer alone."""
        with self._lock:
            return self._trace(default_inputs(self.decoder)).can_begin_at(layer)

    def sources(self) -> Mapping[int, int]:
        """Of layers that read the keys and values of an earlier layer, which one that is."""
        with self._lock:
            return self._trace(default_inputs(self.decoder)).sources

    def finish(self, embeds: Tensor) -> Tensor:
        """What the decoder returns for tokens that take part in no operation: (batch, tokens, hidden) each way."""
        with self._lock:
            program = self._programs.get("finish")
            if program is None:
                program = self._programs["finish"] = Program(self._bypass_graph(), PieceLibrary("eager"))
        result: Tensor = program({"inputs_embeds": embeds}, lambda spec: None)
        return result

    def _bypass_graph(self) -> DecoderGraph:
        keep = KeepTable.dense(self.decoder.config.num_hidden_layers)
        traced = self._traced(default_inputs(self.decoder, cached=False))
        graph = run_passes(DecoderGraph(traced, keep, Universe(keep.groups), False), (ANNOTATE,))
        embeds = next(node for node in graph.graph.nodes if node.name == "inputs_embeds")
        graph.junctions[-1].out.replace_all_uses_with(embeds)
        eliminate_dead_nodes(graph.graph)
        graph.junctions = []
        return graph

    def follow(self, view: nn.Module) -> None:
        """Hand on to the compiled model, and to one of its views, what the user has changed since the last call.

        Raises:
            UnsupportedUsageError: something was replaced that cannot be followed.
        """
        self.original.update()
        self.views.update(view)
        self.follow_changes()

    def stands_for(self, chain: list[Any]) -> dict[int, nn.Module]:
        """Which modules the copies of one call take the place of, by `id`."""
        return {**self.views.stands_for(chain[0]), **self.original.stands_for(chain)}

    def follow_changes(self) -> None:
        """Forget programs that were built for modules since replaced, hooked, moved or switched to training.

        Asked for once per call, and once per `generate`: it looks at every module.

        Raises:
            UnsupportedUsageError: the model is trained with gradient checkpointing.
        """
        if not self._structure.holds():
            with self._lock:
                self._programs.clear()
                self._traces.clear()
                self.library.clear()
                if self.graphs is not None:
                    self.graphs.clear()
                self._structure = Structure(self.base.get_submodule(self.decoder_path))


def dop_compile(
    model: PreTrainedModel,
    policy: Policy | Mapping[str, Policy],
    *,
    backend: str | Callable[..., Any] = "inductor",
    token_groups: Tensor | Callable[[Tensor], Tensor] | None = None,
    disable_passes: Sequence[str] = (),
    debug: bool = False,
    compile_options: Mapping[str, Any] | None = None,
    cuda_graphs: bool = False,
) -> CompiledModel:
    """Compile a model so that it skips the operations that a policy prunes.

    Args:
        model: a Hugging Face vision-language or causal language model. It is left as it is; the result shares its
            weights.
        policy: one policy, or several by tier name (budget tiers share weights and compiled code; the first is the
            default).
        backend: "inductor" or any backend of torch.compile, or "eager".
        token_groups: for text-only models: (batch, tokens) tensor, or a function input_ids -> tensor; 0 text, 1
            visual, 2 system.
        disable_passes: names of optional passes to leave out.
        debug: verify the graph after every pass.
        compile_options: further keyword arguments of torch.compile.
        cuda_graphs: capture the second prefill of a kind - tier, numbers of tokens - in a CUDA graph, and replay it for
            those after it. For one prompt at a time on a fast GPU, which otherwise waits for Python.

    Returns:
        a model of the same class. `forward` and `generate` also take `tier`, `visual_indices` (reducer "given") and
        `token_groups`; `tier(name)` gives a view with another default tier.

    Raises:
        TypeError: not a model that can generate, a compiled one, or not a policy.
        ValueError: a policy of another depth or for another model, an unknown backend, reducer or pass.
        UnsupportedModelError: the decoder cannot be traced or its blocks cannot be recognised.
    """
    tiers = dict(policy) if isinstance(policy, Mapping) else {DEFAULT_TIER: policy}
    if not tiers:
        raise ValueError("policy: an empty mapping; give at least one tier")
    check_backend(backend)
    if isinstance(getattr(model, "dop", None), CompiledState):
        raise TypeError("model is a compiled model already; pass the original, with all policies as tiers")
    decoder_path(model)
    for tier, value in tiers.items():
        check_policy(model, tier, value)
    check_model(model, token_groups is not None)
    library = PieceLibrary(backend, dict(compile_options or {}))
    graphs = PrefillGraphs() if cuda_graphs else None
    state = CompiledState(model, tiers, library, token_groups, disable_passes, debug, graphs)
    # Built now and not on the first call, so that a model that cannot be compiled is refused here
    keeps = [KeepTable.from_policy(next(iter(tiers.values())), ("text",))]
    keeps += [KeepTable.from_policy(value, value.groups) for value in tiers.values() if value.ranking is not None]
    try:
        for keep in keeps:
            state.program(keep, Universe(keep.groups), default_inputs(state.decoder))
    except (PassError, UnsupportedModelError) as error:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be pruned: {error}") from error
    compiled: CompiledModel = drop_in(state, state.base, next(iter(tiers)))
    return compiled
