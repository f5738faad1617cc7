"""The S3 store against a real server, behind a network that fails, and against a careless server."""

from __future__ import annotations

import random
import time
import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from botocore.response import StreamingBody

from tests.fault_proxy import FaultProxy, answer, cut_answer, delay, lose_answer, reset
from tests.servers import S3Server
from workers.errors import BadInputError
from workers.storage import (
    Bytes,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageError,
    Store,
    check_store,
    open_store,
)
from workers.storage.conformance import StoreConformance
from workers.storage.conformance_parts import PART, content_of, put_in_parts, write_all
from workers.storage.conformance_tools import THREADS, add_one, in_threads, succeeds
from workers.storage.folder import FolderStore
from workers.storage.retry import RetryPolicy
from workers.storage.s3 import S3Store

HASTY = RetryPolicy(tries=4, first_wait=0.01, longest_wait=0.05, total_seconds=20)


@pytest.fixture
def location(s3_location: str) -> str:
    """A prefix of this test's own."""
    return f"{s3_location}/{uuid.uuid4().hex}"


@pytest.fixture
def store(location: str) -> Store:
    """The server without anything in between."""
    return open_store(location)


@pytest.fixture(scope="module")
def shared_proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy: FaultProxy) -> Iterator[FaultProxy]:
    """Without faults and memories; shared, as a new endpoint costs a new boto3 client."""
    shared_proxy.heal()
    shared_proxy.requests.clear()
    yield shared_proxy
    shared_proxy.heal()


