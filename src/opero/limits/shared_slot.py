# this_file: src/opero/limits/shared_slot.py
"""A slot in a small mapped file: one limit for several processes, and for the next run.

What keeps it whole when a process is killed at any moment:

- The lock is a record lock, which the kernel takes back from the dead. It belongs to a process, so
  a forked child does not have it, and closing any descriptor of the file gives it up: each process
  has one descriptor per file and a thread lock around it.
- Words are stored whole (eight aligned bytes) in an order in which each store leaves a valid state
  (`Rule.take`). A check word, stored last, tells whether a record was cut short; its times are then
  clipped to what they can mean, so that the limit neither hangs nor is lifted.
- A monotonic clock starts again with the machine. The file holds the boot it belongs to and one
  pair of monotonic and wall time, by which its times are carried over; no wait becomes longer than
  the rule's own.
"""

from __future__ import annotations

import mmap
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar
from zlib import crc32

from opero.errors import OperoUsageError
from opero.limits import file_lock
from opero.limits.hold import Hold
from opero.limits.joint import carried, inherited, mended, rule_in, words_of
from opero.limits.pace import SECOND, Rule
from opero.limits.shared_file import open_once, open_own
from opero.limits.slot import Mark, hold_back, let_go, undo

if TYPE_CHECKING:
    from opero.limits.pace import Words

T = TypeVar("T")

__all__ = ["SharedSlot", "open_slot", "state_path"]

# Places in the header, counted in words. The words of the rule follow it.
_MAGIC, _RULE, _CHECK, _MONOTONIC, _WALL, _BOOT = 0, 1, 5, 6, 7, 8
_RULE_WORDS: Final = 4
_BOOT_WORDS: Final = 5
_HOLD: Final = 13
_HEADER: Final = 16
_VERSION: Final = int.from_bytes(b"opero\0\0\1", "big")

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_PAIRED: Final = SECOND
"""Time after which the pair of monotonic and wall time is read anew."""
_CLOCKS_APART: Final = 60 * SECOND
"""Without a boot id: clocks that differ by more have not run side by side (reboot, sleep, set)."""


