"""A store that is a prefix of an S3 bucket, at any server that honours conditional writes.

Endpoint, region and credentials come through boto3's own chain: `AWS_ENDPOINT_URL_S3`,
`AWS_ENDPOINT_URL`, `AWS_PROFILE`, `~/.aws/config`, instance roles. boto3's own retries are off, so
that `workers.storage.retry` is the only policy.

An object's version is its ETag. Each write carries a random token in the object's metadata: when
the answer to a conditional write was lost and the repeated request is refused, the token tells
whether the object that stands in the way is that write's own.

Known limit: SeaweedFS 4.48 does not make the end of a multipart upload atomic. Of two uploads of one
key that are committed within milliseconds both may succeed there; later ones are refused.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from botocore.exceptions import BotoCoreError, ClientError

from workers.errors import BadInputError
from workers.storage.files import is_own_name
from workers.storage.parts import check_part, check_whole, receipt_of
from workers.storage.retry import RetryPolicy, call_with_retries
from workers.storage.s3_requests import (
    NOTHING,
    AccessRefusedError,
    CutAnswerError,
    UploadGoneError,
    as_storage_error,
    ask,
    client_of_environment,
    passing_trouble,
)
from workers.storage.s3_uploads import (
    MemoryFile,
    S3Upload,
    check_least_size,
    new_token,
    proof_of,
)
from workers.storage.store import (
    Bytes,
    ObjectInfo,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
    Store,
    check_key,
    check_prefix,
)
from workers.storage.traffic import TRAFFIC

READ_CHUNK_BYTES = 2**20

_WRITTEN_BY = "darwin-written-by"
_DELETES_AT_ONCE = 8

Result = TypeVar("Result")


class S3Store(Store):
    """Objects under `s3://bucket/prefix`.

    Keys that S3 would take but `check_key` refuses are not listed.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        client: Any = None,
        policy: RetryPolicy | None = None,
    ) -> None:
        """`client`: a boto3 S3 client to use in place of the one that the environment describes."""
        self._bucket = bucket
        self._prefix = f"{check_key(prefix)}/" if prefix else ""
        self._given = client
        self._own = os.getpid(), client or client_of_environment()
        self._policy = policy or RetryPolicy()
        self.uri = f"s3://{bucket}/{prefix}".removesuffix("/")

    @property
    def _client(self) -> Any:
        """This process's: in a fork, the connections of the process that it comes from are still its."""
        process, client = self._own
        if process != os.getpid():
            client = self._given or client_of_environment()
            self._own = os.getpid(), client
        return client

    def read(self, key: str) -> bytes:
        return self.read_with_version(key)[0]

    def read_with_version(self, key: str) -> tuple[bytes, str]:
        def read() -> tuple[bytes, str]:
            answer = self._client.get_object(Bucket=self._bucket, Key=self._full(key))
            with closing(answer["Body"]) as body:
                return body.read(), answer["ETag"]

        with self._missing_told_from_refused(key):
            data, version = self._attempt("reading", key, read)
        TRAFFIC.count_read(len(data))
        return data, version

    def read_into(
        self, key: str, start: int, buffer: memoryview, version: str | None = None
    ) -> None:
        if not buffer.nbytes:
            # S3 knows no empty ranges; the object must exist all the same.
            self._check_unchanged(key, self.info(key).version, version)
            return
        wanted = f"bytes {start}-{start + buffer.nbytes - 1}"
        condition = {} if version is None else {"IfMatch": version}

        def fill(view: memoryview) -> None:
            answer = self._client.get_object(
                Bucket=self._bucket,
                Key=self._full(key),
                Range=wanted.replace(" ", "="),
                **condition,
            )
            with closing(answer["Body"]) as body:
                self._check_unchanged(key, answer.get("ETag", ""), version)
                given = answer.get("ContentRange", "the whole object")
                if not given.startswith(f"{wanted}/"):
                    raise StorageError(
                        f"reading {wanted} of {self._uri_of(key)}: the store gave {given}: the "
                        "object is cut short, or its index belongs to another, or the server "
                        "ignores ranges"
                    )
                while view:
                    # A broken stream raises in here too, and the whole range is read again.
                    count = body.readinto(view[:READ_CHUNK_BYTES])
                    if count == 0:
                        raise CutAnswerError(f"a body that is {len(view)} bytes short")
                    view = view[count:]

        try:
            with self._missing_told_from_refused(key):
                self._attempt(f"reading {wanted} of", key, partial(fill, buffer.cast("B")))
        except PreconditionFailedError:
            self._check_unchanged(key, "another", version)
            raise
        TRAFFIC.count_read(buffer.nbytes)

    def _check_unchanged(self, key: str, found: str, version: str | None) -> None:
        if version is not None and version != found:
            raise StorageError(
                f"{self._uri_of(key)} was changed since it was opened: "
                "begin again, and leave it alone meanwhile"
            )

    def info(self, key: str) -> ObjectInfo:
        answer = self._head(key)
        return ObjectInfo(key, answer["ContentLength"], answer["ETag"])

    def list_objects(self, prefix: str = "") -> Iterator[ObjectInfo]:
        # A folder's store that was copied here by other means may have brought its lock along. And AWS
        # lists in the order of the keys, SeaweedFS and S3 Express do not.
        found = [
            i for i in self._list_unordered(prefix) if not is_own_name(i.key.rpartition("/")[2])
        ]
        yield from sorted(found, key=lambda info: info.key)

    def write(self, key: str, data: Bytes) -> str:
        return self._put(key, data, "cannot be written")

    def create(self, key: str, data: Bytes) -> str:
        return self._put(key, data, "exists already", IfNoneMatch="*")

    def replace(self, key: str, data: Bytes, version: str) -> str:
        refusal = f"was changed or is gone: is not at {version}"
        return self._put(key, data, refusal, IfMatch=version)

    def delete(self, key: str) -> None:
        self._call("deleting", key, self._client.delete_object, NOTHING)

    def delete_many(self, keys: Iterable[str]) -> None:
        # Not by the request that removes many at once: not every server takes it from every client.
        with ThreadPoolExecutor(_DELETES_AT_ONCE) as threads:
            list(threads.map(self.delete, keys))

    def delete_folder(self, folder: str) -> None:
        self.delete_many([info.key for info in self._list_unordered(f"{check_key(folder)}/")])

    def begin_parts(self, key: str, size: int) -> str:
        token = new_token()
        answer = self._call(
            "starting an upload of",
            key,
            self._client.create_multipart_upload,
            "UploadId",
            Metadata={_WRITTEN_BY: token},
        )
        return str(S3Upload(size, token, answer["UploadId"]))

    def write_part(self, key: str, upload_id: str, number: int, start: int, data: Bytes) -> str:
        what = self._uri_of(key)
        upload = S3Upload.parse(what, upload_id)
        view = memoryview(data).cast("B")
        check_part(what, number, start, len(view), upload.size)
        check_least_size(what, number, start, len(view), upload.size)
        answer = self._call(
            f"uploading part {number} of",
            key,
            # A body of its own for each try.
            lambda **arguments: self._client.upload_part(Body=MemoryFile(view), **arguments),
            "ETag",
            UploadId=upload.s3_id,
            PartNumber=number,
        )
        TRAFFIC.count_written(len(view))
        return receipt_of(start, len(view), **proof_of(answer))

    def finish_parts(self, key: str, upload_id: str, receipts: dict[int, str]) -> None:
        what = self._uri_of(key)
        upload = S3Upload.parse(what, upload_id)
        if not upload.size and not receipts:  # S3 knows no object of no parts.
            receipts = {1: self.write_part(key, upload_id, 1, 0, b"")}
        parts = [
            {"PartNumber": number, **proof_of(receipt)}
            for number, receipt in check_whole(what, receipts, upload.size).items()
        ]
        try:
            self._call(
                "completing an upload of",
                key,
                self._client.complete_multipart_upload,
                "ETag",
                UploadId=upload.s3_id,
                MultipartUpload={"Parts": parts},
                IfNoneMatch="*",
            )
        except (PreconditionFailedError, UploadGoneError) as error:
            if self._version_written_by(upload.token, key) is not None:
                return
            if isinstance(error, UploadGoneError):
                raise
            self.abandon_parts(key, upload_id)
            raise PreconditionFailedError(f"{what} exists already") from error

    def abandon_parts(self, key: str, upload_id: str) -> None:
        with suppress(Exception):
            self._discard(self._full(key), S3Upload.parse(self._uri_of(key), upload_id).s3_id)

    def parts_exist(self, key: str, upload_id: str) -> bool:
        try:
            self._call(
                "looking up an upload of",
                key,
                self._client.list_parts,
                "UploadId",
                UploadId=S3Upload.parse(self._uri_of(key), upload_id).s3_id,
                MaxParts=1,
            )
        except UploadGoneError:
            return False
        return True

    def discard_unfinished(self, prefix: str) -> int:
        list_page = partial(
            ask,
            self._client.list_multipart_uploads,
            "IsTruncated",
            Bucket=self._bucket,
            Prefix=self._prefix + check_prefix(prefix),
        )
        discarded = 0
        seen: set[str] = set()
        while True:
            # Always the first page, as what was on it is gone then: not all servers give complete
            # markers of the next.
            page = self._attempt("listing unfinished uploads under", prefix, list_page)
            fresh = [one for one in page.get("Uploads", []) if one["UploadId"] not in seen]
            for upload in fresh:
                seen.add(upload["UploadId"])
                discarded += self._discard(upload["Key"], upload["UploadId"])
            if not page["IsTruncated"]:
                return discarded
            if not fresh:
                raise StorageError(
                    f"{self._uri_of(prefix)}: the store goes on listing {len(seen)} unfinished "
                    "uploads that were discarded: try again in a minute"
                )

    def _discard(self, full_key: str, upload_id: str) -> bool:
        """Abort an upload; whether it was there."""
        abort = partial(
            self._client.abort_multipart_upload,
            Bucket=self._bucket,
            Key=full_key,
            UploadId=upload_id,
        )
        try:
            self._attempt("discarding an upload of", full_key.removeprefix(self._prefix), abort)
        except UploadGoneError:
            return False
        return True

    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None

    def substore(self, prefix: str) -> S3Store:
        prefix = check_key(prefix.removesuffix("/"))
        store = S3Store(
            self._bucket, self._prefix + prefix, client=self._client, policy=self._policy
        )
        store._given = self._given
        return store

    def list_folders(self) -> Iterator[str]:
        # S3 puts together what has the same first part: their objects are not listed.
        found: set[str] = set()
        for page in self._list_pages("", Delimiter="/"):
            for common in page.get("CommonPrefixes", []):
                folder = common["Prefix"].removeprefix(self._prefix).removesuffix("/")
                with suppress(BadInputError):
                    found.add(check_key(folder))
        yield from sorted(found)

    def _list_unordered(self, prefix: str) -> Iterator[ObjectInfo]:
        for page in self._list_pages(prefix):
            for found in page.get("Contents", []):
                key = found["Key"].removeprefix(self._prefix)
                # Some tools put empty objects in the place of folders: `folder/`, or the prefix's.
                with suppress(BadInputError):
                    yield ObjectInfo(check_key(key), found["Size"], found["ETag"])

    def _list_pages(self, prefix: str, **options: str) -> Iterator[dict[str, Any]]:
        full_prefix = self._prefix + check_prefix(prefix)
        next_page: dict[str, str] = {}
        while True:
            list_page = partial(
                ask,
                self._client.list_objects_v2,
                "IsTruncated",
                Bucket=self._bucket,
                Prefix=full_prefix,
                **options,
                **next_page,
            )
            page = self._attempt("listing", prefix, list_page)
            yield page
            if not page["IsTruncated"]:
                return
            next_page = {"ContinuationToken": page["NextContinuationToken"]}

    def _full(self, key: str) -> str:
        return self._prefix + check_key(key)

    def _uri_of(self, key: str) -> str:
        return f"{self.uri}/{key}"

    def _attempt(self, what: str, key: str, action: Callable[[], Result]) -> Result:
        """Run `action` under the retry policy; what it raises becomes a `StorageError`."""
        try:
            return call_with_retries(
                action, f"{what} {self._uri_of(key)}", passing_trouble, self._policy
            )
        except (ClientError, BotoCoreError) as error:
            raise as_storage_error(error, f"{what} {self._uri_of(key)}") from error

    def _call(
        self, what: str, key: str, operation: Callable[..., Any], promised: str, **arguments: Any
    ) -> Any:
        """One request about the object `key`; its answer holds `promised`."""
        where = {"Bucket": self._bucket, "Key": self._full(key)}
        return self._attempt(what, key, partial(ask, operation, promised, **where, **arguments))

    def _head(self, key: str) -> Any:
        with self._missing_told_from_refused(key):
            return self._call("looking up", key, self._client.head_object, "ETag")

    @contextmanager
    def _missing_told_from_refused(self, key: str) -> Iterator[None]:
        """AWS says 403 of a missing object to those who may not list the whole bucket. They may be
        allowed to list a prefix, and a listing tells the two apart."""
        try:
            yield
        except AccessRefusedError as error:
            try:
                exists = any(info.key == key for info in self._list_unordered(key))
            except StorageError:
                exists = True  # for all that is known
            if exists:
                raise
            raise ObjectNotFoundError(
                f"looking for {self._uri_of(key)}: there is no such object"
            ) from error

    def _put(self, key: str, data: Bytes, refusal: str, **condition: str) -> str:
        """Put the object under `condition`; `refusal` says what it means when that fails."""
        token = secrets.token_hex(16)
        body = data if isinstance(data, bytes | bytearray) else bytes(data)
        try:
            answer = self._call(
                "writing",
                key,
                self._client.put_object,
                "ETag",
                Body=body,
                Metadata={_WRITTEN_BY: token},
                **condition,
            )
        # Of an object that is gone AWS says 404 and others 412.
        except (PreconditionFailedError, ObjectNotFoundError) as error:
            version = self._version_written_by(token, key)
            if version is None:
                raise PreconditionFailedError(f"{self._uri_of(key)} {refusal}") from error
            return version
        TRAFFIC.count_written(len(body))
        return str(answer["ETag"])

    def _version_written_by(self, token: str, key: str) -> str | None:
        """The object's version if it was written with this token, else None."""
        try:
            answer = self._head(key)
        except ObjectNotFoundError:
            return None
        return str(answer["ETag"]) if answer["Metadata"].get(_WRITTEN_BY) == token else None
