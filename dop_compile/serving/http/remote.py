"""Pictures that a request names by address: fetched from the origins that the operator allows, from nowhere else.

1. The name is looked up once; each address it has must be public (unless private ones are allowed), and the connection
   goes to the address that was looked at. A name that changes in between leads nowhere else.
2. The way may go on (redirects) to other allowed origins alone, and three times at most.
3. Proxies and credentials of the environment are not used; the answer is counted while it comes, and timed as a whole.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from urllib.parse import SplitResult, urljoin, urlsplit

import httpx

from dop_compile.serving.http.errors import ApiError, invalid
from dop_compile.serving.http.settings import Limits

__all__ = ["RemoteImages", "origin"]

REDIRECTS = 3
SECONDS = 10.0
PORTS = {"https": 443, "http": 80}


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of an address.

    Raises:
        ValueError: it has none that can be fetched from, or holds a user's name.
    """
    parts = urlsplit(url)
    if parts.scheme not in PORTS or not parts.hostname or "@" in parts.netloc:
        raise ValueError(f"expected an address such as https://example.org, got {url[:200]!r}")
    return parts.scheme, parts.hostname.rstrip(".").lower(), parts.port or PORTS[parts.scheme]


class RemoteImages:
    """Fetches pictures.

    Args:
        origins: such as `https://example.org`, from which pictures may come.
        private: whether addresses that are not public are allowed.
    """

    def __init__(self, origins: tuple[str, ...], private: bool, limits: Limits):
        self._origins = frozenset(origin(one) for one in origins)
        self._private, self._limits = private, limits

    async def fetch(self, url: str, param: str) -> bytes:
        """A picture's file.

        Raises:
            ApiError: the address is not allowed, or what is there cannot be had.
        """
        if not self._origins:
            raise invalid("pictures are not fetched; send them as data URLs", param, "invalid_image_url")
        try:
            async with asyncio.timeout(SECONDS):
                return await self._follow(url, param)
        except (TimeoutError, httpx.HTTPError, httpx.InvalidURL, OSError, ValueError):
            raise _unavailable(param) from None

    async def _follow(self, url: str, param: str) -> bytes:
        async with httpx.AsyncClient(follow_redirects=False, trust_env=False) as client:
            for _ in range(REDIRECTS + 1):
                found = await self._get(client, url, param)
                if isinstance(found, bytes):
                    return found
                url = found
        raise _unavailable(param)

    async def _get(self, client: httpx.AsyncClient, url: str, param: str) -> bytes | str:
        """The file, or the address to go on to."""
        scheme, host, port = self._allowed(url, param)
        address = await self._address(host, port, param)
        parts = urlsplit(url)
        request = client.build_request(
            "GET",
            SplitResult(scheme, f"{address}:{port}", parts.path or "/", parts.query, "").geturl(),
            headers={"Host": host if port == PORTS[scheme] else f"{host}:{port}", "Accept": "image/*"},
            extensions={"sni_hostname": host},
        )
        response = await client.send(request, stream=True)
        try:
            if response.is_redirect:
                return urljoin(url, response.headers["location"])
            if response.status_code != 200:
                raise _unavailable(param)
            return await self._read(response, param)
        finally:
            await response.aclose()

    async def _read(self, response: httpx.Response, param: str) -> bytes:
        data = bytearray()
        async for part in response.aiter_raw():
            data += part
            if len(data) > self._limits.image_bytes:
                message = f"the picture is too large: its file is larger than {self._limits.image_bytes} bytes"
                raise invalid(message, param, "image_too_large", status=413)
        return bytes(data)

    def _allowed(self, url: str, param: str) -> tuple[str, str, int]:
        try:
            found = origin(url)
        except ValueError:
            raise invalid("not an address of a picture", param, "invalid_image_url") from None
        if found not in self._origins:
            raise invalid("pictures are not fetched from there", param, "invalid_image_url")
        return found

    async def _address(self, host: str, port: int, param: str) -> str:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [ipaddress.ip_address(entry[4][0]) for entry in found]
        if not addresses:
            raise _unavailable(param)
        if not self._private and not all(_is_public(one) for one in addresses):
            raise invalid("pictures are not fetched from addresses that are not public", param, "invalid_image_url")
        first = addresses[0]
        return f"[{first}]" if first.version == 6 else str(first)


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return address.is_global and not address.is_multicast


def _unavailable(param: str) -> ApiError:
    return invalid("the picture could not be fetched", param, "invalid_image_url")
