"""Ask Triton Inference Server, which serves an export's model repository, one question.

dop-compile export examples/digits_vlm/checkpoints/llava --image-size 96x96 --layout triton --out exported
tritonserver --model-repository exported/triton
python examples/onnx_triton.py exported picture.png "Read row 3." localhost:8001

The server runs the graphs. What stands between them - processor, groups, reduction, the choice of the next token - is
done here, by the exported directory's manifest; keys and values travel with every token. Needs tritonclient[grpc].
"""

import sys
from pathlib import Path

import torch
import tritonclient.grpc as triton
from tritonclient.utils import np_to_triton_dtype

from dop_compile.onnx.contract.manifest import Manifest
from dop_compile.onnx.run.inputs import Reader, as_images, skeleton
from dop_compile.onnx.run.plain import PlainPipeline


class TritonGraph:
    """One graph on the server, as a session."""

    def __init__(self, client, name, graph):
        self._client, self._name, self._graph = client, name, graph

    def run(self, inputs):
        given = []
        for spec in self._graph.inputs:
            array = inputs[spec.name].to(getattr(torch, spec.dtype)).contiguous().numpy()
            tensor = triton.InferInput(spec.name, list(array.shape), np_to_triton_dtype(array.dtype))
            given.append(tensor.set_data_from_numpy(array))
        result = self._client.infer(self._name, given)
        return {spec.name: torch.from_numpy(result.as_numpy(spec.name).copy()) for spec in self._graph.outputs}


class TritonPipeline(PlainPipeline):
    """The stages of an exported directory, with every graph on a server."""

    def __init__(self, folder, client):
        manifest = Manifest.load(folder)
        super().__init__(Path(folder), manifest, skeleton(Path(folder), manifest), provider="", optimized=True)
        self._client = client

    def session(self, name):
        return TritonGraph(self._client, name, self.manifest.graphs[name])


def main(directory, picture, prompt, address):
    pipeline = TritonPipeline(directory, triton.InferenceServerClient(address))
    reader = Reader(Path(directory), pipeline.manifest)
    inputs = reader.read([as_images(picture)], [prompt])
    for tier in pipeline.manifest.tiers:
        _, ids = pipeline.generate(tier, pipeline.prepare(tier, inputs), new_tokens=32)
        print(f"{tier}: {reader.text(ids[0].tolist())}")


if __name__ == "__main__":
    main(*sys.argv[1:])
