# this_file: src/opero/limits/joint.py
"""Several limits decided as one: a call starts under all of them or under none; pure.

Also what is done to the words of any rule, alone or joint, when a file is opened: carried over to
another clock, mended, handed on to another rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from opero.limits.cost import UNIT, CostCap, CostWindow
from opero.limits.pace import NEVER, Quota, Spacing, rule_for, rule_of

if TYPE_CHECKING:
    from opero.limits.pace import Rule, Saved, Words
    from opero.utils.units import Window

__all__ = [
    "Joint",
    "Part",
    "carried",
    "inherited",
    "is_idle",
    "joined",
    "mended",
    "rule_in",
    "words_of",
]

Part = Spacing | Quota | CostWindow | CostCap
_KIND: Final = 3
_OF_PART: Final = 4
_FORGOTTEN: Final = 1 << 60
"""Age (36 years) at which a start matters to no rule; only a damaged file has older ones."""


class _View:
    """The words of one part among those of all."""

    __slots__ = ("_offset", "_words")

    def __init__(self, words: Words, offset: int) -> None:
        self._words = words
        self._offset = offset

    def __getitem__(self, index: int, /) -> int:
        return self._words[self._offset + index]

    def __setitem__(self, index: int, value: int, /) -> None:
        self._words[self._offset + index] = value


@dataclass(frozen=True)
class Joint:
    """Limits that are taken together, so that none of them loses what another refuses.

    Word 0 changes before anything else does, which shows that a change was cut short. The
    signatures of the parts follow it, then the words of each.

    Attributes:
        parts: The limits.
    """

    parts: tuple[Part, ...]

    # --- words ------------------------------------------------------------------------------------

    def views(self, words: Words) -> Iterator[tuple[Part, _View]]:
        """Yield each part with its own words."""
        offset = 1 + _OF_PART * len(self.parts)
        for part in self.parts:
            yield part, _View(words, offset)
            offset += _size(part)

    @property
    def signature(self) -> tuple[int, int, int, int]:
        """Kind 3, the number of parts and of words, and what tells the parts from others."""
        # Asked for only where a slot lies in a file.
        from zlib import crc32

        signatures = [number for part in self.parts for number in part.signature]
        size = 1 + len(signatures) + sum(_size(part) for part in self.parts)
        return _KIND, len(self.parts), size, crc32(repr(signatures).encode())

    def words(self, starts: Iterable[int] = ()) -> list[int]:
        """Return the words of limits under which calls have started at these times."""
        starts = list(starts)
        found = [
            part.words(starts) if isinstance(part, Spacing | Quota) else part.words()
            for part in self.parts
        ]
        return self._packed(found)

    def _packed(self, of_parts: Iterable[list[int]]) -> list[int]:
        signatures = [number for part in self.parts for number in part.signature]
        return [0, *signatures, *(word for words in of_parts for word in words)]

    def starts(self, words: Words) -> list[int]:
        """Return the starts that the part with the longest memory remembers."""
        found = (
            part.starts(view)
            for part, view in self.views(words)
            if isinstance(part, Spacing | Quota)
        )
        return max(found, key=len, default=[])

    # --- pace -------------------------------------------------------------------------------------

    @property
    def _rules(self) -> list[Spacing | Quota]:
        return [part for part in self.parts if isinstance(part, Spacing | Quota)]

    @property
    def tolerance(self) -> int:
        """That of the strictest part."""
        return min((rule.tolerance for rule in self._rules), default=0)

    @property
    def late(self) -> int:
        """That of the strictest part."""
        return min((rule.late for rule in self._rules), default=self.period // 128)

    @property
    def pace(self) -> float:
        """That of the slowest part which is spaced; any, if none is."""
        spaced = [rule.pace for rule in self._rules if isinstance(rule, Spacing)]
        return min(spaced, default=1000.0)

    @property
    def spacing(self) -> int:
        """That of the widest part."""
        return max((rule.spacing for rule in self._rules), default=0)

    @property
    def period(self) -> int:
        """That of the longest part."""
        return max((part.period for part in self.parts if not isinstance(part, CostCap)), default=0)

    # --- decisions --------------------------------------------------------------------------------

    def look(self, words: Words, now: int, cost: int = 0) -> int:
        """Return how long a call would have to wait at least, `SPENT` if for ever."""
        if words[0] >= NEVER:
            return NEVER - now
        return max(
            part.look(view, now)
            if isinstance(part, Spacing | Quota)
            else part.look(view, now, cost)
            for part, view in self.views(words)
        )

    def take(self, words: Words, now: int, cost: int = UNIT) -> int:
        """Start a call under all limits and return 0, or change nothing and return the wait."""
        wait = self.look(words, now, cost)
        if wait:
            return wait
        words[0] += 1
        for part, view in self.views(words):
            if isinstance(part, Spacing | Quota):
                part.take(view, now)
            else:
                part.add(view, now, cost)
        return 0

    def save(self, words: Words) -> Saved:
        """Return the words of call-counting parts that the next `take` will change."""
        found: list[tuple[int, int]] = []
        offset = 1 + _OF_PART * len(self.parts)
        for part in self.parts:
            if isinstance(part, Spacing | Quota):
                saved = part.save(_View(words, offset))
                found += [(offset + place, word) for place, word in saved]
            offset += _size(part)
        return tuple(found)

    def settle(self, words: Words, now: int, at: int, change: int) -> None:
        """Put right what a call that started at a time has cost.

        Args:
            words: The words.
            now: The time.
            at: When it started.
            change: What it cost more than was counted, less than 0 for a refund.
        """
        words[0] += 1
        for part, view in self.views(words):
            if not isinstance(part, Spacing | Quota):
                part.correct(view, now, at, change)

    def spent(self, words: Words) -> int:
        """Return what was spent under the cap, 0 without one."""
        return sum(view[0] for part, view in self.views(words) if isinstance(part, CostCap))

    def forget_spent(self, words: Words) -> None:
        """Begin the cap anew."""
        words[0] += 1
        for part, view in self.views(words):
            if isinstance(part, CostCap):
                view[0] = 0

    def brake(self, words: Words, until: int, length: int) -> int:
        """Make ready for a pause: the widest gap that a part asks for."""
        return max(
            part.brake(view, until, length)
            if isinstance(part, Spacing | Quota)
            else part.brake(length)
            for part, view in self.views(words)
        )

    def release(self, words: Words, now: int) -> None:
        """Undo what `brake` did."""
        for part, view in self.views(words):
            if isinstance(part, Spacing | Quota):
                part.release(view, now)

    # --- other times, other rules -----------------------------------------------------------------

    def moved(self, words: Words, by: int, now: int, extra: list[int]) -> list[int]:
        """Return the words with all times moved, and further starts counted."""
        return self._packed(
            _renewed(part, [start + by for start in part.starts(view)] + extra, now)
            if isinstance(part, Spacing | Quota)
            else part.carried(view, by, now)
            for part, view in self.views(words)
        )

    def heir_of(self, old: Rule, words: Words, now: int) -> list[int]:
        """Return the words of these limits in the place of others."""
        starts = old.starts(words)
        before = list(old.views(words)) if isinstance(old, Joint) else []
        found = []
        for part in self.parts:
            if isinstance(part, Spacing | Quota):
                found.append(_renewed(part, starts, now))
                continue
            # What was spent in a window of the same length, or under another cap, still counts.
            same = (
                view
                for other, view in before
                if type(other) is type(part)
                and getattr(other, "period", 0) == getattr(part, "period", 0)
            )
            view = next(same, None)
            found.append(part.words() if view is None else part.carried(view, 0, now))
        return self._packed(found)

    def __str__(self) -> str:
        return " and ".join(map(str, self.parts))


def _size(part: Part) -> int:
    match part:
        case Spacing() | CostCap():
            return 1
        case Quota():
            return 2 + part.capacity
        case CostWindow():
            return 2 + part.places


def joined(
    windows: Iterable[Window], *, burst: int, smooth: bool | None, cap: int | None = None
) -> Rule:
    """Choose the rule for one or several windows.

    Of several windows that count calls only the shortest is spaced by default: it sets the pace,
    and a longer one that was spaced as well would leave nothing of it.

    Args:
        windows: What is counted, how much, in how many seconds.
        burst: As for `rule_for`.
        smooth: As for `rule_for`, but None spaces the shortest window only.
        cap: Most cost in all, in millionths.

    Raises:
        OperoUsageError: A window cannot be kept.
    """
    windows = tuple(windows)
    calls = [window for window in windows if not window.weighted]
    shortest = min(calls, key=lambda window: window.rate.period, default=None)
    parts: list[Part] = []
    for window in windows:
        if window.weighted:
            parts.append(CostWindow.of(window.rate))
        elif window is shortest or smooth is not None:
            parts.append(rule_for(window.rate, burst, smooth))
        else:
            parts.append(rule_for(window.rate, burst, False))
    if cap is not None:
        parts.append(CostCap(cap))
    only = parts[0] if len(parts) == 1 else None
    return only if isinstance(only, Spacing | Quota) else Joint(tuple(parts))


# --- words of any rule ----------------------------------------------------------------------------


def _renewed(rule: Rule, starts: list[int], now: int) -> list[int]:
    """Return the words of a rule with these starts, as far as they can be true."""
    latest, oldest = now + rule.tolerance, now - _FORGOTTEN
    return rule.words([min(start, latest) for start in starts if start > oldest])


def carried(rule: Rule, words: Words, by: int, now: int) -> list[int]:
    """Return the words of a rule with all times moved by so much, to a clock that reads `now`."""
    if isinstance(rule, Joint):
        return rule.moved(words, by, now, [])
    return _renewed(rule, [start + by for start in rule.starts(words)], now)


def mended(rule: Rule, words: Words, now: int) -> list[int]:
    """Return words that are whole, whatever somebody left who may have started one call."""
    if isinstance(rule, Joint):
        return rule.moved(words, 0, now, [now])
    return _renewed(rule, [*rule.starts(words), now], now)


def inherited(rule: Rule, old: Rule, words: Words, now: int) -> list[int]:
    """Return the words of a rule that follows another one, whose words these are."""
    if isinstance(rule, Joint):
        return rule.heir_of(old, words, now)
    return _renewed(rule, old.starts(words), now)


def words_of(signature: tuple[int, int, int, int]) -> int:
    """Return how many words the rule of a signature has; 0 if there is none such."""
    kind, _, size, _ = signature
    if kind == _KIND:
        return size if 0 < size < _FORGOTTEN else 0
    rule = rule_of(signature)
    return 0 if rule is None else len(rule.words())


def rule_in(signature: tuple[int, int, int, int], words: Words) -> Rule | None:
    """Make the rule with this signature and these words; None if there is none."""
    kind, count, size, _ = signature
    if kind != _KIND:
        return rule_of(signature)
    if not 0 < 1 + _OF_PART * count <= size:
        return None
    parts: list[Part] = []
    for place in range(1, 1 + _OF_PART * count, _OF_PART):
        part = _part_of((words[place], words[place + 1], words[place + 2], words[place + 3]))
        if part is None:
            return None
        parts.append(part)
    made = Joint(tuple(parts))
    return made if made.signature == signature else None


def _part_of(signature: tuple[int, int, int, int]) -> Part | None:
    kind, first, second, _ = signature
    if kind == 4 and first > 0 and second > 0:
        return CostWindow(first, second)
    if kind == 5 and first > 0:
        return CostCap(first)
    return rule_of(signature)


def is_idle(rule: Rule, words: Words, now: int) -> bool:
    """Tell whether the words of a rule remember nothing that still counts."""
    if not isinstance(rule, Joint):
        return not rule.look(words, now) and all(
            start + _memory(rule) <= now for start in rule.starts(words)
        )
    return all(
        is_idle(part, view, now) if isinstance(part, Spacing | Quota) else not part.used(view, now)
        for part, view in rule.views(words)
    )


def _memory(rule: Rule) -> int:
    return rule.period if isinstance(rule, Quota) else rule.spacing
