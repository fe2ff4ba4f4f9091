"""Several policies on one set of weights, by the Python interface: a small trained model reads a row of digits.

python examples/tiers.py
"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from digits_vlm import data
from dop_compile import Policy, dop_compile, explain

CHECKPOINT = Path(__file__).parent / "digits_vlm" / "checkpoints" / "llava"

model = AutoModelForImageTextToText.from_pretrained(CHECKPOINT).eval()
processor = AutoProcessor.from_pretrained(CHECKPOINT)

canvas = data.canvas("validation", number=0)
question = data.ask(canvas, "row", np.random.default_rng(0))
inputs = processor(images=canvas.image, text=data.prompt(question.text), return_tensors="pt")

compiled = dop_compile(
    model,
    {
        "all": Policy.full(num_layers=8),
        # Half of the visual tokens, in attention up to layer 5 and in the MLP up to layer 3
        "fewer": Policy.depthwise(num_layers=8, mha_depth=6, mlp_depth=4, visual_tokens=72),
        # Every visual token stays readable up to layer 6, but is updated in the first two layers only
        "frozen": Policy.depthwise(num_layers=8, mha_query_depth=2, mha_key_value_depth=7, mlp_depth=2),
    },
    backend="eager",
)

print(question.text)
with torch.no_grad():
    assert torch.equal(compiled(**inputs).logits, model(**inputs).logits)
    for tier in ("all", "fewer", "frozen"):
        output = compiled.generate(**inputs, max_new_tokens=5, do_sample=False, tier=tier)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{tier}: {answer} (expected {question.answer})")

print()
# Tokens of the prompt before the picture, of the picture, and after it
print(explain(compiled, "frozen", system=7, visual=144, text=6))
