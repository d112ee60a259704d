"""The address of an S3 server, and the credentials with which the benchmark reads from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BUCKET = "models"
REGION = "us-east-1"
ACCESS_KEY, SECRET_KEY = "benchmark", "benchmark-secret"
"""The credentials of the servers, which listen on loopback and end with the run."""
IN_FLIGHT = 16
"""Peers have 16 requests in flight."""
RANGE_BYTES = 8 << 20
"""Peers read ranges of 8 MiB."""
LATENCY_S = 0.2
"""Every answer of the slow server begins 0.2 s late."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An S3 server."""

    url: str
    ca_file: str | None = None
    """File of the certificates that the client trusts, for TLS; None for plain HTTP."""

    def arguments(self) -> tuple[str, ...]:
        """Return the command-line arguments with which the process of a case finds the server."""
        return ("--endpoint-url", self.url, *(() if self.ca_file is None else ("--ca-file", self.ca_file)))

    def options(self) -> dict[str, Any]:
        """Return the `storage_options` of the library for this server."""
        return {
            "endpoint_url": self.url,
            "region_name": REGION,
            "aws_access_key_id": ACCESS_KEY,
            "aws_secret_access_key": SECRET_KEY,
            "verify": self.ca_file,
        }


def client_of(endpoint: Endpoint) -> Any:
    """Return an aiobotocore client for a server, to be entered with ``async with``."""
    from aiobotocore.config import AioConfig
    from aiobotocore.session import get_session

    config = AioConfig(max_pool_connections=IN_FLIGHT, s3={"addressing_style": "path"})
    options = endpoint.options()
    return get_session().create_client("s3", config=config, **options)
