# this_file: src/opero/limits/shared.py
"""Give limits an identity: one object per process, and one state for all processes of a program.

Another process finds the state of an object in one of three ways:

- the object has a name, which is that of a file for all programs of the user (rate limiters);
- the object is handed over by pickle, which moves its state into a file first;
- the object is made again by the import of a module. The job of a map carries the table of `share_all`: the files by
  the functions that the objects guard and the module attributes that hold them. A worker that makes such an object
  looks it up there when it is used first.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self, TypeVar

from opero.utils.fork import reset_after_fork, run_after_fork

if TYPE_CHECKING:
    from opero.limits.state_file import StateFile


S = TypeVar("S", bound="SharedObject")
T = TypeVar("T")


_NOT_SEARCHED: Final = sys.stdlib_module_names | {"__main__", "opero"}


class _Registry:
    """The shared objects of this process.

    Attributes:
        objects: All of them, by identity.
        named: The circuit breakers, by the names that users gave them.
        table: What `attach_table` was given.
        unshared: What `unshared_objects` returns next.
        uid: Text that names this interpreter: another process has another one, and so has another interpreter in it.
    """

    lock: threading.RLock

    def __init__(self) -> None:
        self.objects: weakref.WeakValueDictionary[str, SharedObject] = weakref.WeakValueDictionary()
        self.named: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
        self.table: dict[str, str] = {}
        self.after_fork()

    def after_fork(self) -> None:
        """Make a new lock, because a thread of a forked child's parent may hold the old one; drop its reports."""
        self.lock = threading.RLock()
        self.unshared: list[str] = []
        self.uid: str = os.urandom(16).hex()


registry: Final = _Registry()
run_after_fork(registry.after_fork)


class SharedObject:
    """An object whose state can move into a file, where other processes use it too.

    Pickling moves the state by itself. Unpickling gives the same object in the same process, and in another one a
    single object however often it arrives. A forked child keeps the object; it shares the state if that was in a
    file before.

    Args:
        made_from: Arguments that make such an object, for other processes.

    Attributes:
        uid: The identity.
        name: As the class says; it travels with the object.
        attached: False as long as the state of the program that started this process has not been looked for.
    """

    uid: str
    name: Any

    def __init__(self, made_from: tuple[Any, dict[str, Any]]) -> None:
        self.uid = os.urandom(16).hex()
        self._made_from = made_from
        self._path: str | None = None
        self._cannot_share = False
        self._moving = threading.Lock()
        self._addresses: set[str] = set()
        self._searched = 0
        self.attached: bool = not registry.table
        with registry.lock:
            registry.objects[self.uid] = self
        reset_after_fork(self)

    @property
    def shared(self) -> bool:
        """Whether other processes can use the state."""
        return self._path is not None

    def share(self) -> bool:
        """Move the state into a file, for processes that are forked or get this object by pickle.

        The file is private to this user. It is removed with this object or at the end of this process, unless it is
        that of a limiter with a name.

        Returns:
            Whether the state is shared now; if it cannot be, one warning has said so.
        """
        with self._moving:
            if self._path is None and not self._cannot_share:
                self._move(None)
            return self.shared

    def guards(self, module: str, qualname: str, option: str) -> None:
        """Note that a function uses this object, so that the same function in a worker finds its state.

        Args:
            module: The function's module.
            qualname: Its qualified name.
            option: The option that holds the object.
        """
        # What is made within a function may be made many times.
        if module != "__main__" and "<locals>" not in qualname:
            self._addresses.add(f"{module}:{qualname}#{option}")

    def attach(self) -> bool:
        """Use the state of the program that started this process, if it has this object too.

        Returns:
            Whether that was found.
        """
        self._begin_attached()
        table = registry.table
        path = next((table[address] for address in self._addresses if address in table), None)
        path = path or next((table[found] for found in table if _at(found) is self), None)
        self._join(path)
        return path is not None

    def _places(self) -> Iterator[tuple[str, str]]:
        """Yield the addresses that still stand for this object, with its file."""
        for address in self._addresses:
            if self._path is not None and ("#" in address or _at(address) is self):
                yield address, self._path

    def _begin_attached(self) -> None:
        """Begin to work, with a state of this process for the time being."""
        self.attached = True

    def _join(self, path: str | None, *, create: bool = False) -> None:
        """Use the state of the process that this object came from."""
        self._begin_attached()
        with self._moving:
            if path is not None and path != self._path and not self._cannot_share:
                self._move(path, create=create)

    def _move(self, path: str | None, *, create: bool = False) -> None:
        """Go on in a file (None: a new one) with what is remembered here."""
        try:
            target = path or self._new_path()
            self._go_to(target, create=create or path is None)
            self._path = target
        except (OSError, ImportError) as error:
            self._cannot_share = True
            registry.unshared.append(repr(self))
            warnings.warn(
                f"{self!r}: no file can be shared between processes, so the limit is per process "
                f"({type(error).__name__}: {error}).",
                RuntimeWarning,
                stacklevel=4,
            )

    def _share_part(self, part: SharedObject, secret: str, content: bytes) -> None:
        """Let a part of this object use a file beside that of the whole, if there is one.

        Args:
            part: The part.
            secret: Keys the hash in the name of the file, so that likely contents cannot be tried out.
            content: What sets the part apart from others.
        """
        if self._path is not None:
            from opero.limits.state_file import path_beside

            part._join(path_beside(self._path, secret.encode(), content), create=True)

    def _new_path(self) -> str:
        """Return the path of a new file for the state."""
        from opero.limits.state_file import private_path

        return private_path(self)

    def _go_to(self, path: str, *, create: bool) -> None:
        """Move the state into a file, which may be new if `create` says so.

        Raises:
            OSError: There can be no such file.
        """
        raise NotImplementedError

    def after_fork(self) -> None:
        """Replace a lock that another thread of the parent may have held."""
        self._moving = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        self.share()
        make = partial(_made_again, type(self), *self._made_from, self.name)
        return restore, (self.uid, self._path, make)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        # A copy of something that is under this limit is under it still.
        return self


