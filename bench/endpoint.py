"""Where a server of objects is, and who may read there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BUCKET = "models"
REGION = "us-east-1"
ACCESS_KEY, SECRET_KEY = "benchmark", "benchmark-secret"
"""Of servers that listen on loopback and live as long as the run."""
IN_FLIGHT = 16
RANGE_BYTES = 8 << 20
LATENCY_S = 0.2
"""Of each answer of the server that is late."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server of objects."""

    url: str
    ca_file: str | None = None
    """Whom to trust about its certificate, over TLS."""

    def arguments(self) -> tuple[str, ...]:
        """Return what tells a case's process of it."""
        return ("--endpoint-url", self.url, *(() if self.ca_file is None else ("--ca-file", self.ca_file)))

    def options(self) -> dict[str, Any]:
        """Return the library's storage options."""
        return {
            "endpoint_url": self.url,
            "region_name": REGION,
            "aws_access_key_id": ACCESS_KEY,
            "aws_secret_access_key": SECRET_KEY,
            "verify": self.ca_file,
        }


def client_of(endpoint: Endpoint) -> Any:
    """Return an aiobotocore client, to be entered."""
    from aiobotocore.config import AioConfig
    from aiobotocore.session import get_session

    config = AioConfig(max_pool_connections=IN_FLIGHT, s3={"addressing_style": "path"})
    options = endpoint.options()
    return get_session().create_client("s3", config=config, **options)
