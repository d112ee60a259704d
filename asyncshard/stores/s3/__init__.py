"""Objects of S3, and of servers that speak its protocol: `S3Store`."""

from asyncshard.stores.s3.store import S3Store

__all__ = ["S3Store"]
