# this_file: tests/caching/test_plain_types.py
"""A type in the table of plain types is known to keys, copying, the codec, journals, recordings and checkpoints."""

from __future__ import annotations

import dataclasses
import enum
import uuid
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pydantic
import pytest
from tests.tables import rows

from opero import opero, operomap
from opero.caching import plain_types, signing
from opero.caching.codec import Coder
from opero.caching.copying import freeze
from opero.caching.keys import encode
from opero.caching.plain_types import PlainType, Unencodable
from opero.durable import values
from opero.errors import UnserializableError
from opero.testing import record, replay

pytestmark = pytest.mark.internal


class Celsius:
    """A type that no table knows."""

    __slots__ = ("degrees",)

    def __init__(self, degrees: float) -> None:
        self.degrees = degrees

    def __eq__(self, other: object) -> bool:
        return type(other) is Celsius and self.degrees == other.degrees

    __hash__ = None  # type: ignore[assignment]


ROW = PlainType(
    name=f"{Celsius.__module__}.Celsius",
    number=120,
    immutable=True,
    split=lambda value: (value.degrees,),
    join=lambda parts: Celsius(*parts),
    key=lambda value: ("celsius", value.degrees),
)


@pytest.fixture
def added() -> Iterator[None]:
    plain_types.add(ROW)
    yield
    for table in (plain_types.BY_NAME, plain_types.BY_NUMBER):
        for name in [name for name, row in table.items() if row is ROW]:
            del table[name]
    plain_types._of_class.cache_clear()


def decoded(value: object, codec: str = "plain") -> Any:
    coder = Coder(codec)
    return coder.decode(b"".join(coder.encode(value, b"key")), b"key")


def test_an_unknown_type_is_known_nowhere() -> None:
    value = Celsius(20.5)
    with pytest.raises(Unencodable):
        decoded(value)
    with pytest.raises(UnserializableError):
        values.encode(value)
    assert freeze(value)[1] is not None


@pytest.mark.usefixtures("added")
def test_a_type_that_is_added_is_known_everywhere(tmp_path: Path) -> None:
    value = Celsius(20.5)
    assert decoded([value]) == [value]
    assert values.decode(values.encode({"a": value})) == {"a": value}
    assert freeze(value) == (value, None)
    assert encode(value) == encode(Celsius(20.5)) != encode(Celsius(20.0))
    f = opero(cache=False)(measure)
    with record(tmp_path / "tape"):
        assert f(20.5) == value
    with replay(tmp_path / "tape"):
        assert f(20.5) == value
    assert "encoded" not in (tmp_path / "tape").read_text()
    assert resumed(measure, 20.5, tmp_path) == (value, 1)


@pytest.fixture(autouse=True)
def no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be signed, so that nothing can be pickled."""
    monkeypatch.setattr(signing, "find_secret", lambda *, shared: (None, "there is no secret"))


def resumed(function: Any, item: Any, tmp_path: Path) -> tuple[Any, int]:
    """Return what a map finds in its checkpoint, and how many calls it needed for it in two runs."""
    f = operomap(mode="thread", cache=False, checkpoint=str(tmp_path / "map.db"))(function)
    f([item])
    (found,) = f([item])
    return found, f.stats.calls


def measure(degrees: float) -> Celsius:
    return Celsius(degrees)


def test_a_number_stands_for_one_type() -> None:
    with pytest.raises(ValueError, match="stands for"):
        plain_types.add(ROW._replace(number=30))


class Size(enum.Enum):
    SMALL = "s"


@dataclasses.dataclass
class Item:
    name: str
    size: Size = Size.SMALL
    price: Decimal = Decimal(1)


class Shop(pydantic.BaseModel):
    id: uuid.UUID
    items: list[Item] = []
    share: Fraction = Fraction(1, 3)


SHOP = Shop(id=uuid.UUID(int=7), items=[Item("a"), Item("b", price=Decimal("2.50"))])


def shop(x: int) -> Shop:
    return SHOP.model_copy(deep=True)


def test_models_and_dataclasses_need_no_secret(tmp_path: Path) -> None:
    assert decoded(SHOP) == SHOP
    assert type(decoded(SHOP).items[1].price) is Decimal
    assert values.decode(values.encode(SHOP)) == SHOP
    f = opero(cache_backend=f"disk:{tmp_path / 'cache'}")(shop)
    assert f(1) == f(1) == SHOP
    assert f.stats.hits == 1
    with record(tmp_path / "tape"):
        opero(cache=False)(shop)(1)
    with replay(tmp_path / "tape"):
        assert opero(cache=False)(shop)(1) == SHOP
    assert "encoded" not in (tmp_path / "tape").read_text()
    assert resumed(shop, 1, tmp_path) == (SHOP, 1)
    assert encode(SHOP) == encode(shop(2))
    assert freeze(SHOP)[1](freeze(SHOP)[0]) == SHOP


@rows("name", [row.name for row in plain_types.BY_NUMBER.values()])
def test_each_row_that_is_written_can_be_read(name: str) -> None:
    row = next(row for row in plain_types.BY_NUMBER.values() if row.name == name)
    assert row.split is not None
    assert row.join is not None
    assert plain_types.BY_NUMBER[row.number or 0] is row
