"""The OpenAI-compatible server in a process of its own, with n-gram speculation: many clients at once."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dop_compile.plugins.vllm.served import write_served
from tests.vllm_engine.engines import CHECKPOINTS, NEW_TOKENS, POLICIES, prompts, reference

NAME, LABEL = "llava", "split reduced"
REQUESTS = 200
GUESSES = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address."""
    folder = tmp_path_factory.mktemp("server")
    write_served(CHECKPOINTS / NAME, folder / "served", LABEL, POLICIES[LABEL])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "served")]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "64"]
    command += ["--served-model-name", "digits", "--speculative-config", json.dumps(GUESSES)]
    with (folder / "log").open("wb") as log:
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        address = f"http://127.0.0.1:{port}"
        _await(address, process, folder / "log")
        yield address
    finally:
        process.terminate()
        process.wait(60)


def _await(address: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(log.read_text(errors="replace")[-4000:])


def _ask(address: str, number: int) -> str:
    prompt = prompts(NAME)[number]
    image = io.BytesIO()
    prompt.pictures[0].save(image, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}"
    question = prompt.text.partition("<image> ")[2].removesuffix(" Answer:")
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    body: dict[str, Any] = {"model": "digits", "messages": [{"role": "user", "content": content}], "temperature": 0}
    body |= {"max_tokens": NEW_TOKENS, "ignore_eos": True, "return_token_ids": True}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return str(json.load(answer)["choices"][0]["token_ids"])


def test_many_clients_get_the_answers_of_the_compiled_model(server: str) -> None:
    single = {number: _ask(server, number) for number in range(5)}
    assert single == {number: str(reference(NAME, LABEL)[number].tokens) for number in single}
    numbers = [n % 5 for n in range(REQUESTS)]
    with ThreadPoolExecutor(REQUESTS) as clients:
        assert list(clients.map(lambda n: _ask(server, n), numbers)) == [single[n] for n in numbers]
