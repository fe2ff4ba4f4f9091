"""Train one of the two models from scratch.

    python -m digits_vlm.train llava --out digits_vlm/checkpoints/llava
    torchrun --nproc-per-node=2 -m digits_vlm.train llava --out digits_vlm/checkpoints/llava  # two of one thread each

First the vision tower learns to say which digit each image token belongs to, then everything is trained on packed
questions. Training can be interrupted: the same command goes on from the last saved step, and gives the same model as
one that was never interrupted. Processes share each step's pictures and average their gradients.
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

from digits_vlm import models
from digits_vlm.packing import Batch, decode_batch, make_batch

STAGES = ("tower", "answers")
SAVE_EVERY_S = 60


class Heads(nn.Module):
    """What the tower is asked about its tokens: the digit (or none), whether it is its centre, and, of [CLS], which
    digits there are. Only for training; not part of the checkpoint."""

    def __init__(self, model: Any):
        super().__init__()
        width = model.config.text_config.hidden_size
        self.digit, self.centre = nn.Linear(width, 11), nn.Linear(width, 1)
        self.present = nn.Linear(width, 10)

    def loss(self, features: Tensor, cls: Tensor | None, batch: Batch) -> Tensor:
        digit, centre = batch.patches.unbind(-1)
        weight = torch.ones(11, device=features.device)
        weight[10] = 0.2
        loss = F.cross_entropy(self.digit(features).flatten(0, 1), digit.flatten(), weight)
        logits = self.centre(features).squeeze(-1)
        loss = loss + F.binary_cross_entropy_with_logits(logits, centre.float(), pos_weight=logits.new_tensor(5.0))
        if cls is not None:
            loss = loss + 0.3 * F.binary_cross_entropy_with_logits(self.present(cls), batch.present)
        return loss


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
        self.steps = {"tower": options.tower_steps, "answers": options.steps}
        self.stage, self.step = STAGES[0], 0
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
        return torch.optim.AdamW(groups, lr=self.options.lr, betas=(0.9, 0.98))

    def _rate(self) -> float:
        total = self.steps[self.stage]
        warm = min(1.0, (self.step + 1) / max(1, min(100, total // 10)))
        return float(self.options.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.step / total))))

    def train_step(self) -> dict[str, float]:
        share = self.options.batch // self.world
        first = (STAGES.index(self.stage) * 10**7) + self.step * self.options.batch + self.rank * share
        batch = make_batch(
            self.options.model,
            range(first, first + share),
            seed=self.options.seed,
            questions=self.options.questions if self.stage == "answers" else 1,
            words=self.words,
            images=self.images,
        ).to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        features, cls = image_features(self.model, batch.pixels)
        seen = self.heads.loss(features, cls, batch)
        loss, logs = seen, {"tower": seen.item()}
        if self.stage == "answers":
            logits = decode_batch(self.model, batch, features)
            each = F.cross_entropy(logits, batch.targets[:, 2], reduction="none")
            answers = (each * batch.weights).sum() / batch.weights.sum()
            loss = answers + 0.1 * seen
            sure = batch.weights == 1
            right = (logits.argmax(-1) == batch.targets[:, 2])[sure].float().mean()
            logs |= {"answers": answers.item(), "right": right.item()}
        loss.backward()
        parameters = [p for _, p in self.parameters() if p.grad is not None]
        self._average(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return logs

    def _average(self, parameters: list[nn.Parameter]) -> None:
        if self.world == 1:
            return
        flat = torch.cat([p.grad.flatten() for p in parameters])
        dist.all_reduce(flat)
        flat /= self.world
        for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = grad.view_as(parameter)

    # --- saving and going on --------------------------------------------------------------------------------------

    @property
    def _settings(self) -> str:
        kept = ("model", "seed", "batch", "questions", "lr", "steps", "tower_steps")
        return json.dumps({name: getattr(self.options, name) for name in kept}, sort_keys=True)

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
            metadata = {"stage": self.stage, "step": str(self.step), "settings": self._settings}
            partial = path.with_suffix(".partial")
            save_file(self._state(), partial, metadata=metadata)
            partial.replace(path)

    def resume(self, path: Path) -> None:
        """Go on from a saved step.

        Raises:
            ValueError: it was saved by a training with other settings.
        """
        if not path.exists():
            return
        with safe_open(path, framework="pt") as saved:
            metadata = saved.metadata()
            if metadata["settings"] != self._settings:
                raise ValueError(
                    f"{path} belongs to a training with the settings {metadata['settings']}, not {self._settings}; "
                    "use those, another --out, or remove the file"
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
            if stage != self.stage:
                self.stage, self.step = stage, 0
                self.optimizer = self._optimizer()
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=models.NAMES)
    parser.add_argument("--out", type=Path, required=True, help="directory for the checkpoint")
    parser.add_argument("--steps", type=int, default=2000, help="steps on questions (default %(default)s)")
    parser.add_argument("--tower-steps", type=int, default=500, help="steps on the vision tower (default %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="pictures a step, over all processes")
    parser.add_argument("--questions", type=int, default=14, help="questions a picture")
    parser.add_argument("--lr", type=float, default=1e-3)
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
