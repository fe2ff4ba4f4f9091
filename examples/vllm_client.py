"""Ask a vLLM server (docs/vllm.md) about a picture: python examples/vllm_client.py PICTURE QUESTION [URL]"""

from __future__ import annotations

import base64
import json
import sys
import urllib.request
from pathlib import Path


def ask(picture: Path, question: str, url: str = "http://127.0.0.1:8000") -> str:
    image = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    body = {"model": "digits", "messages": messages, "temperature": 0, "max_tokens": 8}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        text: str = json.load(answer)["choices"][0]["message"]["content"]
    return text.strip()


if __name__ == "__main__":
    print(ask(Path(sys.argv[1]), *sys.argv[2:]))
