"""Reads the pickle of a torch.save file without importing or calling anything that it names.

A checkpoint is untrusted input. Classes and functions of torch, deepspeed and numpy become inert
records; a pickle that names anything else is refused. Of the pickle machine only the instructions
remain that torch.save uses. Knows nothing of files.
"""

from __future__ import annotations

import io
import pickle
from _compat_pickle import IMPORT_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from ftlaunch.cluster.errors import FtlaunchError

# What may be named, and becomes a record: everything in these packages and these few besides.
_PACKAGES = ("torch", "deepspeed", "numpy", "transformers", "accelerate")
_NAMES = frozenset(
    {
        ("_codecs", "encode"),
        ("builtins", "bytearray"),
        ("builtins", "complex"),
        ("builtins", "frozenset"),
        ("builtins", "set"),
        ("builtins", "slice"),
        ("builtins", "object"),
        ("collections", "Counter"),
        ("collections", "OrderedDict"),
        ("collections", "defaultdict"),
        ("collections", "deque"),
        ("copyreg", "_reconstructor"),
    }
)
_INSTRUCTIONS = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT LONG LONG1 LONG4 BININT "
    "BININT1 BININT2 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES "
    "BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 EMPTY_DICT SETITEM SETITEMS "
    "EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL BINPERSID"
)
# Each makes some 80 bytes at the most, and may be a single byte itself. A tensor takes 30 of them: so
# much is enough for more than 200,000.
_MAX_INSTRUCTIONS = 1 << 23
_SCALARS = (str, int, float, bool, type(None))

# (the arguments of the call) → what stands for its result
Builder = Callable[[tuple[Any, ...]], Any]


class PickleRefused(FtlaunchError):
    """The pickle wants to import what no checkpoint needs, or is none."""


class Named:
    """A class or function that a pickle names; nothing is imported for it."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module = module
        self.name = name

    def __repr__(self) -> str:
        return f"{self.module}.{self.name}"


class Record:
    """What a call of something named would have made: its arguments and the state it was given."""

    __slots__ = ("args", "named", "state")

    def __init__(self, named: Named, args: tuple[Any, ...]) -> None:
        self.named = named
        self.args = args
        self.state: Any = None

    def __setitem__(self, key: Any, value: Any) -> None:
        """The contents of a dict of a class of its own are of no interest."""

    def append(self, value: Any) -> None:
        """Nor are those of a list of a class of its own."""

    def extend(self, values: Any) -> None:
        """The same."""


def load_pickle(
    data: bytes,
    builders: Mapping[tuple[str, str], Builder],
    persistent: Callable[[Any], Any],
) -> Any:
    """The object in `data`.

    builders    (module, name) → what makes the result of a call of it; all else becomes a `Record`
    persistent  what makes an object of a persistent id (in torch files: of a storage)

    PickleRefused for all that is not allowed or malformed. What is made is bounded by the bytes that
    are there and by the number of instructions: in this implementation memo numbers are keys of a
    dict, not sizes, and what calls copy is counted. Values may hold one another many times over:
    print and compare none as a whole.
    """
    try:
        return _Machine(data, builders, persistent).load()
    except PickleRefused:
        raise
    except MemoryError:
        raise PickleRefused("it asks for too much memory") from None
    except Exception as error:  # noqa: BLE001 - whatever a malformed pickle does, it is the pickle's fault
        raise PickleRefused(f"it cannot be read ({type(error).__name__}: {error})") from None


# The implementation in Python: it can be restricted by instruction, and a huge memo number costs nothing.
class _Machine(pickle._Unpickler):
    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
        for name in _INSTRUCTIONS.split()
    }
    proto: int
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(
        self,
        data: bytes,
        builders: Mapping[tuple[str, str], Builder],
        persistent: Callable[[Any], Any],
    ) -> None:
        super().__init__(io.BytesIO(data))
        self.proto = 0
        self._builders = builders
        self._persistent = persistent
        self._copied, self._most = 0, len(data)
        self.done = 0

    def load(self) -> Any:
        try:
            return super().load()
        except KeyError as error:
            raise PickleRefused(
                f"it has the instruction {error}, which torch.save never writes"
            ) from None

    def find_class(self, module: str, name: str) -> Any:
        if self.proto < 3:
            # torch.save writes protocol 2, in which modules have the names of Python 2.
            module = IMPORT_MAPPING.get(module, module)
        if module.split(".")[0] in _PACKAGES or (module, name) in _NAMES:
            return Named(module, name)
        raise PickleRefused(f"the pickle wants to import {module[:100]}.{name[:100]}; refused")

    def persistent_load(self, pid: Any) -> Any:
        return self._persistent(pid)

    def _call(self, function: Any, args: Any) -> Any:
        if not isinstance(function, Named) or not isinstance(args, tuple):
            raise PickleRefused(f"it calls a {type(function).__name__}")
        build = self._builders.get((function.module, function.name))
        if build is not None:
            self._count(args)
            return build(args)
        if (function.module, function.name) == ("collections", "OrderedDict"):
            self._count(args)
            return OrderedDict(_pairs(args))
        return Record(function, args)

    def _count(self, args: tuple[Any, ...]) -> None:
        """One list may be handed to many calls, each of which would make a copy of it."""
        copied = sum(len(each) for each in args if isinstance(each, list | tuple | dict))
        self.done += copied
        self._copied += copied
        if self._copied > self._most:
            raise PickleRefused("it repeats itself without end")

    def _reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._call(self.stack[-1], args)

    def _build(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, Record):
            made.state = state
        elif not isinstance(made, OrderedDict):
            # An OrderedDict's own state (the _metadata of a state_dict) is not needed.
            raise PickleRefused(f"it sets the state of a {type(made).__name__}")

    def _setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._store([key, value])

    def _setitems(self) -> None:
        self._store(self.pop_mark())

    def _store(self, items: list[Any]) -> None:
        for key in items[::2]:
            # A deeply nested tuple as a key would overflow the C stack when it is hashed.
            if not isinstance(key, (*_SCALARS, Record, Named)) and not _is_flat(key):
                raise PickleRefused(f"it has a {type(key).__name__} for a key")
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key] = value

    dispatch |= {
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _reduce,
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: _setitem,
        pickle.SETITEMS[0]: _setitems,
    }


def _counted(instruction: Callable[..., None]) -> Callable[[_Machine], None]:
    def run(machine: _Machine) -> None:
        machine.done += 1
        if machine.done > _MAX_INSTRUCTIONS:
            raise PickleRefused(
                f"it has more than {_MAX_INSTRUCTIONS:,} instructions, more than any model needs"
            )
        instruction(machine)

    return run


_Machine.dispatch = {code: _counted(each) for code, each in _Machine.dispatch.items()}


def _is_flat(key: Any) -> bool:
    return isinstance(key, tuple) and all(isinstance(part, _SCALARS) for part in key)


def _pairs(args: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    """OrderedDict() or OrderedDict([[key, value], …]), as pickle writes it."""
    if not args:
        return []
    [pairs] = args
    return [(key, value) for key, value in pairs if isinstance(key, _SCALARS)]
