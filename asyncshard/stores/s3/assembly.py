"""The parts of an `S3Store`, put together. Importing this module imports botocore."""

from __future__ import annotations

import logging

from asyncshard.events import Listener
from asyncshard.stores.http.exchange import Limits
from asyncshard.stores.http.pool import HttpPool
from asyncshard.stores.http.retries import RetryPolicy
from asyncshard.stores.s3.client import S3Client
from asyncshard.stores.s3.options import S3Options
from asyncshard.stores.s3.reader import S3Reader
from asyncshard.stores.s3.transports import BotoTransport, SocketTransport, Transport

logger = logging.getLogger("asyncshard")

_SLOW_BYTES_PER_S = 64 << 10
_SLOW_WINDOW_S = 10.0


def make_reader(options: S3Options, bucket: str, max_workers: int, report: Listener) -> S3Reader:
    """Return the reader of a store. It is made, and used, on the store's own loop."""
    client = S3Client(options, bucket, max_workers)
    limits = Limits(
        options.connect_timeout_s, options.read_timeout_s, int(_SLOW_BYTES_PER_S * _SLOW_WINDOW_S), _SLOW_WINDOW_S
    )

    def make_transport() -> Transport:
        reason = client.reason_against_sockets() if options.transport == "auto" else None
        if options.transport == "aiobotocore" or reason is not None:
            if reason is not None:
                logger.info("s3://%s: reading through aiobotocore, since %s", bucket, reason)
            return BotoTransport(client, limits)
        return SocketTransport(client, HttpPool(limits, client.tls_context))

    integrity = None
    if options.verify_checksums:
        from asyncshard.stores.s3.integrity import Integrity

        integrity = Integrity(report)
    policy = RetryPolicy(max_attempts=options.max_attempts, deadline_s=options.deadline_s)
    return S3Reader(client, make_transport, bucket, policy, report, max_workers=max_workers, integrity=integrity)
