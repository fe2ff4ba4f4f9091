"""The models that lmms-eval makes of `--model dop_compile`: one for chat messages, one for its simple requests.

Requests are answered in batches of the same generation arguments, padded on the left. Under `accelerate launch` or
`torchrun` lmms-eval gives every process its share of the documents, and each has the whole model on its own device.

(refused) Several rounds per document, and likelihoods of continuations whose first token merges with the prompt's last.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval import utils
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm
from transformers import AutoConfig, BatchFeature, LogitsProcessorList, StoppingCriteriaList

from dop_compile.plugins.lmms_eval.arguments import (
    batch_size_of,
    check_names,
    device_of,
    dtype_of,
    load_compiled,
    policy_of,
)
from dop_compile.plugins.lmms_eval.generation import AtStops, Forced, cut, losses, settings_of, stops_of
from dop_compile.plugins.lmms_eval.media import Conversation, read_messages, user_message
from dop_compile.plugins.lmms_eval.reading import Reader, load_processor

__all__ = ["DopCompile", "SimpleDopCompile"]


class _Base(lmms):  # type: ignore[misc]
    """Loads the model and answers conversations.

    Args:
        pretrained: a checkpoint, its directory or hub id.
        backend: of `dop_compile`.
        dtype: of the weights; "auto" is the checkpoint's.
        device, device_map: one device; "cuda" where there is one, unless given.
        batch_size: requests answered at once.
        max_batch_size: of lmms-eval, for automatic sizes; not used.
        attn_implementation: "eager" or "sdpa"; transformers' choice unless given.
        min_pixels, max_pixels: of a picture, for models that take pictures of any size.
        max_tiles: of a picture, for models that cut pictures in square tiles.
        max_num_frames: of a video, evenly spaced.
        frames_as_images: give a video's frames as pictures, for models that take no videos.
        max_new_tokens: of answers whose task says nothing.
        system_prompt: put before every conversation, or a file that holds it.
        chat_template: a file with a Jinja template, for checkpoints without one.
        revision: of the checkpoint on the hub.
        policy, tiers, tier: see `dop_compile.plugins.lmms_eval.arguments.policy_of`; or the policy's own fields, as
            `Policy.depthwise` takes them (`mha_depth=26,mlp_depth=19,visual_tokens=97,reducer=cdpruner`).

    Raises:
        TypeError: an argument that does not exist.
        ValueError: arguments that are not of this model, or contradict each other.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        backend: str = "inductor",
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        device_map: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        attn_implementation: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        max_tiles: int | None = None,
        max_num_frames: int = 8,
        frames_as_images: bool = False,
        max_new_tokens: int = 1024,
        system_prompt: str | None = None,
        chat_template: str | None = None,
        revision: str | None = None,
        **policy: Any,
    ):
        super().__init__()
        check_names(policy, ("pretrained", *inspect.getfullargspec(_Base.__init__).kwonlyargs))
        size, kind = batch_size_of(batch_size), dtype_of(dtype)
        self.accelerator = Accelerator(cpu="cpu" in (device, device_map))
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        local_rank = int(os.environ.get("LOCAL_RANK", self.accelerator.local_process_index))
        self._device = device_of(device, device_map, local_rank, self._world_size)
        pretrained = os.path.expanduser(pretrained)
        hub: dict[str, Any] = {} if revision is None else {"revision": str(revision)}
        config = AutoConfig.from_pretrained(pretrained, **hub)
        layers = config.get_text_config(decoder=True).num_hidden_layers
        self.policy = policy_of(pretrained, layers, policy)
        limits = (min_pixels, max_pixels, max_tiles)
        self.reader = Reader(load_processor(pretrained, chat_template, *limits, **hub), self.policy)
        loading = {"dtype": kind, "attn_implementation": attn_implementation, **hub}
        loading = {name: value for name, value in loading.items() if value is not None}
        self._model = load_compiled(pretrained, self.policy, backend, self._device, **loading)
        self._batch_size, self._max_new_tokens = size, int(max_new_tokens)
        self._frames, self._frames_as_images = int(max_num_frames), frames_as_images
        self._system_prompt = None if system_prompt is None else self._resolve_system_prompt(system_prompt)
        self._warned: set[str] = set()
        logger.info(f"dop_compile: {type(self._model).__name__}, {self.policy or 'original'}, {self._device}")

    @property
    def model(self) -> Any:
        """The compiled model, or the untouched one."""
        return self._model

    @property
    def config(self) -> Any:
        return self._model.config

    @property
    def tokenizer(self) -> Any:
        return self.reader.tokenizer

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def batch_size(self) -> int:
        return self._batch_size

    # --- what the two kinds of requests share -------------------------------------------------------------------------

    def _conversation(self, messages: Sequence[Any]) -> Conversation:
        whole = list(messages)
        if self._system_prompt:
            whole = self._apply_system_prompt(whole, self._system_prompt)
        return read_messages(whole, self._frames, frames_as_images=self._frames_as_images)

    def _document(self, task: str, split: str, number: Any) -> Any:
        return self.task_dict[task][split][number]

    def _answer_all(
        self, requests: Sequence[Any], kwargs_at: int, conversation: Callable[[Any], Conversation]
    ) -> list[GenerationResult]:
        """Answers in the order of the requests; `kwargs_at` is where generation arguments stand in one."""
        ordered = utils.Collator(
            [request.args for request in requests],
            lambda args: (-len(args[0]), args[0]),  # long ones first: what does not fit in memory fails at once
            group_fn=lambda args: {name: repr(value) for name, value in args[kwargs_at].items()},
            grouping=True,
        )
        answers: list[GenerationResult] = []
        seconds = 0.0
        with tqdm(total=len(requests), desc="dop_compile", disable=self.rank != 0) as bar:
            for chunk in ordered.get_batched(n=self._batch_size):
                began = time.perf_counter()
                found = self._answers([conversation(args) for args in chunk], chunk[0][kwargs_at])
                seconds += time.perf_counter() - began
                for args, answer in zip(chunk, found, strict=True):
                    self.cache_hook.add_partial("generate_until", (args[0], args[kwargs_at]), answer.text)
                answers += found
                bar.update(len(chunk))
        tokens = sum(answer.token_counts.output_tokens for answer in answers)
        log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0, {"rank": self.rank})
        return list(ordered.get_original(answers))

    @torch.no_grad()
    def _answers(self, conversations: list[Conversation], given: dict[str, Any]) -> list[GenerationResult]:
        settings, unknown = settings_of(given, self._max_new_tokens)
        if ignored := [name for name in unknown if name not in self._warned]:
            self._warned.update(ignored)
            logger.warning(f"generation_kwargs: {', '.join(ignored)}: not of generate, and ignored")
        stops = stops_of(given)
        found: dict[int, GenerationResult] = {}
        for numbers in self.reader.batches(conversations):
            inputs = self._inputs([conversations[number] for number in numbers])
            columns = inputs["input_ids"].shape[1]
            if stops:
                settings["stopping_criteria"] = StoppingCriteriaList([AtStops(stops, self._texts, columns)])
            output = self._model.generate(**inputs, **settings, pad_token_id=self.tokenizer.pad_token_id)
            new = output[:, columns:]
            for number, text, ids in zip(numbers, self._texts(new), new, strict=True):
                said = int((ids != self.tokenizer.pad_token_id).sum())
                found[number] = GenerationResult(cut(text, stops), TokenCounts(output_tokens=said))
        return [found[number] for number in range(len(conversations))]

    def _texts(self, ids: torch.Tensor) -> list[str]:
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return list(texts)

    def _inputs(self, conversations: Sequence[Conversation]) -> Any:
        inputs = self.reader(conversations).to(self._device)
        return inputs.to(self._model.dtype) if isinstance(inputs, BatchFeature) else inputs

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        """Refused."""
        raise NotImplementedError("tasks of several rounds per document are not supported by the model dop_compile")


