"""A server that listens, until it is told to end: then what runs is finished, and what waits is sent away."""

from __future__ import annotations

import socket
from collections.abc import Callable

import uvicorn

from dop_compile.serving.http.app import create_app
from dop_compile.serving.http.settings import Settings
from dop_compile.serving.requests import Engine
from dop_compile.serving.scheduler import Scheduler

__all__ = ["Server", "bind"]


BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any free one.

    Raises:
        OSError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends small pieces at once where the protocol is named; else each waits for an acknowledgement, 40 ms
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


class Server(uvicorn.Server):
    """One engine behind one application.

    Args:
        grace: seconds that running requests have once the server is told to end.
        access_log: print a line per request: who asked, which path, and the status.
        ready: called when requests are taken.
    """

    def __init__(self, engine: Engine, settings: Settings, *, grace: int, access_log: bool, ready: Callable[[], None]):
        self.scheduler = Scheduler(engine, queue=settings.queue)
        self._ready = ready
        config = uvicorn.Config(
            create_app(self.scheduler, settings),
            http="h11",
            ws="none",
            lifespan="on",
            log_level="info" if access_log else "error",
            access_log=access_log,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=grace,
        )
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.scheduler.drain()
        await super().shutdown(sockets)
