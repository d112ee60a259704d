"""The client of one bucket, in the only module that imports botocore: credentials, regions, signatures, listings.

It runs on the store's own loop. Importing it takes a third of a second, and making the client reads JSON models, so
both happen there, at the store's first use. botocore's own retries are off: `http/retries.py` decides for all requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from datetime import UTC, datetime
from time import time
from typing import Any

import aiohttp
import botocore.auth
import botocore.exceptions
from aiobotocore.session import AioSession
from botocore import UNSIGNED
from botocore.config import Config
from botocore.httpsession import get_cert_path
from botocore.loaders import create_loader
from botocore.utils import get_environ_proxies

from asyncshard.errors import AccessDeniedError, ChecksumError, ObjectNotFoundError, StoreTimeoutError, TruncatedError
from asyncshard.stores.http.failures import Action, Failed, Failure
from asyncshard.stores.http.response import Pin, ResponseHead
from asyncshard.stores.s3.errors import ErrorBody, failure_of_error
from asyncshard.stores.s3.options import S3Options
from asyncshard.stores.s3.signed_urls import URL_LIFETIME_S, SignedUrls

_HEADERS_OF_CHECKSUMS = {"x-amz-checksum-mode": "ENABLED"}


class S3Client:
    """A client for one bucket.

    Parameters
    ----------
    options : S3Options
    bucket : str
    connections : int
        Requests in flight at most.
    """

    def __init__(self, options: S3Options, bucket: str, connections: int) -> None:
        self._options = options
        self._bucket = bucket
        self._connections = connections
        self._client: Any = None
        self._clients = contextlib.AsyncExitStack()
        """All clients that were made: requests in flight may still use one that has been replaced."""
        self._region: str | None = options.region_name
        self._clock_offset_s = 0.0
        """Seconds by which the server's clock is ahead of ours; set once the server has complained."""
        self.urls = SignedUrls(self._sign, _HEADERS_OF_CHECKSUMS if options.verify_checksums else {})
        self._lock = asyncio.Lock()
        self.generation = 0
        """Number of times that the way in which requests are signed was changed."""
        self._ca_bundle: bool | str = True

    @property
    def region(self) -> str:
        """The region that requests are signed for."""
        return str(self._client.meta.region_name)

    async def start(self) -> None:
        """Make the client, unless it is there."""
        async with self._lock:
            if self._client is None:
                await self._make()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._clients.aclose()

    async def remedy(self, failure: Failure, generation: int) -> None:
        """Apply the remedy for the failure of a request that was signed in `generation`.

        The first of several such requests does it for all.
        """
        async with self._lock:
            if generation != self.generation:
                return
            if failure.action is Action.CORRECT_CLOCK and failure.server_time is not None:
                self._clock_offset_s = failure.server_time - time()
            if failure.action is Action.CHANGE_REGION:
                self._region = failure.region
            # A new session looks for credentials anew: in files that were rewritten, at services that issue them.
            await self._make()
            self.urls.forget()
            self.generation += 1

    async def _make(self) -> None:
        options = self._options
        with _translated():
            session = AioSession(profile=options.profile_name)
            session.register_component("data_loader", _models())
            await self._make_client(session, options.style_for(options.endpoint_url))
            endpoint = self._client.meta.endpoint_url
            if options.style_for(endpoint) != options.style_for(options.endpoint_url):
                # The endpoint of AWS's configuration cannot have the bucket in its name.
                await self._make_client(session, options.style_for(endpoint))
            verify = True if options.verify is None else options.verify
            self._ca_bundle = session.get_config_variable("ca_bundle") or True if verify is True else verify
        if self._clock_offset_s and not options.unsigned:
            events = self._client.meta.events
            events.register("choose-signer.s3", lambda **_: UNSIGNED)  # nobody else is to sign
            events.register("before-sign.s3", self._sign_by_corrected_clock)

    async def _make_client(self, session: AioSession, style: str) -> None:
        options = self._options
        config = Config(
            signature_version=UNSIGNED if options.unsigned else "s3v4",
            s3={"addressing_style": style},
            connect_timeout=options.connect_timeout_s,
            read_timeout=options.read_timeout_s,
            max_pool_connections=self._connections,
            retries={"mode": "standard", "total_max_attempts": 1},
            response_checksum_validation="when_required",
        )
        self._client = await self._clients.enter_async_context(
            session.create_client(
                "s3",
                region_name=self._region,
                endpoint_url=options.endpoint_url,
                verify=options.verify,
                aws_access_key_id=options.aws_access_key_id,
                aws_secret_access_key=options.aws_secret_access_key,
                aws_session_token=options.aws_session_token,
                config=config,
            )
        )

    async def _sign_by_corrected_clock(
        self, request: Any, signing_name: str, region_name: str, request_signer: Any, **_: Any
    ) -> None:
        signing = request.context.get("signing", {})
        credentials = await request_signer._credentials.get_frozen_credentials()
        scope = (credentials, signing.get("signing_name", signing_name), signing.get("region", region_name))
        if request.context.get("is_presign_request"):
            auth = botocore.auth.S3SigV4QueryAuth(*scope, expires=URL_LIFETIME_S)
        else:
            auth = botocore.auth.S3SigV4Auth(*scope)
        # What `add_auth` does, but for the time.
        now = datetime.fromtimestamp(time() + self._clock_offset_s, UTC)
        request.context["timestamp"] = now.strftime(botocore.auth.SIGV4_TIMESTAMP)
        auth._modify_request_before_signing(request)
        text = auth.string_to_sign(request, auth.canonical_request(request))
        auth._inject_signature_to_request(request, auth.signature(text, request))

    # For connections of our own

    def reason_against_sockets(self) -> str | None:
        """Return why our own connections cannot reach this bucket, in words; None where they can."""
        endpoint = self._client.meta.endpoint_url
        if self._client.meta.config.proxies or get_environ_proxies(endpoint):
            return "a proxy is configured"
        if self._client.meta.config.client_cert:
            return "a client certificate is configured"
        if self._bucket.endswith("--x-s3"):
            return "buckets of S3 Express sign requests with sessions of their own"
        return None

    def tls_context(self) -> ssl.SSLContext:
        """Return the TLS context for our own connections. Slow: it parses certificates."""
        if self._ca_bundle is False:
            context = ssl.create_default_context()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            return context
        path = get_cert_path(self._ca_bundle)
        try:
            if os.path.isdir(path):
                return ssl.create_default_context(capath=path)
            return ssl.create_default_context(cafile=path)
        except OSError as error:
            raise Failed(Failure(f"the certificate authorities in {path} (verify) cannot be read: {error}")) from None

    async def _sign(self, key: str) -> str:
        parameters = {"Bucket": self._bucket, "Key": key} | self._checksum_mode()
        with _translated():
            return str(
                await self._client.generate_presigned_url("get_object", Params=parameters, ExpiresIn=URL_LIFETIME_S)
            )

    @contextlib.asynccontextmanager
    async def get(self, key: str, headers: Mapping[str, str]) -> AsyncIterator[tuple[ResponseHead, Any]]:
        """Get an object through aiobotocore; yield the head of the response and the stream of its body."""
        arguments = {"Range": headers["Range"]}
        if "If-Match" in headers:
            arguments["IfMatch"] = headers["If-Match"]
        with _translated():
            output = await self._client.get_object(Bucket=self._bucket, Key=key, **arguments, **self._checksum_mode())
            async with output["Body"] as body:
                yield _head_of(output), body

    # Listings and metadata

    async def list_page(self, prefix: str, token: str | None) -> tuple[list[str], str | None]:
        """Return names directly below a prefix, and the token of the next page."""
        more = {} if token is None else {"ContinuationToken": token}
        with _translated():
            page = await self._client.list_objects_v2(Bucket=self._bucket, Prefix=prefix, Delimiter="/", **more)
        names = [entry["Key"][len(prefix) :] for entry in page.get("Contents", ())]
        return [name for name in names if name], page.get("NextContinuationToken")

    async def head(self, key: str) -> tuple[Pin, Mapping[str, str]]:
        """Return an object's pin and the headers of the response."""
        with _translated():
            output = await self._client.head_object(Bucket=self._bucket, Key=key, **self._checksum_mode())
        headers = _head_of(output).headers
        return Pin(headers.get("etag", ""), int(headers.get("content-length", "0"))), headers

    def _checksum_mode(self) -> dict[str, str]:
        return {"ChecksumMode": "ENABLED"} if self._options.verify_checksums else {}


