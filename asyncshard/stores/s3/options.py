"""The options of an `S3Store`, under boto3's names."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self
from urllib.parse import urlsplit

_ALIASES = {
    "key": "aws_access_key_id",
    "secret": "aws_secret_access_key",
    "token": "aws_session_token",
    "anon": "unsigned",
}
"""The names that s3fs has for some options."""
_STYLES = ("auto", "path", "virtual")
_TRANSPORTS = ("auto", "sockets", "aiobotocore")


@dataclass(frozen=True, slots=True)
class S3Options:
    """Credentials, the address of the server, and time limits. The repr shows no secret.

    Options that are None are looked for where botocore looks: AWS's environment variables, profiles, and, if neither
    has credentials, the services of the container or instance.
    """

    aws_access_key_id: str | None = field(default=None, repr=False)
    aws_secret_access_key: str | None = field(default=None, repr=False)
    aws_session_token: str | None = field(default=None, repr=False)
    profile_name: str | None = None
    """A profile of AWS's configuration files."""
    region_name: str | None = None
    """The region that requests are signed for."""
    endpoint_url: str | None = None
    """Address of a server other than AWS's: ``https://minio.internal:9000``."""
    verify: bool | str | None = None
    """False takes any certificate. A path is that of a file or folder of certificate authorities to trust."""
    addressing_style: str = "auto"
    """Where the bucket stands in a URL: "path", "virtual" (in the host), or "auto"."""
    unsigned: bool = False
    """Whether to send requests without credentials, for public buckets."""
    max_attempts: int = 5
    """A request fails after this many attempts in a row that bring nothing."""
    connect_timeout_s: float = 10.0
    """Seconds until a connection is made."""
    read_timeout_s: float = 30.0
    """Seconds without a byte after which a response counts as lost."""
    deadline_s: float = 300.0
    """Seconds for all attempts of one request."""
    transport: str = "auto"
    """How data is received: over "sockets" of our own, or by "aiobotocore"; "auto" takes sockets where possible."""
    verify_checksums: bool = False
    """Whether to compare objects with the checksums that the server has of them."""
    max_gap_bytes: int | None = None
    """Gaps up to this many bytes between wanted byte ranges are read too, to save a request. None stands for 1 MiB, and
    for 0 with `verify_checksums`, which must know every byte."""

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> Self:
        """Return the options that a user passed by keyword; None stands for the default.

        Raises
        ------
        TypeError
            An option that does not exist, one given under two names, or of the wrong type.
        ValueError
            A value out of range.
        """
        known = [item.name for item in fields(cls)]
        unknown = sorted(set(keywords) - set(known) - set(_ALIASES))
        if unknown:
            raise TypeError(
                f"unknown storage option{'s' * (len(unknown) > 1)} {', '.join(unknown)}; "
                f"this store knows {', '.join(known)}"
            )
        values: dict[str, Any] = {}
        for name, value in keywords.items():
            option = _ALIASES.get(name, name)
            if value is None:
                continue
            if option in values:
                raise TypeError(f"storage option {option} is given twice, once as {name}")
            values[option] = os.fspath(value) if isinstance(value, os.PathLike) else value
        return cls(**values)

    def __post_init__(self) -> None:
        for name in ("aws_access_key_id", "aws_secret_access_key", "aws_session_token", "profile_name", "region_name"):
            if not isinstance(getattr(self, name), str | None):
                raise TypeError(f"{name} must be a str")  # and not what it is, which may be a secret
        if (self.aws_access_key_id is None) != (self.aws_secret_access_key is None):
            raise ValueError("aws_access_key_id and aws_secret_access_key go together; one of them is missing")
        for name in ("unsigned", "verify_checksums"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if not isinstance(self.verify, bool | str | None):
            raise TypeError(f"verify must be True, False or a path, not {self.verify!r}")
        if self.unsigned and self.aws_access_key_id is not None:
            raise ValueError("unsigned requests need no credentials: pass either, not both")
        for name, choices in (("addressing_style", _STYLES), ("transport", _TRANSPORTS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, not {getattr(self, name)!r}")
        _require_number("max_attempts", self.max_attempts, int, 1)
        for name in ("connect_timeout_s", "read_timeout_s", "deadline_s"):
            _require_number(name, getattr(self, name), int | float, 1e-3)
        if self.max_gap_bytes is not None:
            _require_number("max_gap_bytes", self.max_gap_bytes, int, 0)
            if self.max_gap_bytes and self.verify_checksums:
                raise ValueError("verify_checksums needs every byte: it goes with max_gap_bytes=0 only")
        if self.endpoint_url is not None:
            _require_endpoint(self.endpoint_url)

    def style_for(self, endpoint_url: str | None) -> str:
        """Return the addressing style for an endpoint: "path" where a bucket cannot be part of the host's name."""
        if self.addressing_style != "auto" or endpoint_url is None:
            return self.addressing_style
        host = urlsplit(endpoint_url).hostname or ""
        return "path" if host == "localhost" or _is_address(host) else "auto"


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _require_number(name: str, value: Any, kind: Any, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not least <= value < float("inf"):
        raise ValueError(f"{name} must be {least:g} or more and finite, not {value!r}")


def _require_endpoint(url: Any) -> None:
    if not isinstance(url, str):
        raise TypeError(f"endpoint_url must be a str, not {url!r}")
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None:
        raise ValueError("endpoint_url holds credentials: pass aws_access_key_id and aws_secret_access_key instead")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"endpoint_url must be http://host or https://host, not {url!r}")