class SharedSlot:
    """The state of one limit in a file; `open_slot` makes it.

    Attributes:
        path: The file.
        rule: The rule that it follows.
        fd: The only descriptor of the file in this process.
    """

    def __init__(self, path: str, rule: Rule, *, create: bool, words: list[int]) -> None:
        self.path = path
        self.rule = rule
        self._lock = threading.Lock()
        self._pair_due = 0
        self._start = rule.take
        self.fd: int = open_own(path, create=create)
        try:
            try:
                file_lock.lock(self.fd)
                self._load(words, create)
            finally:
                file_lock.unlock(self.fd)
        except BaseException:
            os.close(self.fd)
            raise

    # --- the file ---------------------------------------------------------------------------------

    def _load(self, words: list[int], create: bool) -> None:
        """Map the file and bring it up to date; it is locked."""
        found = os.fstat(self.fd).st_size
        header = [0] * _HEADER
        if found >= 8 * _HEADER:
            header = _as_words(os.read(self.fd, 8 * _HEADER))
        signature = _signature_in(header)
        size = 0 if signature is None else words_of(signature)
        if signature is None or not size:
            if not create:
                raise OSError(f"{self.path} holds no slot")
            signature = None
        same = signature == self.rule.signature
        if not same and signature is not None and not file_lock.alone(self.fd):
            raise OperoUsageError(
                f"{self.path} is in use by another program, with another rate than {self.rule}: "
                "give both limiters the same rate, or different names."
            )
        self._map(found, 8 * (_HEADER + max(size, len(words))))
        now = time.monotonic_ns()
        old = None if signature is None else rule_in(signature, self._words)
        if old is None:
            self._write(words, now)
        elif not same:
            self._write(inherited(self.rule, old, self._words, now), now)
        moved = self._since_boot(now)
        if moved is not None:
            self._hold.move(moved)
            self._write(carried(self.rule, self._words, moved, now), now)
        file_lock.use(self.fd)

    def _map(self, found: int, needed: int) -> None:
        if found < needed:
            # Zeros, not a hole: a full disk must show here, not as a bus error in a later store.
            os.lseek(self.fd, 0, os.SEEK_END)
            os.write(self.fd, bytes(needed - found))
        view = memoryview(mmap.mmap(self.fd, needed, access=mmap.ACCESS_WRITE)).cast("q")
        self._header: Words = view[:_HEADER]
        self._hold = Hold(view[_HOLD:_HEADER])
        self._words: Words = view[_HEADER:]

    def _write(self, made: list[int], now: int) -> None:
        """Store the whole record anew."""
        header, words = self._header, self._words
        header[_CHECK] = words[0]  # counts as cut short until it is sealed
        for place, word in enumerate(made):
            words[place] = word
        for place, word in enumerate(self.rule.signature):
            header[_RULE + place] = word
        for place, word in enumerate(_boot_words()):
            header[_BOOT + place] = word
        self._pair(now)
        self._seal(now)
        header[_MAGIC] = _VERSION

    def _pair(self, now: int) -> None:
        self._header[_MONOTONIC] = now
        self._header[_WALL] = time.time_ns()
        self._pair_due = now + _PAIRED

    def _seal(self, now: int) -> None:
        # Any two readings of one boot say the same of its clocks; only a wall clock that is set makes them old.
        if now >= self._pair_due:
            self._pair(now)
        self._header[_CHECK] = ~self._words[0]

    def _mend(self, now: int) -> None:
        """Put right what a killed process has left; it may have started one call."""
        if self._header[_CHECK] != ~self._words[0]:
            self._write(mended(self.rule, self._words, now), now)

    def _since_boot(self, now: int) -> int | None:
        """Return what carries the file's times over to this boot's clock; None if it is theirs."""
        then = self._header[_MONOTONIC]
        elapsed = max(0, time.time_ns() - self._header[_WALL])
        boot = _boot_words()
        if any(boot):
            same = all(self._header[_BOOT + place] == word for place, word in enumerate(boot))
        else:
            same = abs(elapsed - (now - then)) < _CLOCKS_APART
        return None if same and then <= now else now - elapsed - then

    # --- a slot's verbs ---------------------------------------------------------------------------

    def take(self) -> int:
        """Start a call and return 0, or return the nanoseconds to wait."""
        # `_deciding` written out, and what stands in `_seal`: calls would add half of what the whole takes.
        with self._lock:
            fd, header, words = self.fd, self._header, self._words
            try:
                file_lock.lock(fd)
                now = time.monotonic_ns()
                if header[_CHECK] != ~words[0]:
                    self._mend(now)
                wait = self._take(words, now) if header[_HOLD] else self._start(words, now)
                if not wait:
                    if now >= self._pair_due:
                        self._pair(now)
                    header[_CHECK] = ~words[0]
                return wait
            finally:
                file_lock.unlock(fd)

    def _take(self, words: Words, now: int) -> int:
        """Take with regard to a pause."""
        wait = self._hold.wait(now) or self.rule.take(words, now)
        if not wait and self._hold.on:
            self._hold.started(now)
        return wait

    @contextmanager
    def _deciding(self) -> Iterator[int]:
        """Hold both locks, mend the record, yield the time, and seal what was done."""
        with self._lock:
            try:
                file_lock.lock(self.fd)
                now = time.monotonic_ns()
                self._mend(now)
                yield now
                self._seal(now)
            finally:
                file_lock.unlock(self.fd)

    def take_marked(self) -> tuple[int, Mark]:
        """Do the same as `take`, and return what `give_back` needs."""
        with self._deciding() as now:
            before = self.rule.save(self._words)
            wait = self._take(self._words, now)
            return wait, Mark(before, self.rule.save(self._words))

    def decide(self, decision: Callable[[Words, int], int]) -> int:
        """Start a call if a decision about the words says so; return 0 or the wait."""
        with self._deciding() as now:
            wait = self._hold.wait(now) or decision(self._words, now)
            if not wait and self._hold.on:
                self._hold.started(now)
            return wait

    def change(self, change: Callable[[Words, int], T]) -> T:
        """Do something with the words while nobody else does, and return what came out."""
        with self._deciding() as now:
            return change(self._words, now)

    def give_back(self, mark: Mark) -> bool:
        """Make it as if a `take_marked` had never been; False if another call has started since."""
        with self._deciding():
            return undo(self.rule, self._words, mark)

    def look(self) -> int:
        """Return the nanoseconds that the next call would have to wait."""
        with self._deciding() as now:
            return max(self._hold.wait(now), self.rule.look(self._words, now))

    def pause(self, length: int) -> bool:
        """Let nothing start for so many nanoseconds; False if a pause already lasts that long."""
        with self._deciding() as now:
            return hold_back(self.rule, self._words, self._hold, now, length)

    def resume(self) -> None:
        """End a pause now."""
        with self._deciding() as now:
            let_go(self.rule, self._words, self._hold, now)

    def paused(self) -> int:
        """Return the nanoseconds that are left of a pause."""
        with self._deciding() as now:
            return self._hold.left(now)

    def after_fork(self) -> None:
        """Leave the parent's thread lock behind and show that this process uses the file too."""
        self._lock = threading.Lock()
        file_lock.use(self.fd)

    def __repr__(self) -> str:
        return f"<SharedSlot {self.path}>"


# --- files ----------------------------------------------------------------------------------------


def open_slot(path: str, rule: Rule, *, create: bool, words: list[int] | None = None) -> SharedSlot:
    """Return this process's slot for a file, opening it if need be.

    Args:
        path: The file. If it follows another rule and nobody uses it, it is rewritten, and what it
            remembers counts under the new rule.
        rule: The rule.
        create: Whether the file may be new.
        words: Words of the rule that a new file shall begin with.

    Raises:
        OSError: The file cannot be opened, mapped or locked, or is no slot.
        OperoUsageError: It is in use with another rule.
    """
    words = words or rule.words()
    slot = open_once(path, lambda: SharedSlot(path, rule, create=create, words=words))
    if slot.rule != rule:
        raise OperoUsageError(
            f"{path} is in use by this program, with {slot.rule} and not {rule}: "
            "give both the same rate, or different names."
        )
    return slot


def state_path(name: str) -> str:
    """Return the path of a named slot, in `OPERO_STATE_DIR` or the user's state directory."""
    folder = os.environ.get("OPERO_STATE_DIR")
    if not folder:
        from platformdirs import user_state_dir

        folder = user_state_dir("opero", appauthor=False)
    Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    readable = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:80]
    return str(Path(folder).resolve() / f"limiter-{readable}-{crc32(name.encode()):08x}.slot")


def _as_words(data: bytes) -> list[int]:
    return list(memoryview(data).cast("q"))


def _signature_in(header: list[int]) -> tuple[int, int, int, int] | None:
    if header[_MAGIC] != _VERSION:
        return None
    kind, first, second, third = header[_RULE : _RULE + _RULE_WORDS]
    return kind, first, second, third


def _boot_words() -> list[int]:
    """Return the id of this boot, zeros where the system tells none."""
    try:
        text = _BOOT_ID.read_bytes()[: 8 * _BOOT_WORDS]
    except OSError:
        text = b""
    return _as_words(text.ljust(8 * _BOOT_WORDS, b"\0"))
