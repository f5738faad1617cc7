"""Locations as users write them: what each names, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from workers.errors import BadInputError
from workers.storage import ObjectNotFoundError, locations, open_store
from workers.storage.locations import absolute_location


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder that holds two models and some code."""
    families = tmp_path / "package" / "families"
    for model in ("strings/base", "strings/reverse"):
        (families / model).mkdir(parents=True)
        (families / model / "config.json").write_bytes(b"{}")
    (families / "code").mkdir()
    (families / "code" / "__init__.py").write_bytes(b"")
    (tmp_path / "package" / "secret").mkdir()
    (families / "leaving").symlink_to(tmp_path / "package" / "secret")
    monkeypatch.setattr(locations, "SHIPPED_FOLDER", families)
    return families


@pytest.mark.parametrize(
    ("location", "absolute"),
    [
        ("/data/models", "/data/models"),
        ("/data/models/", "/data/models"),
        ("/data/../models//base/.", "/models/base"),
        ("models/base", "{cwd}/models/base"),
        (".", "{cwd}"),
        ("./s3:odd", "{cwd}/s3:odd"),
        ("with space/and%20percent", "{cwd}/with space/and%20percent"),
        ("~", "{home}"),
        ("~/models", "{home}/models"),
        ("file:///data/models", "/data/models"),
        ("file://localhost/data/models/", "/data/models"),
        ("FILE:///data", "/data"),
        ("file:///with%20space/%C3%A9?#", "/with space/é?#"),
        ("file:///", "/"),
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("S3://bucket/some/prefix/", "s3://bucket/some/prefix"),
        ("s3://my.bucket-1/with space/%20?#é", "s3://my.bucket-1/with space/%20?#é"),
        ("shipped:strings/base", "shipped:strings/base"),
        ("shipped:strings/base/", "shipped:strings/base"),
    ],
)
def test_each_kind_of_location_is_made_absolute(
    shipped: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    location: str,
    absolute: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    expected = absolute.format(cwd=tmp_path, home="/home/someone")
    assert absolute_location(location) == expected
    assert absolute_location(expected) == expected
    assert open_store(location).uri == expected
    assert open_store(expected).uri == expected


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("", "names no place"),
        ("nul\0byte", "names no place"),
        ("file:///nul%00byte", "NUL"),
        ("file://elsewhere/data", "another machine"),
        ("file://relative", "another machine"),
        ("file:/data", "two slashes"),
        ("s3:bucket/prefix", "two slashes"),
        ("s3:/bucket/prefix", "two slashes"),
        ("s3://", "no bucket"),
        ("s3:///prefix", "no bucket"),
        ("s3://my bucket/prefix", "no bucket"),
        ("s3://user:word@bucket/prefix", "no bucket"),
        ("s3://bucket/a//b", "plain relative path"),
        ("s3://bucket/../other", "plain relative path"),
        ("s3://bucket/a//", "plain relative path"),
        ("gs://bucket/prefix", r"gs:// is not supported: give a plain path, file:///path, s3://"),
        ("https://example.org/model", "https:// is not supported"),
        ("ftp://org/model", "ftp:// is not supported"),
        ("hf:org/model", "two slashes"),
        ("shipped:", "plain relative path"),
        ("shipped:../secret", "plain relative path"),
        ("shipped:/strings/base", "plain relative path"),
        ("shipped:strings/best", r"there is: shipped:strings/base, shipped:strings/reverse$"),
        ("shipped:strings/base/config.json", "there is: shipped:strings/base"),
        ("shipped:leaving", "there is: shipped:strings/base"),
    ],
)
def test_what_is_no_location_is_refused(shipped: Path, location: str, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        open_store(location)
    with pytest.raises(BadInputError, match=message):
        absolute_location(location)


def test_a_shipped_store_holds_what_was_shipped(shipped: Path) -> None:
    store = open_store("shipped:strings")
    assert [info.key for info in store.list_objects()] == [
        "base/config.json",
        "reverse/config.json",
    ]
    assert store.substore("base").read("config.json") == b"{}"
    with pytest.raises(ObjectNotFoundError):
        store.read("no/such")


def test_the_package_ships_families() -> None:
    assert open_store("shipped:strings").info("skills.py").size > 0


def test_a_plain_path_is_written_where_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    open_store("runs/one").write("object", b"bytes")
    assert (tmp_path / "runs" / "one" / "object").read_bytes() == b"bytes"


def test_a_path_stays_what_it_was_when_the_current_folder_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("runs")
    monkeypatch.chdir("/")
    store.write("object", b"bytes")
    assert (tmp_path / "runs" / "object").read_bytes() == b"bytes"


def test_boto3_is_imported_only_for_s3(tmp_path: Path) -> None:
    program = """
import sys
from workers.storage import check_store, open_store
check_store(open_store(sys.argv[1]))
assert "botocore" not in sys.modules and "boto3" not in sys.modules
open_store("s3://bucket/prefix")
assert "boto3" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
