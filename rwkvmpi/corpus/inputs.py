"""From what the user names as input (files, folders, globs) to the list of files, in the order of their names."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from typing import NamedTuple

from rwkvmpi.corpus.containers import SUFFIXES_SENTENCE, kind_of, printable
from rwkvmpi.errors import UserError


class Source(NamedTuple):
    """One input file. path: as given, or below the folder given; name: relative to that folder, the start of its
    documents' ids; kind: "txt", "jsonl.gz", ...; error: why its folder cannot be listed, or None."""

    path: str
    name: str
    kind: str
    error: str | None = None


def find_sources(inputs: list[str]) -> list[Source]:
    """All files that the inputs name, sorted by path, each real file once.

    Folders are searched through with all their subfolders, for known suffixes only. UserError for an input that does
    not exist, that matches nothing, or for a file named one by one whose suffix is unknown.
    """
    if not inputs:
        raise UserError("no input was given; name files, folders or globs")
    found: list[Source] = []
    for given in inputs:
        sources = list(_expand(given))
        if not sources:
            raise UserError(f"{printable(given)} matches no file that can be read ({SUFFIXES_SENTENCE})")
        found += sources
    found.sort(key=lambda source: source.path)
    unique: dict[str, Source] = {}
    for source in found:
        unique.setdefault(os.path.realpath(source.path), source)
    return list(unique.values())


def _expand(given: str) -> Iterator[Source]:
    if os.path.isdir(given):
        yield from _walk(given, given)
    elif os.path.lexists(given):  # a broken link too: it becomes a failed document
        kind = kind_of(given)
        if kind is None:
            raise UserError(
                f"{printable(given)} has no suffix that is read ({SUFFIXES_SENTENCE}); "
                "a copy whose name ends in .txt is read as plain text"
            )
        yield Source(given, _name(given, os.path.dirname(given)), kind)
    elif glob.has_magic(given):
        root = _fixed_folder(given)
        for path in glob.iglob(given, recursive=True):
            if os.path.isdir(path):
                yield from _walk(path, root)
            elif (kind := kind_of(path)) is not None:
                yield Source(path, _name(path, root), kind)
    else:
        raise UserError(f"{printable(given)} does not exist; name a file, a folder or a glob")


def _walk(folder: str, root: str) -> Iterator[Source]:
    """Files of known suffix in the folder and below, links followed, no folder twice."""
    seen: set[str] = set()
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        real = os.path.realpath(current)
        if real in seen:
            continue
        seen.add(real)
        try:
            with os.scandir(current) as entries:
                for entry in entries:
                    if entry.is_dir():
                        waiting.append(entry.path)
                    elif (kind := kind_of(entry.name)) is not None:
                        yield Source(entry.path, _name(entry.path, root), kind)
        except OSError as error:
            reason = f"{printable(current)}: {error.strerror or error}"
            yield Source(current, _name(current, root), "txt", reason)


def _name(path: str, root: str) -> str:
    return printable(os.path.relpath(path, root or os.curdir))


def _fixed_folder(pattern: str) -> str:
    """The leading folders of a pattern that hold no wildcard."""
    folder = os.path.dirname(pattern)
    while glob.has_magic(folder):
        folder = os.path.dirname(folder)
    return folder
