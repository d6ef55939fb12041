"""Goes through a pickle without making what it names, and stops where that would swell or hang.

A pickle of a few bytes can ask for 8 GB (`bytearray(2**33)`), for a tuple of tuples whose hash
takes centuries, or for a thousand copies of one dict. So everything that a pickle does has a cost
here, and a description of tensors has a budget. What passes may be read by the true reader.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Sequence
from typing import Any, BinaryIO, ClassVar

MOST_BYTES = 1 << 26  # of the pickles of a file, its tensors left out
MOST_WORK = 1 << 23  # steps, and entries that are copied or hashed
TEXT = 16  # characters that cost as much as an entry
PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # as the format still calls them
PYTHON_2_TYPES = {"long": "int", "unicode": "str", "xrange": "range"}  # of __builtin__
ENCODINGS = {"latin1", "latin-1", "ascii", "utf8", "utf-8"}  # whose work is as long as the text
ARRAYS = re.compile(r"torch\.([\w.]+\.)?\w*(Tensor|Storage)")  # which numbers would make anew
REBUILT = re.compile(r"torch\._utils\._rebuild_\w+")
COPIES = re.compile(r"torch\._utils\._rebuild_(device_tensor_from_\w+|wrapper_subclass)")
OTHERS = (  # operations that no file of `torch.save` has
    pickle.EXT1,
    pickle.EXT2,
    pickle.EXT4,
    pickle.INST,
    pickle.OBJ,
    pickle.PERSID,
    pickle.NEWOBJ_EX,
    pickle.NEXT_BUFFER,
    pickle.READONLY_BUFFER,
)


def names(file: BinaryIO, size: int, pickles: int = 1) -> set[str]:
    """'module.name' of everything that the pickles of a file name; nothing is built or run.

    Args:
      file: at the first of them; it is left behind the last.
      size: of the whole file in bytes: no storage is larger.
      pickles: how many there are, one behind the other.

    Raises:
      Exception: of any kind, for what is no pickle, or one that costs more than a description does.
    """
    bounded = _Bounded(file, size)
    for _ in range(pickles):
        _DryRun(bounded).load()
    return bounded.names


class _Bounded:
    """A file that is read up to a bound, and what has been spent on it."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._left, self._work, self.size = file, MOST_BYTES, MOST_WORK, size
        self.names: set[str] = set()

    def read(self, count: int) -> bytes:
        """That many bytes; each operation of a pickle reads at least one."""
        if not 0 <= count <= self._left:
            raise ValueError("too long")
        self._left -= count
        self.spend(1)
        return self._file.read(count)

    def readline(self) -> bytes:
        """One line."""
        line = self._file.readline(self._left)
        self._left -= len(line)
        return line

    def spend(self, work: int) -> None:
        """Raises ValueError where the budget is used up."""
        self._work -= work
        if self._work < 0:
            raise ValueError("too much work")


class _Made:
    """Whatever a call has made, of so many entries."""

    def __init__(self, count: int = 1):
        self.count = count

    def append(self, _: object) -> None:
        """Takes an entry, as a deque does; the entry itself was paid for when it was read."""
        self.count += 1


class _Storage:
    """Numbers in the file, so many; nothing copies them."""

    def __init__(self, count: int):
        self.count = count


class _Named:
    """A class or a function by its name; a call is paid for, and makes nothing."""

    def __init__(self, name: str, run: _DryRun):
        self._name, self._run = name, run

    def __call__(self, *given: Any) -> _Made:
        total = sum(self._run.pay(one, levels=2) for one in given if not isinstance(one, _Storage))
        if self._name == "_codecs.encode" and given[1:] and given[1] not in ENCODINGS:
            raise ValueError("an encoding of no bytes")
        if self._name == "builtins.bytearray" and any(isinstance(one, int) for one in given):
            raise ValueError("bytes of nothing")
        if COPIES.fullmatch(self._name) or (given and ARRAYS.fullmatch(self._name)):
            raise ValueError("a tensor that is not in the file")
        if self._name == "torch._utils._rebuild_qtensor":
            _check_size(*given[:3])
        if self._name == "torch._tensor._rebuild_from_type_v2":
            inner, _, parts, *_ = given
            if not (isinstance(inner, _Named) and REBUILT.fullmatch(inner._name)):
                raise ValueError("a tensor of an unknown kind")
            inner(*parts)
        return _Made(total)


def _check_size(storage: _Storage, _: object, shape: Sequence[int]) -> None:
    if math.prod(shape) > storage.count:
        raise ValueError("a tensor larger than its storage")


