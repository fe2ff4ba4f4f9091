"""Train one of the two models from scratch.

    python -m digits_vlm.train llava --out digits_vlm/checkpoints/llava
    torchrun --nproc-per-node=2 -m digits_vlm.train llava --out digits_vlm/checkpoints/llava  # two of one thread each

First the vision tower learns to say which digit each image token belongs to, then everything is trained on packed
questions, and at last on a mix with more of the hardest kind. Training can be interrupted: the same command goes on
from the last saved step, and gives the same model as one that was never interrupted. Processes share each step's
pictures and average their gradients; with another number of them other questions are drawn.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from digits_vlm import data, models
from digits_vlm.packing import KIND_WEIGHTS, REFINING, Batch, decode_batch, make_batch

STAGES = ("tower", "answers", "refine")
STEPS = {"tower": "tower_steps", "answers": "steps", "refine": "refine_steps"}
"""The option that holds the steps of each stage."""
SAVE_EVERY_S = 60


class Heads(nn.Module):
    """What the tower is asked: the digit (or none) of each token and of the mean over each cell, which tokens are a
    digit's centre, which cell each token is in, and, of [CLS], which digits there are. Only for training; not part of
    the checkpoint."""

    def __init__(self, model: Any):
        super().__init__()
        width = model.config.text_config.hidden_size
        self.digit, self.cell, self.centre = nn.Linear(width, 11), nn.Linear(width, 11), nn.Linear(width, 1)
        self.present, self.place = nn.Linear(width, 10), nn.Linear(width, data.GRID**2)

    def loss(self, features: Tensor, cls: Tensor | None, batch: Batch) -> Tensor:
        digit, centre = batch.patches.unbind(-1)
        weight = torch.ones(11, device=features.device)
        weight[10] = 0.2
        loss = F.cross_entropy(self.digit(features).flatten(0, 1), digit.flatten(), weight)
        side = int(features.shape[1] ** 0.5)
        line = torch.arange(side, device=features.device) * data.GRID // side
        place = (line[:, None] * data.GRID + line).flatten().expand(features.shape[0], -1)
        loss = loss + 0.3 * F.cross_entropy(self.place(features).flatten(0, 1), place.flatten())
        cells = self.cell(cell_means(features))
        loss = loss + F.cross_entropy(cells.flatten(0, 1), batch.cells.flatten())
        logits = self.centre(features).squeeze(-1)
        loss = loss + F.binary_cross_entropy_with_logits(logits, centre.float(), pos_weight=logits.new_tensor(5.0))
        if cls is not None:
            loss = loss + 0.3 * F.binary_cross_entropy_with_logits(self.present(cls), batch.present)
        return loss


def cell_means(features: Tensor) -> Tensor:
    """(batch, cells, hidden): the mean over each cell of the canvas, of (batch, image tokens, hidden)."""
    side = int(features.shape[1] ** 0.5)
    picture = features.transpose(1, 2).unflatten(2, (side, side))
    return F.adaptive_avg_pool2d(picture, data.GRID).flatten(2).transpose(1, 2)


def image_features(model: Any, pixels: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """(batch, image tokens, hidden) projected features, and the [CLS] state where the tower has one."""
    chosen = (
        {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
        if model.config.model_type == "llava"
        else {}
    )
    output = model.model.get_image_features(**pixels, **chosen)
    cls = output.hidden_states[-2][:, 0] if chosen else None
    return torch.stack(list(output.pooler_output)), cls


class Training:
    """Model, heads, optimizer and the step they are at."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.device = torch.device(options.device)
        self.model = models.build(options.model, options.seed).to(self.device).train()
        self.model.set_attn_implementation("eager")  # two plain matrix products: faster than fused kernels on a CPU
        torch.manual_seed(options.seed + 1)
        self.heads = Heads(self.model).to(self.device)
        self.words, self.images = models.tokenizer(options.model), models.image_processor(options.model)
        self.steps = {stage: getattr(options, option) for stage, option in STEPS.items()}
        self.stage, self.step = "tower", 0
        self.optimizer = self._optimizer()

    # --- one step -------------------------------------------------------------------------------------------------

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        named = [*self.model.named_parameters(), *((f"heads.{n}", p) for n, p in self.heads.named_parameters())]
        if self.stage == "tower":
            named = [(n, p) for n, p in named if "language_model" not in n and "lm_head" not in n]
        return named

    def _optimizer(self) -> torch.optim.AdamW:
        named = self.parameters()
        decayed = [p for _, p in named if p.dim() > 1]
        plain = [p for _, p in named if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=self._peak, betas=(0.9, 0.98))

    @property
    def _peak(self) -> float:
        peaks = {"tower": self.options.tower_lr, "answers": self.options.lr, "refine": self.options.lr / 1.5}
        return float(peaks[self.stage])

    def _rate(self) -> float:
        total = max(1, self.steps[self.stage])
        warm = min(1.0, (self.step + 1) / max(1, min(100, total // 10)))
        return float(self._peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.step / total))))

    def loss(self) -> tuple[Tensor, dict[str, float]]:
        """Of this process's share of the step's pictures."""
        share = self.options.batch // self.world
        first = (STAGES.index(self.stage) * 10**7) + self.step * self.options.batch + self.rank * share
        batch = make_batch(
            self.options.model,
            range(first, first + share),
            seed=self.options.seed,
            questions=1 if self.stage == "tower" else self.options.questions,
            full=self.stage == "tower",
            kinds=REFINING if self.stage == "refine" else KIND_WEIGHTS,
            words=self.words,
            images=self.images,
        ).to(self.device)
        features, cls = image_features(self.model, batch.pixels)
        seen = self.heads.loss(features, cls, batch)
        if self.stage == "tower":
            return seen, {"tower": seen.item()}
        logits = decode_batch(self.model, batch, features)
        each = F.cross_entropy(logits, batch.targets[:, 2], reduction="none")
        answers = (each * batch.weights).sum() / batch.weights.sum()
        right = (logits.argmax(-1) == batch.targets[:, 2])[batch.weights == 1].float().mean()
        logs = {"tower": seen.item(), "answers": answers.item(), "right": right.item()}
        return answers + 0.1 * seen, logs

    def update(self) -> None:
        """One step of the optimizer, with the gradients that were accumulated."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        parameters = [p for _, p in self.parameters() if p.grad is not None]
        self._average(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1

    def train_step(self) -> dict[str, float]:
        loss, logs = self.loss()
        loss.backward()
        self.update()
        return logs

    def _average(self, parameters: list[nn.Parameter]) -> None:
        if not dist.is_initialized():
            return
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        flat /= self.world
        for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = grad.view_as(parameter)

    # --- saving and going on --------------------------------------------------------------------------------------

    @property
    def _settings(self) -> dict[str, Any]:
        kept = ("model", "seed", "batch", "questions", "lr", "tower_lr", *STEPS.values())
        return {name: getattr(self.options, name) for name in kept}

    def _state(self) -> dict[str, Tensor]:
        state = {f"model.{n}": p for n, p in self.model.state_dict().items()}
        state |= {f"heads.{n}": p for n, p in self.heads.state_dict().items()}
        for name, parameter in self.parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"optimizer.{key}.{name}"] = value
        return {name: value.detach().contiguous() for name, value in state.items()}

    def save(self, path: Path) -> None:
        if self.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            metadata = {"stage": self.stage, "step": str(self.step), "settings": json.dumps(self._settings)}
            partial = path.with_suffix(".partial")
            save_file(self._state(), partial, metadata=metadata)
            partial.replace(path)

    def resume(self, path: Path) -> None:
        """Go on from a saved step. The number of steps of a stage that had not begun there may be another one.

        Raises:
            ValueError: it was saved by a training with other settings.
        """
        if not path.exists():
            return
        with safe_open(path, framework="pt") as saved:
            metadata = saved.metadata()
            to_come = STAGES[STAGES.index(metadata["stage"]) + 1 :]
            settings = {**json.loads(metadata["settings"]), **{STEPS[stage]: self.steps[stage] for stage in to_come}}
            if settings != self._settings:
                raise ValueError(
                    f"{path} belongs to a training with the settings {settings}, not {self._settings}; use those, "
                    "another --out, or remove the file"
                )
            state = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
        self.stage, self.step = metadata["stage"], int(metadata["step"])
        self.model.load_state_dict({n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")})
        self.heads.load_state_dict({n.removeprefix("heads."): t for n, t in state.items() if n.startswith("heads.")})
        self.optimizer = self._optimizer()
        for name, parameter in self.parameters():
            found = {
                key: state[f"optimizer.{key}.{name}"].to(parameter.device if key != "step" else "cpu")
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"optimizer.{key}.{name}" in state
            }
            if found:
                self.optimizer.state[parameter] = found

    def run(self, path: Path) -> None:
        self.resume(path)
        saved = time.monotonic()
        for stage in STAGES[STAGES.index(self.stage) :]:
            self.enter(stage)
            total = self.steps[stage]
            bar = tqdm(total=total, initial=self.step, desc=stage, disable=self.rank > 0, mininterval=10)
            while self.step < total:
                logs = self.train_step()
                bar.set_postfix({name: f"{value:.3f}" for name, value in logs.items()}, refresh=False)
                bar.update()
                if time.monotonic() - saved > SAVE_EVERY_S:
                    self.save(path)
                    saved = time.monotonic()
            bar.close()
        self.save(path)

    def enter(self, stage: str) -> None:
        """Begin a stage, unless it has been begun."""
        if stage != self.stage:
            self.stage, self.step = stage, 0
            self.optimizer = self._optimizer()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=models.NAMES)
    parser.add_argument("--out", type=Path, required=True, help="directory for the checkpoint")
    parser.add_argument("--steps", type=int, default=1700, help="steps on questions (default %(default)s)")
    parser.add_argument("--refine-steps", type=int, default=1000, help="steps of refining (default %(default)s)")
    parser.add_argument("--tower-steps", type=int, default=900, help="steps on the vision tower (default %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="pictures a step, over all processes")
    parser.add_argument("--questions", type=int, default=14, help="questions a picture")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate on questions")
    parser.add_argument("--tower-lr", type=float, default=3e-3, help="peak learning rate on the vision tower")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
        torch.set_num_threads(1)
        if options.device == "cuda":
            options.device = f"cuda:{os.environ['LOCAL_RANK']}"
    training = Training(options)
    if options.batch % training.world:
        sys.exit(f"--batch {options.batch} cannot be shared by {training.world} processes")
    state = options.out.parent / f"{options.out.name}.training.safetensors"
    training.run(state)
    if training.rank == 0:
        training.model.set_attn_implementation("sdpa")
        models.save(options.model, training.model.cpu().eval(), options.out)
        print(f"saved {options.out}; {state} is no longer needed")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
