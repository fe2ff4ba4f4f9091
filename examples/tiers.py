"""Several policies on one set of weights, by the Python interface; nothing is downloaded.

python examples/tiers.py
"""

import torch

from dop_compile import Policy, dop_compile, explain
from dop_compile.demo import PROMPT, demo_model, demo_processor, photograph

# Stand-ins: with a trained model these come from `from_pretrained`
model = demo_model(layers=8, hidden=256)
processor = demo_processor()
inputs = processor(images=photograph(), text=PROMPT, return_tensors="pt")

compiled = dop_compile(
    model,
    {
        "all": Policy.full(num_layers=8),
        # A third of the visual tokens, in attention up to layer 5 and in the MLP up to layer 3
        "fewer": Policy.depthwise(num_layers=8, mha_depth=6, mlp_depth=4, visual_tokens=192),
        # Every visual token stays readable up to layer 6, but is updated in the first two layers only
        "frozen": Policy.depthwise(num_layers=8, mha_query_depth=2, mha_key_value_depth=7, mlp_depth=2),
    },
    backend="eager",
)

with torch.no_grad():
    assert torch.equal(compiled(**inputs).logits, model(**inputs).logits)
    for tier in ("all", "fewer", "frozen"):
        output = compiled.generate(**inputs, max_new_tokens=6, do_sample=False, tier=tier)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{tier}: {answer}")

print()
print(explain(compiled, "frozen", system=22, visual=576, text=17))