class _DryRun(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    """The reader in Python, whose operations can be replaced, with inert ones."""

    dispatch: ClassVar[dict[int, Any]] = {
        code: operation
        for code, operation in pickle._Unpickler.dispatch.items()  # pyright: ignore[reportAttributeAccessIssue]
        if bytes([code]) not in OTHERS
    }

    def __init__(self, file: _Bounded):
        super().__init__(file, encoding="bytes")
        self._bounded = file
        self._nested: dict[int, tuple[int, tuple]] = {}  # entries on all levels, the tuple
        self._storages: dict[Any, int] = {}
        self._stored = 0

    def pay(self, value: Any, levels: int = 0) -> int:
        """Pays for copying or hashing a value, with so many levels of what it holds.

        Returns:
          how many entries it has.
        """
        count = _length(value)
        self._bounded.spend(self._nested[id(value)][0] if id(value) in self._nested else count)
        if levels and isinstance(value, list | dict):
            for inner in value:
                self.pay(inner, levels - 1)
        return count

    def find_class(self, module: str, name: str) -> _Named:
        """Takes the name down."""
        name = PYTHON_2_TYPES.get(name, name) if module == "__builtin__" else name
        whole = f"{PYTHON_2.get(module, module)}.{name}"
        self._bounded.names.add(whole)
        return _Named(whole, self)

    def persistent_load(self, pid: Any) -> _Made | _Storage:
        """A storage, which cannot be larger than the file."""
        if not isinstance(pid, tuple) or pid[0] not in ("storage", b"storage"):
            return _Made()
        _, _, key, _, count, *_ = pid
        if type(key) not in (str, bytes, int) or type(count) is not int or count < 0:
            raise ValueError("a storage without a name or a size")
        self._stored += max(count - self._storages.get(key, 0), 0)
        self._storages[key] = max(count, self._storages.get(key, 0))
        if self._stored > self._bounded.size:
            raise ValueError("storages larger than the file")
        return _Storage(count)

    def _tuple(self, operation: Any) -> None:
        operation(self)
        made = self.stack[-1]
        inner = [one for one in made if isinstance(one, tuple)]
        if inner:
            known = (self._nested[id(x)][0] if id(x) in self._nested else len(x) for x in inner)
            self._nested[id(made)] = len(made) + sum(known), made
        self.pay(made)

    def _put(self, operation: Any) -> None:
        operation(self)
        if len(self.memo) and next(reversed(self.memo)) > MOST_WORK:
            raise ValueError("too many objects")

    def _build(self) -> None:
        self.pay(self.stack.pop())

    def _new(self) -> None:
        given = self.stack.pop()
        self.stack[-1] = self.stack[-1](*given)

    def _entries(self, entries: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(entries[::2], entries[1::2], strict=True):
            self.pay(key)
            if type(target) is dict:
                target[key] = value
            elif isinstance(target, _Made):
                target.count += 1
            else:
                raise ValueError("entries of no dict")

    def _entry(self) -> None:
        *_, key, value = self.stack
        del self.stack[-2:]
        self._entries([key, value])

    def _more_entries(self) -> None:
        self._entries(self.pop_mark())

    def _set_entries(self) -> None:
        entries = self.pop_mark()
        for one in entries:
            self.pay(one)
        self.stack[-1].update(entries)

    def _frozen(self) -> None:
        entries = self.pop_mark()
        for one in entries:
            self.pay(one)
        self.append(frozenset(entries))

    def _dict(self) -> None:
        entries = self.pop_mark()
        self.append({})
        self._entries(entries)

    for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
        dispatch[_code[0]] = lambda self, made=dispatch[_code[0]]: self._tuple(made)
    for _code in (pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT):
        dispatch[_code[0]] = lambda self, put=dispatch[_code[0]]: self._put(put)
    dispatch |= {
        pickle.BUILD[0]: _build,
        pickle.NEWOBJ[0]: _new,
        pickle.SETITEM[0]: _entry,
        pickle.SETITEMS[0]: _more_entries,
        pickle.ADDITEMS[0]: _set_entries,
        pickle.FROZENSET[0]: _frozen,
        pickle.DICT[0]: _dict,
    }


def _length(value: object) -> int:
    """What copying or hashing a value costs, that of its parts left out."""
    if isinstance(value, _Made):
        return value.count
    if isinstance(value, str | bytes):
        return len(value) // TEXT
    return len(value) if isinstance(value, tuple | list | dict | set | frozenset) else 1
