"""What a user's script says of a compiled model; `make types` checks it, and it is never run."""

from __future__ import annotations

from transformers import LlavaForConditionalGeneration

from dop_compile import CompiledModel, Policy, dop_compile, explain, from_pretrained

model = LlavaForConditionalGeneration.from_pretrained("model")
compiled: CompiledModel = dop_compile(model, {"100%": Policy.full(32), "28%": Policy.depthwise(32, mha_depth=26)})
names: list[str] = list(compiled.tiers)
policy: Policy = compiled.tiers["28%"]
fast: CompiledModel = compiled.tier("28%")
output = fast.generate(tier="100%", max_new_tokens=3)
text: str = str(explain(compiled, "28%").summary)
again: CompiledModel = from_pretrained("model").tier(names[0])
device, config = again.device, again.config
