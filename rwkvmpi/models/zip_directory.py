"""The table of contents of a zip archive whose members are stored uncompressed, as torch.save writes them.

Parsed here and not by a library because the file is hostile until checked: every count and size is bounded by the
file's own size before anything is allocated, members must not overlap, and nothing is ever decompressed.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rwkvmpi.errors import UserError

MAX_MEMBERS = 100_000  # the largest released model has about 2,300

_END = struct.Struct("<4s4H2LH")  # end of central directory
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")


@dataclass(frozen=True)
class Member:
    """A stored member: its bytes are file[offset : offset + size]."""

    name: str
    offset: int
    size: int
    crc: int


def read_zip_directory(path: Path, file: BinaryIO) -> dict[str, Member]:
    """The members by name. `path` is for messages. Raises UserError for everything but a sound, plain archive:
    cut off, compressed or encrypted members, repeated names, members that overlap or lie outside the file."""
    size = os.fstat(file.fileno()).st_size
    try:
        members = _members(path, file, size)
    except struct.error as error:
        raise _damaged(path, "its table of contents breaks off") from error
    position = 0
    for member, header in sorted(members, key=lambda pair: pair[1]):
        if header < position:
            raise _damaged(path, f"the member {member.name!r} overlaps another one")
        position = member.offset + member.size
    result = {member.name: member for member, _ in members}
    if len(result) != len(members):
        raise _damaged(path, "a member occurs twice")
    return result


def _damaged(path: Path, what: str) -> UserError:
    return UserError(
        f"{path}: the archive is damaged or was not written by torch.save: {what}; copy or download it again."
    )


def _members(path: Path, file: BinaryIO, size: int) -> list[tuple[Member, int]]:
    count, length, start = _find_directory(path, file, size)
    if count > MAX_MEMBERS:
        raise UserError(f"{path}: the archive has {count} members, more than the {MAX_MEMBERS} allowed for a model.")
    if start + length > size or length < count * _CENTRAL.size or length > count * 1024:
        raise _damaged(path, "its table of contents has an impossible size")
    file.seek(start)
    directory = file.read(length)
    members, position = [], 0
    for _ in range(count):
        fields = _CENTRAL.unpack_from(directory, position)
        signature, flags, method, crc = fields[0], fields[3], fields[4], fields[7]
        packed, unpacked, name_length, extra_length, comment_length = fields[8:13]
        header = fields[16]
        if signature != b"PK\x01\x02":
            raise _damaged(path, "an entry of its table of contents has no signature")
        position += _CENTRAL.size
        raw_name = directory[position : position + name_length]
        extra = directory[position + name_length : position + name_length + extra_length]
        position += name_length + extra_length + comment_length
        if position > length:
            raise _damaged(path, "its table of contents breaks off")
        unpacked, packed, header = _zip64(path, extra, unpacked, packed, header)
        name = raw_name.decode("utf-8", "backslashreplace")
        if flags & 1:
            raise UserError(f"{path}: the member {name!r} is encrypted; a model file must be plain.")
        if method != 0 or packed != unpacked:
            raise UserError(
                f"{path}: the member {name!r} is compressed ({packed} bytes for {unpacked}), as weights never "
                f"are; save the tensors again with torch.save (a TorchScript program: its state_dict)."
            )
        members.append((_local(path, file, start, Member(name, header, unpacked, crc), raw_name), header))
    return members


def _find_directory(path: Path, file: BinaryIO, size: int) -> tuple[int, int, int]:
    """(number of members, bytes of the directory, its offset)."""
    tail_start = max(0, size - _END.size - 0xFFFF)
    file.seek(tail_start)
    tail = file.read(size - tail_start)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        raise UserError(f"{path}: cut off: the end of the archive is missing; copy or download it again.")
    _, disk, directory_disk, _, count, length, start, comment = _END.unpack_from(tail, at)
    if at + _END.size + comment != len(tail):
        raise _damaged(path, "something follows its end")
    if disk or directory_disk:
        raise _damaged(path, "it is split over several files")
    if at >= _END64_LOCATOR.size and tail[at - _END64_LOCATOR.size :].startswith(b"PK\x06\x07"):
        _, _, end64, _ = _END64_LOCATOR.unpack_from(tail, at - _END64_LOCATOR.size)
        if end64 > size - _END64.size:
            raise _damaged(path, "its 64-bit end record lies outside the file")
        file.seek(end64)
        fields = _END64.unpack(file.read(_END64.size))
        if fields[0] != b"PK\x06\x06":
            raise _damaged(path, "its 64-bit end record has no signature")
        count, length, start = fields[7:10]
    return count, length, start


def _zip64(path: Path, extra: bytes, unpacked: int, packed: int, header: int) -> tuple[int, int, int]:
    """Replaces the fields that are all ones by those in the extra field with the tag 1, in this fixed order."""
    values = [unpacked, packed, header]
    wanted = [index for index, value in enumerate(values) if value == 0xFFFFFFFF]
    if not wanted:
        return unpacked, packed, header
    position = 0
    while position + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, position)
        if tag == 1 and length >= 8 * len(wanted) and position + 4 + length <= len(extra):
            for place, index in enumerate(wanted):
                (values[index],) = struct.unpack_from("<Q", extra, position + 4 + 8 * place)
            return values[0], values[1], values[2]
        position += 4 + length
    raise _damaged(path, "a 64-bit size is missing")


def _local(path: Path, file: BinaryIO, directory_start: int, member: Member, raw_name: bytes) -> Member:
    """Reads the header in front of the member's bytes; returns the member with the offset of the bytes themselves."""
    if member.offset > directory_start - _LOCAL.size:
        raise _damaged(path, f"the member {member.name!r} lies outside the file")
    file.seek(member.offset)
    fields = _LOCAL.unpack(file.read(_LOCAL.size))
    name_length, extra_length = fields[9:11]
    if fields[0] != b"PK\x03\x04" or name_length != len(raw_name) or file.read(name_length) != raw_name:
        raise _damaged(path, f"the member {member.name!r} is not where the table of contents says")
    offset = member.offset + _LOCAL.size + name_length + extra_length
    if offset + member.size > directory_start:
        raise _damaged(path, f"the member {member.name!r} reaches beyond the data")
    return Member(member.name, offset, member.size, member.crc)