@functools.cache
def _models() -> Any:
    """Return botocore's reader of AWS's JSON models, one for the process: parsing them takes most of the time of making
    a client, and they never change."""
    return create_loader()


def _head_of(output: Any) -> ResponseHead:
    metadata = output["ResponseMetadata"]
    headers = {name.lower(): value for name, value in metadata["HTTPHeaders"].items()}
    return ResponseHead(metadata["HTTPStatusCode"], headers)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Turn botocore's errors into `Failed`, without their own text where it may hold a signed URL."""
    try:
        yield
    except botocore.exceptions.ClientError as error:
        raise Failed(_failure_of_response(error)) from None
    except botocore.exceptions.BotoCoreError as error:
        raise Failed(_failure_of_botocore(error)) from None
    except aiohttp.ClientError:
        raise Failed(Failure("the connection was lost", action=Action.RETRY, kind=TruncatedError)) from None
    except TimeoutError:
        raise Failed(Failure("the server did not answer", action=Action.RETRY, kind=StoreTimeoutError)) from None


def _failure_of_response(error: Any) -> Failure:
    fields = error.response.get("Error", {})
    code = fields.get("Code", "")
    if code.isdigit():  # the status, of a response without a body
        code = ""
    body = ErrorBody(code, fields.get("Message", ""), fields.get("Region"), fields.get("ServerTime"))
    return failure_of_error(_head_of(error.response), body)


