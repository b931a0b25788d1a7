# this_file: src/opero/limits/shareable.py
"""What gives a limiter its identity: one object per process, one state for all of them."""

from __future__ import annotations

import os
import sys
import threading
import warnings
import weakref
from types import FrameType
from typing import Any, Self

__all__ = ["Birth", "Shareable", "births", "inherit", "publish_all"]

Birth = tuple[str, int, str]
"""Where a limiter was made while a module was imported: the module and the line; and its class."""


class Shareable:
    """An object whose state can move into a file, where other processes use it too.

    Pickling moves the state by itself. Unpickling gives the same object in the same process, and in
    another one a single object however often it arrives. A forked child keeps the object; it shares
    the state if that was in a file before.

    Args:
        made_from: Arguments that make such an object, for other processes.

    Attributes:
        uid: The identity.
        name: As the class says; it travels with the object.
    """

    uid: str
    name: Any

    def __init__(self, made_from: tuple[Any, dict[str, Any]]) -> None:
        self.uid = os.urandom(16).hex()
        self._made_from = made_from
        self._path: str | None = None
        self._alone = False
        self._moving = threading.Lock()
        self._birth, self._born_in = _birth(type(self).__name__)
        with _known.lock:
            _known.live[self.uid] = self
            paths = [] if self._birth is None else _known.born.get(self._birth, [])
            path = paths.pop(0) if paths else None
        if path is not None:
            self._join(path)

    @property
    def shared(self) -> bool:
        """Whether other processes can use the state."""
        return self._path is not None

    def share(self) -> bool:
        """Move the state into a file, for processes that are forked or get this object by pickle.

        The file is private to this user. It is removed with this object or at the end of this
        process, unless it is that of a limiter with a name.

        Returns:
            Whether the state is shared now; if it cannot be, one warning has said so.
        """
        with self._moving:
            if self._path is None and not self._alone:
                self._move(None)
            return self.shared

    def _join(self, path: str | None, *, create: bool = False) -> None:
        """Use the state of the process that this object came from."""
        with self._moving:
            if path is not None and path != self._path:
                self._move(path, create=create)

    def _move(self, path: str | None, *, create: bool = False) -> None:
        """Go on in a file (None: a new one) with what is remembered here."""
        try:
            self._path = self._go_to(path, create=create)
        except (OSError, ImportError) as error:
            self._alone = True
            warnings.warn(
                f"{self!r}: no file can be shared between processes, so the limit is per process "
                f"({type(error).__name__}: {error}).",
                RuntimeWarning,
                stacklevel=4,
            )

    def _go_to(self, path: str | None, *, create: bool) -> str:
        """Move the state into a file, by default a new one, and return its path.

        Raises:
            OSError: There can be no such file.
        """
        raise NotImplementedError

    def _after_fork(self) -> None:
        self._moving = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        self.share()
        return _unpickle, (type(self), self.uid, *self._made_from, self.name, self._path)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        # A copy of something that is under this limit is under it still.
        return self


class _Known:
    """The shareable objects of this process by their identity."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.live: weakref.WeakValueDictionary[str, Shareable] = weakref.WeakValueDictionary()
        self.born: dict[Birth, list[str]] = {}

    def after_fork(self) -> None:
        self.lock = threading.RLock()
        for one in list(self.live.values()):
            one._after_fork()  # noqa: SLF001 - one thing with this module


_known = _Known()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_known.after_fork)


def _unpickle(
    kind: type[Shareable],
    uid: str,
    rate: Any,
    options: dict[str, Any],
    name: str | None,
    path: str | None,
) -> Shareable:
    with _known.lock:
        one = _known.live.get(uid)
        if one is None:
            one = kind(rate, **options)
            del _known.live[one.uid]
            one.uid, one.name = uid, name
            _known.live[uid] = one
    one._join(path)  # noqa: SLF001 - one thing with this module
    return one


def _birth(kind: str) -> tuple[Birth | None, int]:
    """Tell where the limiter is made that is made just now, and in which namespace; None if that is in no import.

    Another process that imports the module makes the same limiter again, in the same place.
    """
    frame: FrameType | None = sys._getframe(2)  # noqa: SLF001 - the only way to see the caller
    while frame is not None and _module_of(frame).partition(".")[0] == "opero":
        frame = frame.f_back
    if frame is None or (module := _module_of(frame)) == "__main__":
        return None, 0
    line, importing = frame.f_lineno, frame
    while importing.f_code.co_name != "<module>" or _module_of(importing) != module:
        if importing.f_back is None:
            return None, 0
        importing = importing.f_back
    return (module, line, kind), id(importing.f_globals)


def _module_of(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def births() -> dict[Birth, list[str]]:
    """Share all limiters of this process; return the files of those that an import will make again elsewhere.

    Where one line makes several, they stand in the order in which it does.
    """
    publish_all()
    born: dict[Birth, list[str]] = {}
    for one in list(_known.live.values()):
        birth, path = one._birth, one._path  # noqa: SLF001 - one thing with this module
        # What an import left behind that was made again since is not what the functions of today use.
        module = None if birth is None else sys.modules.get(birth[0])
        if birth and path and module and id(vars(module)) == one._born_in:  # noqa: SLF001 - as above
            born.setdefault(birth, []).append(path)
    return born


def inherit(born: dict[Birth, list[str]]) -> None:
    """Let limiters that are made in these places from now on use these files."""
    _known.born = {birth: list(paths) for birth, paths in born.items()}


def publish_all() -> None:
    """Share all limiters of this process, so that workers about to be forked use their slots."""
    for one in list(_known.live.values()):
        one.share()
