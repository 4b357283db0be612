"""The members of a tar by key: one group of them is one sample. Of a whole tar they are kept as numbers."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import xxhash

Fault = Literal["", "repeated", "late"]


@dataclass(slots=True)
class Member:
    """Where a content lies in the tar; `data` is the content itself where it was wanted of a stream."""

    offset: int
    size: int
    data: bytes | None = None


@dataclass(slots=True)
class Group:
    """The members of one key, by lower-case extension.

    fault: "repeated" where the key had a member of such an extension before, "late" where its group was closed.
    """

    key: str
    fault: Fault = ""
    members: dict[str, Member] = field(default_factory=dict[str, Member])


class Listing:
    """The members of a whole tar, as numbers and one string of bytes: a tar may have millions."""

    def __init__(self) -> None:
        self._keys, self._key_ends = bytearray(), array("q", [0])
        self._hashes, self._offsets, self._sizes = array("Q"), array("q"), array("q")
        self._kinds = array("I")
        self._extensions: dict[str, int] = {}

    def add(self, key: str, extension: str, offset: int, size: int) -> None:
        """`offset` is -1 where a content has no place of its own."""
        name = key.encode()
        self._keys += name
        self._key_ends.append(len(self._keys))
        self._hashes.append(xxhash.xxh3_64_intdigest(name))
        self._offsets.append(offset)
        self._sizes.append(size)
        self._kinds.append(self._extensions.setdefault(extension, len(self._extensions)))

    def groups(self) -> Iterator[Group]:
        """One group per key, by its first member; then what repeats an extension of its key."""
        extensions = list(self._extensions)
        hashes = np.frombuffer(self._hashes, np.uint64) if self._hashes else np.zeros(0, np.uint64)
        # Members of one key side by side, in the order of the tar; keys by their first member.
        order = np.argsort(hashes, kind="stable")
        starts = np.flatnonzero(np.diff(hashes[order], prepend=~hashes[order[:1]]))
        ends = np.append(starts[1:], len(order))
        repeats: list[int] = []
        for number in np.argsort(order[starts]).tolist():
            numbers = order[starts[number] : ends[number]].tolist()
            group = Group(self._key(numbers[0]))
            for member in numbers:
                if (extension := extensions[self._kinds[member]]) in group.members:
                    repeats.append(member)
                else:
                    self._put(group, extension, member)
            yield group
        yield from self._repeated(sorted(repeats), extensions)

    def _repeated(self, numbers: Sequence[int], extensions: Sequence[str]) -> Iterator[Group]:
        group: Group | None = None
        for number in numbers:
            key, extension = self._key(number), extensions[self._kinds[number]]
            if group is None or group.key != key or extension in group.members:
                if group is not None:
                    yield group
                group = Group(key, "repeated")
            self._put(group, extension, number)
        if group is not None:
            yield group

    def _put(self, group: Group, extension: str, number: int) -> None:
        if self._offsets[number] >= 0:
            group.members[extension] = Member(self._offsets[number], self._sizes[number])

    def _key(self, number: int) -> str:
        return self._keys[self._key_ends[number] : self._key_ends[number + 1]].decode()