class SharedCells(SharedObject):
    """A shared object whose state is a row of whole numbers, all 0 at first.

    Args:
        made_from: As for `SharedObject`.
        cells: The numbers.

    Attributes:
        kind: Two letters that say what is in its file.
    """

    kind: ClassVar[str]
    _file: StateFile | None = None

    def __init__(self, made_from: tuple[Any, dict[str, Any]], cells: memoryview) -> None:
        self._cells = cells
        # Reentrant: the garbage collector may end an abandoned coroutine, and a signal handler may make a call.
        self._lock = threading.RLock()
        super().__init__(made_from)

    def _exclusively(self, work: Callable[[], T]) -> T:
        """Do something while no other thread or process uses the numbers."""
        if not self.attached:
            self.attach()
        with self._lock:
            if self._file is None:
                return work()
            return self._file.exclusively(work)

    def _go_to(self, path: str, *, create: bool) -> None:
        from opero.limits.state_file import StateFile

        with self._lock:
            size = len(self._cells)
            file = StateFile.open(
                path,
                self.kind,
                lambda old, _: old if old is not None and len(old) == size else [0] * size,
                create=create,
            )

            def move() -> None:
                if file.torn or not any(file.cells):
                    file.cells[:] = self._cells
                self._use(file.cells)

            file.exclusively(move)
            self._file = file

    def _use(self, cells: memoryview) -> None:
        """Go on with other cells."""
        self._cells = cells

    def after_fork(self) -> None:
        """Replace locks that another thread of the parent may have held."""
        super().after_fork()
        self._lock = threading.RLock()


class SharedGuard(SharedObject):
    """A shared object that a `with` or `async with` block may be put under."""

    def acquire(self) -> object:
        """Block until the block may begin."""
        raise NotImplementedError

    async def wait(self) -> object:
        """Wait in a task until the block may begin."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self.acquire()
        return self

    async def __aenter__(self) -> Self:
        await self.wait()
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing, unless a block has to give back what it had."""

    async def __aexit__(self, *_: object) -> None:
        """Do what `__exit__` does."""


def _made_again(kind: Callable[..., S], first: Any, options: dict[str, Any], name: str | None) -> S:
    one = kind(first, **options)
    one.name = name
    return one


def restore(uid: str, path: str | None, make: Callable[[], S]) -> S:
    """Return the object of an identity, with the state that lies in a file.

    Args:
        uid: The identity, from this process or another one.
        path: The file.
        make: Makes the object if it is not in this process yet.
    """
    with registry.lock:
        found: Any = registry.objects.get(uid)
        if found is None:
            found = make()
            registry.objects.pop(found.uid, None)
            found.uid = uid
            registry.objects[uid] = found
    one: S = found
    one._join(path)  # noqa: SLF001 - one thing with this module
    return one


# --- tables for workers ---------------------------------------------------------------------------


def share_all() -> dict[str, str]:
    """Share all limits of this process, so that workers use their states.

    Returns:
        The files, by the addresses of the objects that an import will make again in a worker: what `attach_table`
        takes there.
    """
    all_of_them = list(registry.objects.values())
    shared = {id(one): one for one in all_of_them if one._path is not None or one.share()}  # noqa: SLF001 - one thing with this module
    # The search takes milliseconds: once for each object, and again when more modules have been imported.
    modules = len(sys.modules)
    wanted = {key for key, one in shared.items() if not one._addresses and one._searched != modules}  # noqa: SLF001 - as above
    for one in shared.values():
        one._searched = modules  # noqa: SLF001 - as above
    for address, key in _held_by_modules(wanted) if wanted else ():
        shared[key]._addresses.add(address)  # noqa: SLF001 - as above
    return {address: path for one in shared.values() for address, path in one._places()}  # noqa: SLF001 - as above


def _held_by_modules(wanted: set[int]) -> Iterator[tuple[str, int]]:
    """Yield the module attributes that hold objects, given by their ids, with those."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in _NOT_SEARCHED:
            continue
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if id(value) in wanted:
                yield f"{name}:{attribute}", id(value)
            elif isinstance(value, type) and value.__module__ == name:
                for inner, held in list(vars(value).items()):
                    if id(held) in wanted:
                        yield f"{name}:{attribute}.{inner}", id(held)


def attach_table(table: dict[str, str], interpreter: str) -> None:
    """Let limits that are made in this interpreter from now on use the states of another one.

    Args:
        table: What `share_all` returned there.
        interpreter: The `registry.uid` there. A map's own program is not attached to itself: what it makes is new.
    """
    if interpreter != registry.uid:
        registry.table = dict(table)


def _at(address: str) -> object:
    """Return what a module attribute holds; None for the address of a function, or if it is not there yet."""
    module, _, path = address.partition(":")
    try:
        return None if "#" in path else attrgetter(path)(sys.modules[module])
    except (AttributeError, KeyError):
        return None


def unshared_objects() -> list[str]:
    """Return, once, how the limits describe themselves whose state this process could not share."""
    found, registry.unshared = registry.unshared, []
    return found