_FAILURES: tuple[tuple[tuple[type[Exception], ...], Failure], ...] = (
    (
        (botocore.exceptions.NoCredentialsError,),
        Failure(
            "there are no AWS credentials: pass aws_access_key_id and aws_secret_access_key, set them in the "
            "environment or a profile, or pass unsigned=True for a public bucket",
            kind=AccessDeniedError,
        ),
    ),
    (
        (botocore.exceptions.ConnectTimeoutError, botocore.exceptions.ReadTimeoutError),
        Failure("the server did not answer in time", action=Action.RETRY, kind=StoreTimeoutError),
    ),
    (
        (botocore.exceptions.SSLError,),
        Failure("TLS failed: pass verify=, the path of the server's certificate authority, or check endpoint_url"),
    ),
    (
        (botocore.exceptions.IncompleteReadError, botocore.exceptions.ResponseStreamingError),
        Failure("the body ended early", action=Action.RETRY, kind=TruncatedError),
    ),
    (
        (botocore.exceptions.FlexibleChecksumError,),
        Failure("the body does not match its checksum", action=Action.RETRY, kind=ChecksumError),
    ),
    (
        (botocore.exceptions.HTTPClientError, botocore.exceptions.ConnectionError),
        Failure("the connection failed: check endpoint_url, and that the server is up", action=Action.RETRY),
    ),
)


def _failure_of_botocore(error: Exception) -> Failure:
    for kinds, failure in _FAILURES:
        if isinstance(error, kinds):
            return failure
    if isinstance(error, botocore.exceptions.ParamValidationError):
        return Failure("the bucket's or the object's name is not valid", kind=ObjectNotFoundError)
    # The other errors speak of profiles, regions and configuration, not of requests.
    return Failure(str(error), kind=AccessDeniedError)