class DopCompile(_Base):
    """For tasks as chat messages: pictures, videos and text in the order in which the task has them."""

    is_simple = False

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answers to requests of (context, document to messages, generation arguments, document, task, split)."""

        def conversation(args: Any) -> Conversation:
            _, to_messages, _, number, task, split = args
            return self._conversation(to_messages(self._document(task, split, number)))

        return self._answer_all(requests, 2, conversation)

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        """Refused: lmms-eval asks simple models for likelihoods."""
        raise NotImplementedError("likelihoods are asked of simple models; run lmms-eval with --force_simple")


class SimpleDopCompile(_Base):
    """For tasks as a context and a document's pictures; also for likelihoods (`--force_simple`)."""

    is_simple = True

    def _asked(self, context: str, to_visual: Any, number: Any, task: str, split: str) -> Conversation:
        visuals = None if to_visual is None else to_visual(self._document(task, split, number))
        return self._conversation(user_message(context, visuals))

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answers to requests of (context, generation arguments, document to visuals, document, task, split)."""

        def conversation(args: Any) -> Conversation:
            context, _, to_visual, number, task, split = args
            return self._asked(context, to_visual, number, task, split)

        return self._answer_all(requests, 1, conversation)

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Loss of each continuation, and whether it is what greedy decoding says.

        Requests are of (context, continuation or document to it, document to visuals, document, task, split), or of
        the first two alone. The prompt is read and its tokens are reduced without the continuation, which is then said
        token by token, as in `generate`.

        lmms-eval takes the smallest for the best answer, and its models return the mean loss of the tokens; so does
        this one. The pair is the `text` of a result: other pairs than of texts become a string in lmms-eval 0.7.

        Raises:
            ValueError: a continuation that is not tokenized on its own.
        """
        found: list[tuple[float, bool]] = []
        args = [request.args for request in requests]
        with tqdm(total=len(args), desc="dop_compile", disable=self.rank != 0) as bar:
            for start in range(0, len(args), self._batch_size):
                part = args[start : start + self._batch_size]
                found += self._losses([self._continuation(own) for own in part])
                bar.update(len(part))
        return [GenerationResult(pair) for pair in found]

    def _continuation(self, args: Any) -> tuple[Conversation, str]:
        if len(args) == 2:
            return self._conversation(user_message(args[0], None)), str(args[1])
        context, target, to_visual, number, task, split = args
        text = target if isinstance(target, str) else target(self._document(task, split, number))
        return self._asked(context, to_visual, number, task, split), str(text)

    @torch.no_grad()
    def _losses(self, asked: list[tuple[Conversation, str]]) -> list[tuple[float, bool]]:
        conversations = [conversation for conversation, _ in asked]
        found: dict[int, tuple[float, bool]] = {}
        for numbers in self.reader.batches(conversations):
            own = [conversations[number] for number in numbers]
            wanted = [
                self.reader.continuation_ids(prompt, asked[number][1])
                for number, prompt in zip(numbers, self.reader.prompts(own), strict=True)
            ]
            steps = max(map(len, wanted))
            if not steps:
                found |= dict.fromkeys(numbers, (0.0, True))
                continue
            inputs = self._inputs(own)
            tokens = torch.tensor([ids + [-1] * (steps - len(ids)) for ids in wanted])
            settings, _ = settings_of({}, steps)
            output = self._model.generate(
                **inputs,
                **settings,
                logits_processor=LogitsProcessorList([Forced(tokens, inputs["input_ids"].shape[1])]),
                output_logits=True,
                return_dict_in_generate=True,
                eos_token_id=self.config.get_text_config().vocab_size,  # no token: rows say all of theirs
                pad_token_id=0,
            )
            found |= dict(zip(numbers, losses(tokens, output.logits), strict=True))
        return [found[number] for number in range(len(asked))]
