"""Serve an exported directory with ONNX Runtime: one question under every tier, streamed.

dop-compile export examples/digits_vlm/checkpoints/llava --image-size 96x96 --out exported
python examples/onnx_pipeline.py exported picture.png "Read row 3."
"""

import sys

from dop_compile.onnx import OnnxPipeline

directory, picture, prompt = sys.argv[1:]
pipeline = OnnxPipeline.load(directory)
for tier in pipeline.tiers:
    print(f"{tier}: ", end="")
    pipeline(picture, prompt, tier=tier, stream=lambda token: print(token.text, end="", flush=True))
    print(f"  (about {pipeline.latencies[tier].decode_ms:.1f} ms per further token)")
