"""What ``dop-compile serve`` does; `dop_compile.commands.options.serve` has its options."""

from __future__ import annotations

import ipaddress
import logging
import os
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dop_compile.commands.usage import UsageError, one_line, usage_errors

__all__ = ["serve_command"]

KEY = "DOP_COMPILE_API_KEY"
PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "httpx": "httpx", "prometheus_client": "prometheus-client"}


def serve_command(arguments: Namespace) -> None:
    """Serve until told to end."""
    _require()
    from dop_compile.serving.http.server import Server, bind

    settings = _settings(arguments)
    logging.getLogger("dop_compile.serving").addHandler(logging.StreamHandler())
    try:
        listener = bind(arguments.host, arguments.port)  # before a model is loaded
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UsageError(f"--host {arguments.host} --port {arguments.port}: {reason}") from error
    with listener:
        engine = _engine(arguments)
        host = f"[{arguments.host}]" if ":" in arguments.host else arguments.host
        url = f"http://{host}:{listener.getsockname()[1]}"
        ready = f"serving {settings.name} ({', '.join(engine.tiers)}) at {url}"
        server = Server(
            engine,
            settings,
            grace=arguments.grace,
            access_log=arguments.access_log,
            ready=lambda: print(ready, flush=True),
        )
        server.run(sockets=[listener])


def _require() -> None:
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)}: not installed; pip install dop_compile[serve]")


def _engine(arguments: Namespace) -> Any:
    from dop_compile.commands.inputs import compile_model, load_processor, load_vision_config, load_vision_model
    from dop_compile.commands.policies import NO_POLICY, read_policies
    from dop_compile.logs import quiet_transformers
    from dop_compile.onnx.contract.manifest import MANIFEST
    from dop_compile.serving.live.engine import LiveEngine

    if (Path(arguments.model).expanduser() / MANIFEST).is_file():
        raise UsageError(
            f"model {arguments.model!r}: an exported directory, which runs in ONNX Runtime (OnnxPipeline) and Triton "
            "(docs/serving.md); name the model that it was made of"
        )
    if not arguments.debug:
        quiet_transformers()
    config = load_vision_config(arguments.model)
    arguments.tier = None
    tiers = read_policies(arguments, config.get_text_config(decoder=True).num_hidden_layers)
    if not tiers:
        raise UsageError(NO_POLICY)
    processor = load_processor(arguments.model)
    model = load_vision_model(arguments.model, arguments.device, arguments.dtype)
    compiled = compile_model(model, tiers, arguments.backend)
    with usage_errors():
        return LiveEngine(compiled, processor, max_batch=arguments.max_batch, measure=not arguments.no_measure)


def _settings(arguments: Namespace) -> Any:
    from dop_compile.serving.http.gate import LOOPBACK
    from dop_compile.serving.http.remote import origin
    from dop_compile.serving.http.settings import Limits, Settings

    if arguments.new_tokens > arguments.max_new_tokens:
        raise UsageError("--new-tokens: more than --max-new-tokens allows")
    with usage_errors():
        for one in arguments.image_origin:
            origin(one)
    if arguments.private_images and not arguments.image_origin:
        raise UsageError("--private-images: nothing is fetched; give also --image-origin")
    key = _api_key(arguments)
    is_local = _is_loopback(arguments.host)
    if not is_local and key is None and not arguments.no_api_key:
        raise UsageError(
            f"--host {arguments.host}: others could use the server; give --api-key-file FILE or set {KEY}, or say "
            "--no-api-key"
        )
    names = {name.lower() for name in arguments.allow_host}
    return Settings(
        name=arguments.name or Path(arguments.model).name or "model",
        limits=Limits(
            body_bytes=arguments.max_bytes,
            images=arguments.max_images,
            pixels=arguments.max_pixels,
            new_tokens=arguments.max_new_tokens,
        ),
        api_key=key,
        hosts=frozenset({*LOOPBACK, *names}) if is_local else frozenset(names) or None,
        image_origins=tuple(arguments.image_origin),
        private_images=arguments.private_images,
        queue=arguments.queue,
        queue_seconds=arguments.queue_seconds,
        request_seconds=arguments.request_seconds,
        new_tokens=arguments.new_tokens,
        max_ms=arguments.max_ms,
    )


def _api_key(arguments: Namespace) -> str | None:
    """From the file, or the environment: not from the command line, which other users of a machine can read."""
    key = os.environ.get(KEY)
    if arguments.no_api_key:
        if arguments.api_key_file is not None or key:
            raise UsageError(f"--no-api-key: there is a key, by --api-key-file or {KEY}")
        return None
    if arguments.api_key_file is not None:
        try:
            key = Path(arguments.api_key_file).read_text(encoding="utf-8").partition("\n")[0].strip()
        except (OSError, UnicodeError) as error:
            raise UsageError(f"--api-key-file {arguments.api_key_file!r}: {one_line(error)}") from error
        if not key:
            raise UsageError(f"--api-key-file {arguments.api_key_file!r}: its first line is empty")
    return key or None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
