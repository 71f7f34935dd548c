"""Digests of sources, and their index in the disk cache."""

from __future__ import annotations

import os

import pytest

from kgraph.codegen import sources


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of two files that were written a minute ago, and a cache."""
    monkeypatch.setenv("KGRAPH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "_ROOT", tmp_path / "package")
    # Times of changes are the system's, and no file can be made older: the index waits less.
    monkeypatch.setattr(sources, "_RESTING_SECONDS", -1.0)
    (tmp_path / "package" / "room").mkdir(parents=True)
    write(tmp_path / "package" / "a.py", "from kgraph.room import b, c\n")
    write(tmp_path / "package" / "room" / "__init__.py", "x = 1\n")
    return tmp_path / "package"


def write(path, text: str) -> None:
    path.write_text(text)


def read_index() -> sources.Index:
    sources.index.cache_clear()
    try:
        return sources.index()
    finally:
        sources.index.cache_clear()


def test_modules_and_their_imports(package):
    index = read_index()
    assert sorted(index.files) == ["a.py", "room/__init__.py"]
    assert index.files["a.py"][1] == ("kgraph.room", "kgraph.room.b", "kgraph.room.c")


def test_the_index_is_read_from_the_cache(package, monkeypatch):
    first = read_index()

    def refuse(path):
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr(sources, "_read", refuse)
    second = read_index()
    assert (second.files, second.digest) == (first.files, first.digest)


@pytest.mark.parametrize("change", ["text", "new", "removed", "renamed"])
def test_any_change_is_seen(package, change):
    before = read_index().digest
    if change == "text":  # of the same length
        write(package / "a.py", "from kgraph.room import b, d\n")
    elif change == "new":
        write(package / "room" / "c.py", "")
    elif change == "removed":
        (package / "room" / "__init__.py").unlink()
    else:
        (package / "a.py").rename(package / "e.py")
    assert read_index().digest != before


def test_the_same_text_gives_the_same_digest(package):
    before = read_index().digest
    os.utime(package / "a.py", (1, 1))
    write(package / "room" / "__init__.py", "x = 1\n")
    assert read_index().digest == before


def test_files_that_have_just_changed_are_not_kept(package, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "_RESTING_SECONDS", 60.0)
    read_index()
    assert not list((tmp_path / "cache").rglob("*"))