@pytest.fixture
def faulty(location: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """The same objects as `store`, seen through the proxy by one who gives up soon."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    return S3Store(*bucket_and_prefix(location), policy=HASTY)


def bucket_and_prefix(location: str) -> tuple[str, str]:
    bucket, _, prefix = location.removeprefix("s3://").partition("/")
    return bucket, prefix


class TestS3Store(StoreConformance):
    @pytest.fixture
    def store(self, location: str) -> Store:
        return open_store(location)

    def test_of_many_uploads_one_is_published(self, store: Store) -> None:
        """What SeaweedFS 4.48 keeps of it: of commits within milliseconds, several may succeed.

        It refuses later ones, as the other tests show; for `create` and `replace` it has a lock.
        """
        uploads = [store.begin_parts("object", 1) for _ in range(THREADS)]
        receipts = [
            write_all(store, "object", upload_id, b"%d" % number)
            for number, upload_id in enumerate(uploads)
        ]
        wins = in_threads(
            lambda number: succeeds(
                lambda: store.finish_parts("object", uploads[number], receipts[number])
            )
        )
        assert any(wins)
        assert wins[int(store.read("object"))]
        assert store.discard_unfinished("") == 0


class TestS3StoreAtTheTopOfABucket:
    def test_keys_are_the_buckets(self, s3_location: str) -> None:
        top = open_store(s3_location)
        key = f"{uuid.uuid4().hex}/object"
        top.write(key, b"bytes")
        assert top.uri == s3_location
        assert open_store(f"{s3_location}/{key.split('/')[0]}").read("object") == b"bytes"
        assert [info.key for info in top.list_objects(key)] == [key]


def test_many_objects_are_listed_page_by_page(store: Store, s3_server: S3Server) -> None:
    assert isinstance(store, S3Store)
    list_page = store._client.list_objects_v2
    pages: list[dict[str, Any]] = []

    class SmallPages:
        def list_objects_v2(self, **arguments: Any) -> Any:
            pages.append(arguments)
            return list_page(MaxKeys=3, **arguments)

    keys = [f"a/{number}" for number in range(5)] + ["a b", "a-b", "a.b", "a/3/c", "a/3-c"]
    for key in keys:
        store.write(key, b"x")
    paged = S3Store(*bucket_and_prefix(store.uri), client=SmallPages())
    assert [info.key for info in paged.list_objects()] == sorted(keys)
    assert len(pages) == 4


def test_many_unfinished_uploads_are_discarded_page_by_page(store: S3Store) -> None:
    client = store._client
    pages: list[dict[str, Any]] = []

    class SmallPages:
        abort_multipart_upload = client.abort_multipart_upload

        def list_multipart_uploads(self, **arguments: Any) -> Any:
            pages.append(arguments)
            return client.list_multipart_uploads(MaxUploads=2, **arguments)

    keys = [f"folder/{number % 3}" for number in range(7)]
    uploads = [store.begin_parts(key, 0) for key in keys]
    other = store.begin_parts("other", 0)
    paged = S3Store(*bucket_and_prefix(store.uri), client=SmallPages())
    assert paged.discard_unfinished("folder/") == 7
    assert len(pages) == 4
    for key, upload_id in zip(keys, uploads, strict=True):
        with pytest.raises(StorageError, match="discarded"):
            store.finish_parts(key, upload_id, {})
    store.finish_parts("other", other, {})


def test_empty_objects_in_the_place_of_folders_are_not_listed(store: S3Store) -> None:
    bucket, prefix = bucket_and_prefix(store.uri)
    store._client.put_object(Bucket=bucket, Key=f"{prefix}/folder/", Body=b"")
    store.write("folder/object", b"bytes")
    assert [info.key for info in store.list_objects()] == ["folder/object"]


def test_a_folders_store_may_be_copied_into_a_bucket(store: S3Store, tmp_path: Path) -> None:
    """With its hidden lock, as tools that copy folders do."""
    folder = FolderStore(tmp_path)
    folder.replace("ledger/one.json", b"2", folder.create("ledger/one.json", b"1"))
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) == 2
    for file in files:
        store.write(str(file.relative_to(tmp_path)), file.read_bytes())
    assert [info.key for info in store.list_objects()] == ["ledger/one.json"]
    store.delete_folder("ledger")
    assert not list(store._list_unordered(""))


def test_a_missing_bucket_is_the_users_to_mend(faulty: S3Store, proxy: FaultProxy) -> None:
    missing = open_store("s3://there-is-no-such-bucket/prefix")
    message = r"s3://there-is-no-such-bucket/prefix.*there is no such bucket: create it"
    with pytest.raises(BadInputError, match=message):
        missing.read("object")
    with pytest.raises(BadInputError, match=message):
        list(missing.list_objects())
    # SeaweedFS makes a bucket for who may; AWS does not.
    proxy.inject(answer(404, "NoSuchBucket"))
    with pytest.raises(BadInputError, match="there is no such bucket"):
        faulty.create("object", b"bytes")


def test_wrong_credentials_are_named_at_once(
    location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match=r"access was refused .*check the credentials"):
        open_store(location).read("object")


def test_no_credentials_are_the_users_to_mend(
    location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(BadInputError, match=r"set AWS_ACCESS_KEY_ID"):
        open_store(location).read("object")


def test_stores_of_one_environment_share_a_client(
    location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def client_of(store: Store) -> Any:
        assert isinstance(store, S3Store)
        return store._client

    first = client_of(open_store(location))
    assert client_of(open_store(f"{location}/below")) is first
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert client_of(open_store(location)).meta.endpoint_url == "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("endpoint", "style"),
    [("https://storage.example.org", "path"), (None, None)],
    ids=["own endpoint", "AWS"],
)
def test_own_endpoints_are_addressed_by_path(
    s3_location: str, monkeypatch: pytest.MonkeyPatch, endpoint: str | None, style: str | None
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    if endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
    client = S3Store("bucket")._client
    url = client.generate_presigned_url("get_object", Params={"Bucket": "bucket", "Key": "key"})
    expected = f"{endpoint}/bucket/key?" if style else "https://bucket.s3.amazonaws.com/key?"
    assert url.startswith(expected)


# Faults of the network and the server. Each operation must come through each fault that passes.

CONTENT = random.Random(3).randbytes(3_000_000)


def read_whole(store: Store) -> object:
    return store.read("object") == CONTENT


def read_range(store: Store) -> object:
    buffer = bytearray(2_000_000)
    store.read_into("object", 500_000, memoryview(buffer))
    return buffer == CONTENT[500_000:2_500_000]


def look_up(store: Store) -> object:
    return store.info("object").size == len(CONTENT)


def list_all(store: Store) -> object:
    return [info.key for info in store.list_objects()] == ["object"]


def write_again(store: Store) -> object:
    version = store.write("object", b"again")
    return store.read_with_version("object") == (b"again", version)


def create_another(store: Store) -> object:
    version = store.create("another", b"another")
    return store.read_with_version("another") == (b"another", version)


def swap(store: Store) -> object:
    version = store.replace("object", b"swapped", store.info("object").version)
    return store.read_with_version("object") == (b"swapped", version)


def remove(store: Store) -> object:
    store.delete("object")
    return list(store.list_objects()) == []


def upload_another(store: Store) -> object:
    put_in_parts(store, "another", CONTENT)
    return store.read("another") == CONTENT


def look_up_an_upload(store: Store) -> object:
    upload_id = store.begin_parts("another", 5)
    was_there = store.parts_exist("another", upload_id)
    store.abandon_parts("another", upload_id)
    return was_there and not store.parts_exist("another", upload_id)


OPERATIONS = [
    read_whole,
    read_range,
    look_up,
    list_all,
    write_again,
    create_another,
    swap,
    remove,
    upload_another,
    look_up_an_upload,
]
FAULTS = {
    "503": answer(503, "SlowDown"),
    "500": answer(500, "InternalError"),
    "429": answer(429, "TooManyRequests"),
    "reset": reset,
    "lost answer": lose_answer,
}
WRITES_FAULTS = {
    "409": answer(409, "ConditionalRequestConflict"),
    "timeout": answer(400, "RequestTimeout"),
    "damage": answer(400, "BadDigest"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_pass_do_no_harm(
    store: Store, faulty: S3Store, proxy: FaultProxy, operation: Any, fault: str
) -> None:
    store.write("object", CONTENT)
    proxy.inject(FAULTS[fault], times=2)
    assert operation(faulty)
    assert proxy.faults_left == 0


@pytest.mark.parametrize("operation", [write_again, create_another, swap, upload_another])
@pytest.mark.parametrize("fault", WRITES_FAULTS)
def test_faults_of_writes_that_pass_do_no_harm(
    store: Store, faulty: S3Store, proxy: FaultProxy, operation: Any, fault: str
) -> None:
    store.write("object", CONTENT)
    proxy.inject(WRITES_FAULTS[fault], times=2, only="PUT")
    assert operation(faulty)
    assert proxy.faults_left == 0


@pytest.mark.parametrize("operation", [list_all, upload_another])
@pytest.mark.parametrize("after_bytes", [0, 50])
@pytest.mark.parametrize("cleanly", [True, False])
def test_a_cut_document_is_asked_for_again(
    store: Store,
    faulty: S3Store,
    proxy: FaultProxy,
    operation: Any,
    after_bytes: int,
    cleanly: bool,
) -> None:
    store.write("object", CONTENT)
    for verb in ("GET", "POST"):
        proxy.inject(cut_answer(after_bytes, cleanly), only=verb)
    assert operation(faulty)


@pytest.mark.parametrize("position", range(6))
def test_an_upload_survives_a_lost_answer_to_each_of_its_requests(
    store: Store, faulty: S3Store, proxy: FaultProxy, position: int
) -> None:
    verbs = ["POST", "PUT", "POST"]  # Begin, write, finish.
    fault = [reset, lose_answer][position // 3]

    def meet(step: int) -> None:
        if position % 3 == step:
            proxy.inject(fault, only=verbs[step])

    meet(0)
    upload_id = faulty.begin_parts("object", len(CONTENT))
    meet(1)
    receipts = write_all(faulty, "object", upload_id, CONTENT)
    meet(2)
    faulty.finish_parts("object", upload_id, receipts)
    assert proxy.faults_left == 0
    assert store.read("object") == CONTENT


@pytest.mark.parametrize("cleanly", [False, True])
@pytest.mark.parametrize("after_bytes", [0, 1, 1_000_000, 1_999_999])
def test_a_cut_stream_never_gives_short_data(
    store: Store, faulty: S3Store, proxy: FaultProxy, after_bytes: int, cleanly: bool
) -> None:
    store.write("object", CONTENT)
    proxy.inject(cut_answer(after_bytes, cleanly), times=2, only="GET")
    assert read_range(faulty)
    proxy.inject(cut_answer(after_bytes, cleanly), times=2, only="GET")
    assert read_whole(faulty)
    assert len(proxy.requests) == 6
    proxy.inject(cut_answer(after_bytes, cleanly), times=HASTY.tries, only="GET")
    with pytest.raises(StorageError, match=f"bytes 500000-2499999 of {store.uri}/object failed 4"):
        read_range(faulty)


def test_an_answer_that_is_short_in_good_order_is_no_answer() -> None:
    class ShortAnswers:
        def get_object(self, **arguments: Any) -> Any:
            body = StreamingBody(BytesIO(b"12345"), content_length=5)
            return {"Body": body, "ContentRange": "bytes 0-9/10"}

    store = S3Store("bucket", client=ShortAnswers(), policy=HASTY)
    with pytest.raises(StorageError, match=r"failed 4 times .* 5 bytes short"):
        store.read_into("object", 0, memoryview(bytearray(10)))


def test_a_store_that_stays_down_is_given_up(faulty: S3Store, proxy: FaultProxy) -> None:
    proxy.inject(answer(503, "SlowDown"), times=100)
    with pytest.raises(
        StorageError, match=rf"reading {faulty.uri}/object failed 4 times in .*SlowDown \(503\)"
    ):
        faulty.read("object")
    assert len(proxy.requests) == HASTY.tries


def test_the_time_of_retries_is_bounded(location: str, proxy: FaultProxy, faulty: S3Store) -> None:
    policy = RetryPolicy(tries=10**6, first_wait=0.05, longest_wait=0.1, total_seconds=0.5)
    patient = S3Store(*bucket_and_prefix(location), client=faulty._client, policy=policy)
    proxy.inject(reset, times=10**4)
    start = time.monotonic()
    with pytest.raises(StorageError, match="failed"):
        patient.read("object")
    assert time.monotonic() - start < 5
    assert 3 < len(proxy.requests) < 10**3


def test_an_unreachable_store_is_given_up(
    location: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultProxy(s3_server.endpoint) as gone:
        monkeypatch.setenv("AWS_ENDPOINT_URL", gone.endpoint)
    with pytest.raises(StorageError, match=r"failed 4 times.*reachable"):
        S3Store(*bucket_and_prefix(location), policy=HASTY).read("object")


@pytest.mark.parametrize("status", [400, 403, 404, 501])
def test_faults_that_do_not_pass_are_not_retried(
    faulty: S3Store, proxy: FaultProxy, status: int
) -> None:
    proxy.inject(answer(status, "NoSuchKey" if status == 404 else "Injected"), times=100)
    with pytest.raises(ObjectNotFoundError if status == 404 else StorageError):
        faulty.read("object")
    listings = status == 403  # it may be what AWS says of a missing object
    assert len(proxy.requests) == 1 + listings


def test_a_slow_answer_is_awaited(store: Store, faulty: S3Store, proxy: FaultProxy) -> None:
    store.write("object", CONTENT)
    proxy.inject(delay(0.3))
    assert read_whole(faulty)
    assert len(proxy.requests) == 1


def test_a_create_whose_answer_was_lost_against_anothers_object_loses(
    store: Store, faulty: S3Store, proxy: FaultProxy
) -> None:
    store.create("object", b"another's")
    proxy.inject(lose_answer, times=2)
    with pytest.raises(PreconditionFailedError, match=f"{store.uri}/object exists already"):
        faulty.create("object", b"mine")
    assert store.read("object") == b"another's"


def test_identical_bytes_of_another_writer_are_not_taken_for_ones_own(
    store: Store, faulty: S3Store, proxy: FaultProxy
) -> None:
    store.create("object", b"same bytes")
    proxy.inject(reset)
    with pytest.raises(PreconditionFailedError):
        faulty.create("object", b"same bytes")


def test_a_cas_counter_under_faults_counts_its_wins(
    store: Store, faulty: S3Store, proxy: FaultProxy
) -> None:
    """A lost answer may turn a win into a reported loss, but never a loss into a win."""
    store.create("counter", b"0")
    chance = random.Random(4)
    for _ in range(40):
        fault = chance.choice([reset, lose_answer, answer(503)])
        proxy.inject(fault, only=chance.choice(["GET", "PUT", "HEAD"]))
    outcomes: list[bool | Exception] = []

    def count(racer: int) -> None:
        for _ in range(5):
            try:
                outcomes.append(add_one(faulty, "counter"))
            except StorageError as error:
                outcomes.append(error)

    in_threads(count)
    assert proxy.faults_left < 40
    assert len(outcomes) == 5 * THREADS
    assert 0 < outcomes.count(True) <= int(store.read("counter")) <= 5 * THREADS
    given_up = [error for error in outcomes if isinstance(error, Exception)]
    assert all("failed 4 times" in str(error) for error in given_up)


def test_a_part_that_fails_for_good_can_be_written_later(
    store: Store, faulty: S3Store, proxy: FaultProxy
) -> None:
    content = content_of(PART + 1)
    upload_id = faulty.begin_parts("object", len(content))
    proxy.inject(answer(503), times=HASTY.tries, only="PUT")
    message = f"uploading part 1 of {store.uri}/object failed 4 times"
    with pytest.raises(StorageError, match=message):
        write_all(faulty, "object", upload_id, content)
    receipts = write_all(faulty, "object", upload_id, content)
    proxy.inject(answer(503), times=HASTY.tries, only="POST")
    with pytest.raises(StorageError, match=r"completing an upload of .* failed 4 times"):
        faulty.finish_parts("object", upload_id, receipts)
    assert list(store.list_objects()) == []
    faulty.finish_parts("object", upload_id, receipts)
    assert store.read("object") == content


def test_a_finish_whose_answer_was_lost_is_known_by_another_process(
    store: Store, faulty: S3Store, proxy: FaultProxy
) -> None:
    upload_id = faulty.begin_parts("object", len(CONTENT))
    receipts = write_all(faulty, "object", upload_id, CONTENT)
    proxy.inject(lose_answer, only="POST")
    proxy.inject(reset, times=HASTY.tries - 1, only="POST")
    with pytest.raises(StorageError, match="failed 4 times"):
        faulty.finish_parts("object", upload_id, receipts)
    assert store.read("object") == CONTENT
    version = store.info("object").version
    store.finish_parts("object", upload_id, receipts)
    assert store.info("object").version == version


def test_the_object_is_what_the_receipts_say(store: Store) -> None:
    """A writer that was thought dead may overwrite a part whose receipt another one has."""
    content = content_of(PART + 100)
    upload_id = store.begin_parts("object", len(content))
    receipts = write_all(store, "object", upload_id, content)
    store.write_part("object", upload_id, 2, PART, bytes(100))
    try:
        store.finish_parts("object", upload_id, receipts)  # SeaweedFS keeps what it once had.
    except StorageError:
        receipts = write_all(store, "object", upload_id, content)
        store.finish_parts("object", upload_id, receipts)
    assert store.read("object") == content


def test_a_receipt_of_a_part_that_the_store_does_not_have_is_refused(store: Store) -> None:
    content = content_of(PART + 100)
    begun = [store.begin_parts("object", len(content)) for _ in range(2)]
    receipts = write_all(store, "object", begun[0], content)
    store.write_part("object", begun[1], 1, 0, content[:PART])
    with pytest.raises(StorageError, match=f"completing an upload of {store.uri}/object"):
        store.finish_parts("object", begun[1], receipts)
    assert list(store.list_objects()) == []
    assert store.parts_exist("object", begun[1])


def test_small_parts_are_refused_before_they_are_sent(faulty: S3Store, proxy: FaultProxy) -> None:
    upload_id = faulty.begin_parts("object", PART + 10)
    with pytest.raises(StorageError, match=rf"object: part 1 of {PART - 1} bytes is not the last"):
        faulty.write_part("object", upload_id, 1, 0, bytes(PART - 1))
    assert not any(request.startswith("PUT") for request in proxy.requests)


def test_a_part_is_sent_without_a_copy_of_it(store: Store) -> None:
    content = bytearray(content_of(16 * 2**20))
    upload_id = store.begin_parts("object", len(content))
    tracemalloc.start()
    try:
        receipt = store.write_part("object", upload_id, 1, 0, memoryview(content))
        most_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    store.abandon_parts("object", upload_id)
    assert str(len(content)) in receipt
    assert most_bytes < 2**20


def test_abandoning_at_a_store_that_is_down_raises_nothing(
    store: Store, faulty: S3Store, proxy: FaultProxy
) -> None:
    upload_id = faulty.begin_parts("object", 5)
    proxy.inject(reset, times=100)
    faulty.abandon_parts("object", upload_id)
    proxy.heal()
    assert store.discard_unfinished("") == 1


def test_a_changed_object_is_noticed_on_a_server_that_ignores_the_condition(
    store: S3Store,
) -> None:
    class Careless:
        def get_object(self, **arguments: Any) -> Any:
            del arguments["IfMatch"]
            return store._client.get_object(**arguments)

    version = store.create("object", b"first")
    store.write("object", b"again")
    careless = S3Store(*bucket_and_prefix(store.uri), client=Careless())
    with pytest.raises(StorageError, match=f"{store.uri}/object was changed since"):
        careless.read_into("object", 0, memoryview(bytearray(5)), version)


class CarelessStore(S3Store):
    """A server that takes the named conditions and ignores them, as some do."""

    ignored = ""
    ignored_in_uploads = False

    def _call(
        self, what: str, key: str, operation: Callable[..., Any], promised: str, **arguments: Any
    ) -> Any:
        if self.ignored_in_uploads == ("UploadId" in arguments):
            arguments.pop(self.ignored, None)
        return super()._call(what, key, operation, promised, **arguments)


@pytest.mark.parametrize(
    ("ignored", "in_uploads", "named"),
    [
        ("IfNoneMatch", False, r"create-only \(If-None-Match: \*\)"),
        ("IfNoneMatch", True, "create-only for uploads"),
        ("IfMatch", False, r"compare-and-swap \(If-Match\)"),
    ],
)
def test_a_server_that_ignores_conditions_is_refused(
    store: S3Store, location: str, ignored: str, in_uploads: bool, named: str
) -> None:
    careless = CarelessStore(*bucket_and_prefix(location), client=store._client)
    careless.ignored, careless.ignored_in_uploads = ignored, in_uploads
    with pytest.raises(BadInputError, match=rf"{location} ignores {named}.*SeaweedFS >= 4\.48"):
        check_store(careless)
    assert list(store.list_objects()) == []


def test_a_server_that_refuses_and_writes_all_the_same_is_refused(
    store: S3Store, location: str
) -> None:
    class Liar(S3Store):
        def create(self, key: str, data: Bytes) -> str:
            if key in {info.key for info in self.list_objects()}:
                self.write(key, data)
                raise PreconditionFailedError("exists already")
            return super().create(key, data)

    with pytest.raises(BadInputError, match="reports create-only as refused but does the write"):
        check_store(Liar(*bucket_and_prefix(location), client=store._client))


def test_a_server_that_refuses_every_swap_is_refused(store: S3Store, location: str) -> None:
    class Stubborn(S3Store):
        def replace(self, key: str, data: Bytes, version: str) -> str:
            return super().replace(key, data, '"another"')

    with pytest.raises(BadInputError, match="refuses to replace an object that is at the version"):
        check_store(Stubborn(*bucket_and_prefix(location), client=store._client))
