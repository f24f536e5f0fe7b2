"""Atropos' API (``run-api``), from the side of an environment: where the groups of its rollouts go."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Sequence
from typing import Any

import httpx

from hermes_atropos.errors import AnswerLostError, BackendConnectionError
from hermes_atropos.servers.failures import response_error, unexpected

__all__ = ["AtroposAPI"]

#: Failures of a request before any of it was sent.
NOT_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)


class AtroposAPI:
    """One request a method, each on a connection of its own: on one that was kept, an answer may get lost unnoticed.

    None retries. All raise ``BackendConnectionError`` where nobody answers at the address and nothing was sent,
    ``AnswerLostError`` where something was, and ``BackendResponseError`` where the answer is an error.

    Args:
        url: where ``run-api`` listens, without a path.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        # The address is the user's own: no proxy of the process's environment stands between.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._client = httpx.AsyncClient(timeout=120.0, limits=limits, trust_env=False)

    async def close(self) -> None:
        """Ask nothing more."""
        await self._client.aclose()

    async def register(self, **environment: Any) -> dict[str, Any] | None:
        """Register an environment (``env_id``, ``starting_step``, …); None while no trainer has started."""
        answer = await self._request("POST", "register-env", environment)
        return answer if answer.get("status") == "success" else None

    async def trainer(self) -> dict[str, Any]:
        """What the trainer registered: ``batch_size`` and ``max_token_len``, -1 each where none has."""
        return await self._request("GET", "info")

    async def status(self, env_id: int) -> dict[str, Any]:
        """Where training is, and how much waits: ``current_step``, ``queue_size``, ``self_queue_size``, …"""
        return await self._request("GET", "status-env", {"env_id": env_id})

    async def latest(self) -> dict[str, Any]:
        """The group that came last to the trainer's queue."""
        return await self._request("GET", "latest_example")

    async def send(self, groups: Sequence[dict[str, Any]], env_id: int) -> None:
        """Hand over groups (``ScoredDataGroup``s), all in one request."""
        await self._request("POST", "scored_data_list", [group | {"env_id": env_id} for group in groups])

    async def leave(self, env_id: int) -> None:
        """Say that an environment has ended."""
        await self._request("POST", "disconnect-env", {"env_id": env_id})

    async def _request(self, method: str, path: str, body: Any = None) -> Any:
        url = f"{self.url}/{path}"
        headers = {"Content-Type": "application/json"}
        content = None
        if body is not None:
            content, encoded = await asyncio.to_thread(_packed, body)
            headers |= encoded
        try:
            response = await self._client.request(method, url, content=content, headers=headers)
        except NOT_SENT as error:
            raise BackendConnectionError(
                f"nobody answers at {url}: {error or type(error).__name__}", url=url
            ) from error
        except httpx.TransportError as error:
            raise AnswerLostError(f"{url} gave no answer: {error or type(error).__name__}", url=url) from error
        if response.is_error:
            raise response_error(url, response.status_code, response.text, response.headers)
        try:
            return response.json()
        except ValueError:
            raise unexpected(url, response.text, "it is not JSON") from None


def _packed(body: Any) -> tuple[bytes, dict[str, str]]:
    """JSON as it is sent, and the header that says so."""
    content = json.dumps(body).encode()
    return (gzip.compress(content, 1), {"Content-Encoding": "gzip"}) if len(content) > 1024 else (content, {})
