"""`dop-compile demo`: a small trained LLaVA reads handwritten digits, in full and pruned.

Model, data and questions are those of `examples/digits_vlm` in a clone of the repository. Nothing is downloaded: the
digits come with scikit-learn, and the weights with the repository. The canvas that is asked about is made of
validation scans, which the model was not trained on.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from dop_compile.demo.result import Answered, DemoResult, Question, TierResult
from dop_compile.hf.images import load_image
from dop_compile.policy.policy import Policy
from dop_compile.reports.explain import explain

__all__ = ["compose", "demo_policies", "open_checkpoint", "require_packages", "run_demo"]

EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKPOINT = Path("digits_vlm", "checkpoints", "llava")
"""The checkpoint that is used where none is named, inside `EXAMPLES`."""

LAYERS, VISUAL = 8, 144
"""The policies are for a LLaVA of this depth and this many visual tokens."""
FULL = "100%"
QUESTIONS = ("read", "row", "yesno", "count", "choice", "read")
MAX_NEW_TOKENS = 5
BATCHES = (1, 8)
"""Prompts per timed prefill, which the tiers are warmed for. One alone is so little work for this model that calling
its modules takes most of it."""
ROUNDING = 1e-4
"""Relative difference of logits that a backend other than eager may show."""

_Name = TypeVar("_Name")


def demo_policies() -> dict[str, Policy]:
    """The tiers, named by their share of the FLOPs: all of it, and two at about the same cost.

    The first of the two prunes attention as one, as the paper does, and lets fewer visual tokens enter. The second
    keeps them all readable up to layer 6, but updates them in the first layers alone.
    """
    return {
        FULL: Policy.full(LAYERS),
        "34%": Policy.depthwise(LAYERS, mha_depth=6, mlp_depth=2, visual_tokens=91),
        "34% split": Policy.depthwise(LAYERS, mha_query_depth=2, mha_key_value_depth=7, mlp_depth=1),
    }


def require_packages() -> None:
    """ModuleNotFoundError, with what to install, where a package is missing that only the demo needs."""
    packages = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}
    missing = [name for module, name in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ModuleNotFoundError(f"the demo needs {' and '.join(missing)}: pip install 'dop_compile[demo]'")


def _digits_vlm(module: str) -> Any:
    """A module of the package `digits_vlm`, which is in the clone's `examples` and not installed.

    Raises:
        FileNotFoundError: there is no such folder, as this is not a clone.
    """
    if not (EXAMPLES / "digits_vlm").is_dir():
        raise FileNotFoundError(
            f"{EXAMPLES / 'digits_vlm'} is missing: the demo's data, questions and model are in the repository and "
            "not in the installed package; run it in a clone, after pip install -e '.[demo]' there"
        )
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module(f"digits_vlm.{module}")


def open_checkpoint(directory: Path | None = None) -> tuple[Any, Any]:
    """Model (in eval mode) and reader of a checkpoint directory; the one of the repository if None.

    Raises:
        FileNotFoundError: no such directory, a file is missing, or this is not a clone.
        ValueError: a damaged checkpoint, or one of another model than the policies are for.
    """
    models = _digits_vlm("models")
    directory = EXAMPLES / CHECKPOINT if directory is None else directory
    model, reader = models.load(directory)
    kind, layers = model.config.model_type, model.config.get_text_config().num_hidden_layers
    if (kind, layers) != ("llava", LAYERS):
        raise ValueError(
            f"{directory}: the demo's policies are for a llava of {LAYERS} layers, this is a {kind} of {layers}"
        )
    tower = model.config.vision_config
    if (visual := (tower.image_size // tower.patch_size) ** 2) != VISUAL:
        raise ValueError(f"{directory}: the demo's policies are for {VISUAL} visual tokens, this model has {visual}")
    return model, reader


def compose(number: int = 0, seed: int = 0, image: Image.Image | None = None) -> tuple[Image.Image, list[Question]]:
    """A canvas of validation scans and questions about it, all a function of `number` and `seed` (both >= 0).

    With an `image` of one's own its middle is cut out and scaled to a canvas; the questions are the same, and their
    answers are not known.
    """
    data = _digits_vlm("data")
    canvas = data.canvas("validation", number, seed)
    rng = np.random.default_rng([seed, number])
    questions: dict[str, Question] = {}
    for kind in QUESTIONS:
        asked = data.ask(canvas, kind, rng)
        while asked.text in questions:
            asked = data.ask(canvas, kind, rng)
        questions[asked.text] = Question(kind, asked.text, asked.answer if image is None else None)
    picture = canvas.image if image is None else ImageOps.fit(load_image(image), (data.CANVAS, data.CANVAS))
    return picture, list(questions.values())


@torch.no_grad()
def run_demo(
    model: Any,
    compiled: Any,
    reader: Any,
    image: Image.Image,
    questions: Sequence[Question],
    *,
    exact: bool = True,
    repeats: int = 10,
) -> DemoResult:
    """Warm `compiled`, ask the original and every tier of it all questions, and time prefills of the first one.

    Args:
        model, reader: as `open_checkpoint` gives them.
        compiled: the model compiled under several tiers, the one that equals the original first.
        image, questions: as `compose` gives them.
        exact: whether the first tier has to give the original's logits bit for bit, as it does under eager; else a
            relative difference of 1e-4 passes.
        repeats: timed rounds.

    Raises:
        RuntimeError: the first tier's logits or tokens are not the original's.
    """
    prompt = _digits_vlm("data").prompt
    inputs = [reader([image], [prompt(question.text)]) for question in questions]
    tiers: Mapping[str, Policy] = compiled.dop.tiers
    warmed = compiled.warmup(batch_sizes=BATCHES, inputs=inputs[0])
    answers: dict[str, list[str]] = {name: [] for name in ("original", *tiers)}
    for batch in tqdm(inputs, desc="answering", leave=False, file=sys.stderr):
        _check_equal(compiled(**batch).logits, model(**batch).logits, exact=exact)
        tokens = {"original": _generate(model, batch)}
        tokens |= {tier: _generate(compiled, batch, tier=tier) for tier in tiers}
        if not torch.equal(tokens["original"], tokens[next(iter(tiers))]):
            raise RuntimeError("the 100 % tier does not generate the original's tokens")
        for name, output in tokens.items():
            answers[name].append(reader.tokenizer.decode(output, skip_special_tokens=True).strip() or "(empty)")

    groups = _token_groups(inputs[0]["input_ids"], model.config.image_token_id)
    milliseconds = _measure(_prefills(model, compiled, inputs[0], groups), repeats)
    system, visual, text = (int((groups == code).sum()) for code in (2, 1, 0))
    found = {
        name: Answered(name, tuple(said), tuple(milliseconds[name, count] for count in BATCHES))
        for name, said in answers.items()
    }
    costs = explain(compiled, system=system, visual=visual, text=text).tiers
    return DemoResult(
        title=_title(model),
        image=image,
        questions=tuple(questions),
        system=system,
        visual=visual,
        text=text,
        batches=BATCHES,
        warmed=warmed,
        original=found["original"],
        tiers=tuple(TierResult(tiers[cost.tier], cost, found[cost.tier]) for cost in costs),
        exact=exact,
    )


def _title(model: Any) -> str:
    text = model.config.get_text_config()
    weights = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    threads = torch.get_num_threads()
    return (
        f"{type(model).__name__}: {text.num_hidden_layers} layers of {text.hidden_size}, {weights:.1f} M weights; "
        f"PyTorch {torch.__version__} on {threads} thread{'' if threads == 1 else 's'}"
    )


def _check_equal(actual: Tensor, expected: Tensor, *, exact: bool) -> None:
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    if not (torch.equal(actual, expected) if exact else error <= ROUNDING):
        raise RuntimeError(f"the 100 % tier's logits differ from the original's by {error:.1e} (relative)")


def _generate(model: Any, inputs: dict[str, Tensor], **settings: Any) -> Tensor:
    """The new tokens of a greedy answer."""
    output: Tensor = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, **settings)
    return output[0, inputs["input_ids"].shape[1] :]


def _token_groups(ids: Tensor, image_token: int) -> Tensor:
    """(1, tokens): 0 text, 1 visual, 2 system, as `token_groups` takes them."""
    visual = ids == image_token
    return torch.where(visual, 1, torch.where(visual.cumsum(1) == 0, 2, 0))


def _prefills(
    model: Any, compiled: Any, inputs: dict[str, Tensor], groups: Tensor
) -> dict[tuple[str, int], Callable[[], Any]]:
    """What is timed, by model and batch: each decoder up to the first token's logits, without the vision tower."""
    found: list[Tensor] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: found.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        model(**inputs, logits_to_keep=1)
    finally:
        hook.remove()
    calls: dict[tuple[str, int], Callable[[], Any]] = {}
    for count in BATCHES:
        settings = {"inputs_embeds": found[0].repeat(count, 1, 1), "logits_to_keep": 1}
        calls["original", count] = functools.partial(model, **settings)
        for tier in compiled.dop.tiers:
            calls[tier, count] = functools.partial(
                compiled, **settings, token_groups=groups.repeat(count, 1), tier=tier
            )
    return calls


def _measure(calls: Mapping[_Name, Callable[[], Any]], repeats: int) -> dict[_Name, float]:
    """Median milliseconds of each call; interleaved, so that a slow moment of the machine hits all of them."""
    times: dict[_Name, list[float]] = {name: [] for name in calls}
    for number in tqdm(range(repeats + 1), desc="measuring prefill", leave=False, file=sys.stderr):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if number:  # the first round is the original's warm-up
                times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}
