"""Pages: whether an LMDB data file is whole, told without mapping it.

LMDB trusts its file: a missing page ends the process with SIGBUS, a scrambled one by a stray pointer. So the file is
read first, the plain way, and every page that the last commit refers to must be there and be what its parent takes it
for. Values are not checked: LMDB keeps no checksums of them.

The format is that of LMDB 0.9 on 64-bit machines (``lmdb.h``, ``MDB_page``, ``MDB_node``, ``MDB_meta``).
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Final, NamedTuple

_MAGIC: Final = 0xBEEFC0DE
_FORMAT: Final = 1
_NO_PAGE: Final = 2**64 - 1
_N_METAS: Final = 2

_BRANCH: Final = 0x01
_LEAF: Final = 0x02
_OVERFLOW: Final = 0x04
_META: Final = 0x08

_BIG_VALUE: Final = 0x01
_TREE: Final = 0x02

_PAGE = struct.Struct("=QHHHH")  # number, -, flags, lower, upper
_OVERFLOW_PAGE = struct.Struct("=QHHI")  # number, -, flags, pages
_HEAD = struct.Struct("=IIQQ")  # magic, format, -, map size
_DB = struct.Struct("=IHHQQQQQ")  # page size (of the first), flags, depth, pages of three kinds, entries, root
_TAIL = struct.Struct("=QQ")  # last page, transaction
_NODE = struct.Struct("=HHHH")  # low and high half of the size, flags, key size
_NUMBER = struct.Struct("=Q")
_META_BYTES: Final = _PAGE.size + _HEAD.size + 2 * _DB.size + _TAIL.size


class PageError(ValueError):
    """A data file is not whole; the message says where."""


class _Tree(NamedTuple):
    """A B+ tree: its root, its levels, and the fewest children that LMDB lets a branch have."""

    root: int
    depth: int
    n_least_children: int


class _Meta(NamedTuple):
    """What a meta page says of a commit."""

    page_bytes: int
    free: _Tree
    main: _Tree
    last_page: int
    transaction: int


def check_pages(path: Path, *, every: bool) -> None:
    """Raise `PageError` where a data file is not whole.

    Parameters
    ----------
    path
        The data file (``data.mdb``).
    every
        Whether to look at every page, which only the file's writer may ask for: pages move under others. Otherwise
        the meta pages and the file's size are checked, and all pages only of a file that seems too short.
    """
    with path.open("rb", buffering=0) as file:
        meta = _newest_meta(file.fileno())
        while True:
            n_pages = os.fstat(file.fileno()).st_size // meta.page_bytes
            # A file may end before its last page where that is a free one, which LMDB does not write.
            if not every and n_pages > meta.last_page:
                return
            try:
                _Walk(file.fileno(), meta.page_bytes, n_pages).check(meta)
                return
            except PageError:
                newer = _newest_meta(file.fileno())
                if newer.transaction == meta.transaction:
                    raise
                meta = newer  # a writer was at work, and what was looked at is no longer the state


def _newest_meta(file: int) -> _Meta:
    first = _read_meta(file, 0)
    second = _read_meta(file, first.page_bytes)
    return max(first, second, key=lambda meta: meta.transaction)


def _read_meta(file: int, at: int) -> _Meta:
    data = os.pread(file, _META_BYTES, at)
    if len(data) < _META_BYTES:
        raise PageError(f"data.mdb has {os.fstat(file).st_size} bytes, less than its two first pages")
    flags = _PAGE.unpack_from(data)[2]
    magic, version, _, _ = _HEAD.unpack_from(data, _PAGE.size)
    if not flags & _META or magic != _MAGIC:
        raise PageError(f"there is no LMDB meta page at byte {at} of data.mdb")
    if version != _FORMAT:
        raise PageError(f"data.mdb has LMDB's format {version}, known is {_FORMAT}")
    at_free = _PAGE.size + _HEAD.size
    page_bytes, _, free_depth, *_, free_root = _DB.unpack_from(data, at_free)
    _, _, main_depth, *_, main_root = _DB.unpack_from(data, at_free + _DB.size)
    last_page, transaction = _TAIL.unpack_from(data, at_free + 2 * _DB.size)
    if page_bytes not in (1 << bits for bits in range(9, 17)):
        raise PageError(f"the meta page at byte {at} of data.mdb gives pages of {page_bytes} bytes")
    free, main = _Tree(free_root, free_depth, 1), _Tree(main_root, main_depth, 2)
    return _Meta(page_bytes, free, main, last_page, transaction)


class _Walk:
    """A walk over all pages that a commit refers to."""

    def __init__(self, file: int, page_bytes: int, n_pages: int) -> None:
        self._file = file
        self._page_bytes = page_bytes
        self._n_pages = n_pages
        self._seen = bytearray(n_pages)

    def check(self, meta: _Meta) -> None:
        """Walk the list of free pages, the table of tables, and every table."""
        tables: list[_Tree] = []
        self._check_tree(meta.free, [])
        self._check_tree(meta.main, tables)
        for table in tables:
            self._check_tree(table, [])

    def _check_tree(self, tree: _Tree, found: list[_Tree]) -> None:
        if tree.root == _NO_PAGE:
            return
        level, pages = 1, [tree.root]
        while level < tree.depth:
            pages = [child for page in pages for child in self._children(page, tree.n_least_children)]
            level += 1
        for page in pages:
            self._check_leaf(page, found)

    def _children(self, number: int, n_least: int) -> list[int]:
        page, pointers = self._nodes(number, _BRANCH)
        if len(pointers) < n_least:
            raise PageError(f"page {number} of data.mdb has {len(pointers)} children, at least {n_least} are needed")
        children = []
        for at in pointers:
            low, high, highest, key_bytes = _NODE.unpack_from(page, at)
            if at + _NODE.size + key_bytes > self._page_bytes:
                raise PageError(f"a key of page {number} of data.mdb goes beyond the page")
            children.append(low | high << 16 | highest << 32)
        return children

    def _check_leaf(self, number: int, found: list[_Tree]) -> None:
        page, pointers = self._nodes(number, _LEAF)
        for at in pointers:
            low, high, flags, key_bytes = _NODE.unpack_from(page, at)
            n_bytes, at_value = low | high << 16, at + _NODE.size + key_bytes
            is_big = flags & _BIG_VALUE
            if at_value + (_NUMBER.size if is_big else n_bytes) > self._page_bytes:
                raise PageError(f"a value of page {number} of data.mdb goes beyond the page")
            if is_big:
                self._check_overflow(_NUMBER.unpack_from(page, at_value)[0], n_bytes)
            elif flags & _TREE:
                if n_bytes != _DB.size:
                    raise PageError(f"a table in page {number} of data.mdb has {n_bytes} bytes, not {_DB.size}")
                _, _, depth, *_, root = _DB.unpack_from(page, at_value)
                found.append(_Tree(root, depth, 2))

    def _nodes(self, number: int, kind: int) -> tuple[bytes, tuple[int, ...]]:
        """Return a branch or leaf, and where in it its nodes begin."""
        self._claim(number, 1)
        page = os.pread(self._file, self._page_bytes, number * self._page_bytes)
        own_number, _, flags, lower, upper = _PAGE.unpack_from(page)
        if own_number != number or flags != kind:
            raise PageError(f"page {number} of data.mdb is no {'branch' if kind == _BRANCH else 'leaf'}")
        if lower % 2 or not _PAGE.size <= lower <= upper <= self._page_bytes:
            raise PageError(f"page {number} of data.mdb has room from {lower} to {upper} of {self._page_bytes} bytes")
        pointers = struct.unpack_from(f"={(lower - _PAGE.size) // 2}H", page, _PAGE.size)
        if pointers and not (upper <= min(pointers) and max(pointers) <= self._page_bytes - _NODE.size):
            raise PageError(f"a node of page {number} of data.mdb lies outside of it")
        return page, pointers

    def _check_overflow(self, number: int, n_bytes: int) -> None:
        n_needed = (_PAGE.size - 1 + n_bytes) // self._page_bytes + 1
        self._claim(number, n_needed)
        head = os.pread(self._file, _OVERFLOW_PAGE.size, number * self._page_bytes)
        own_number, _, flags, n_pages = _OVERFLOW_PAGE.unpack(head)
        if own_number != number or flags != _OVERFLOW or n_pages < n_needed:
            raise PageError(f"page {number} of data.mdb does not begin a value of {n_bytes} bytes")

    def _claim(self, first: int, n: int) -> None:
        """Mark pages as referred to, once each."""
        if not _N_METAS <= first <= self._n_pages - n:
            last = first + n - 1
            raise PageError(f"page {last} is referred to, and data.mdb ends after page {self._n_pages - 1}")
        if any(self._seen[first : first + n]):
            raise PageError(f"page {first} of data.mdb is referred to twice")
        self._seen[first : first + n] = b"\x01" * n
