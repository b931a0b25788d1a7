# this_file: tests/caching/keys/test_stability.py
"""Keys are the same in every process, on every Python, in every release."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tests.tables import rows

import opero.caching.keys
from opero.caching.keys import digest

pytestmark = pytest.mark.internal

SOURCES = Path(opero.caching.keys.__file__).parents[3]

PRELUDE = """
import collections, dataclasses, datetime as dt, enum, fractions, functools, ipaddress, json, math
import operator, pathlib, re, sys, types, typing, uuid
from decimal import Decimal
from zoneinfo import ZoneInfo
try:
    import attrs, numpy as np, pydantic
except ImportError:
    LIBRARIES = False
else:
    LIBRARIES = True
    @attrs.define
    class Pair:
        left: int
        right: int
    class Model(pydantic.BaseModel):
        name: str
        tags: list[str] = []

@dataclasses.dataclass
class Point:
    x: int
    y: int
class Row(typing.NamedTuple):
    x: int
    y: int
class Colour(enum.Enum):
    RED = 1
class Word(enum.StrEnum):
    A = "a"
class Text(str):
    pass
class Queue(collections.deque):
    pass
def unit_in(unit):
    class Unit(float):
        label = unit
    return Unit
BERLIN = ZoneInfo("Europe/Berlin")
BRASILIA = dt.timezone(dt.timedelta(hours=-3), "BRT")
"""

GOLDEN: dict[str, str] = {
    "None": "ef10aa9c5f2ffc6991a62db3447235eb8fa219eb",
    "True": "3974fca6b4c10bf5c3c3be6a35f9e29fe3af26d5",
    "1": "2233fabb53e54150b7e85488158abdb6369aad0b",
    "-1": "8b826ae3ab14d9c81b7192ffd3facb244e339b2f",
    "2**63": "5a345636dcf3d5df5d22a3bf8d011f726723a194",
    "-2**70": "dce2e708180bd55532a680bb2d3a07e54a7dd8f8",
    "1.0": "c8c4a3dae035ba58b2cc7fa63e1a05d9cec9a680",
    "-0.0": "61fa04d996a9d5a1473fdee7337642ace2b294b6",
    "math.nan": "1ba7e4187cc87c6f5ea6c31515436a90c391c798",
    "1.5-2j": "071cfb4d0a099906a55dd614ddbeb7d693b09f2e",
    '"a"': "bb8003f56617d8dc950f8df7e87a1cc97ea5fb3c",
    '"é\\ud800"': "941552b838ed325daf0a2c6a46e3f3526bfcb7f3",
    'b"a"': "615183fbaedb40599c7ae31f05aae2ca81c67ab6",
    'bytearray(b"a")': "ff144ade918c5ec385dab5055cc5c43160ee2e93",
    'memoryview(b"a")': "5e980f1af09195a6f07abef868b015ed8aa7a308",
    "...": "6884134009a43a5d04363b86ac4c1ad1f3fbd2ec",
    '[1, [2, "a"], ()]': "f20d8becf140a12c45b8559f9753a4f8a1e6ca6e",
    '(1, True, 1.0, "1", b"1", None)': "9f85ef4de470b30aca8a96c75cfb689403fedb83",
    "list(range(20))": "f569038252de08c7840bc703b8130078dd7142ad",
    "[n / 4 for n in range(20)]": "fdb0707077d0aa62d8a6ccffe374e1af87ea260f",
    "[str(n) for n in range(20)]": "2796e2af2986ee1afb607863656bcdf4a4236355",
    '{"b": 1, "a": [2]}': "7795978e35cf4172cf29fea8c55db6cb198fd6c5",
    '{1: "a", "1": "b", None: "c", (1, 2): {}}': "959c50139b117cb011fdcda2fb9f0c123a9b4ef8",
    '{"a", "b", "c"}': "ec9501c8b3bbe2fa2ee7979c24fbbf15995c3240",
    '{"b", "aa"}': "d46c7b2f664b287c082cc4ccc4fc0d0ab92c33a1",
    '{1, "a", (2.5,), None}': "78033e59a0a9dd0e03b6bd7a7b8aaf6191137482",
    "frozenset({1, 2, 3})": "d6f0ca76314075034a00e796e1681e25f7672706",
    "range(1, 10, 2)": "4b8f77cef905b784ed5c6d0e78a26afae3f8c62c",
    "slice(None, 3)": "46df04d205eadffbeb4c05be7d2f171b55bf396d",
    "collections.deque([1, 2], 3)": "2e34f0a1903c642c103ed8d309d0e2e3557ec15e",
    "collections.OrderedDict(b=1, a=2)": "a72d4ac87115847d7e559096669a9f719a39e2d6",
    "collections.defaultdict(list, a=[1])": "f073282602ae8856cbb06e6339c5e7c0622f27c0",
    'collections.Counter("abca")': "a45a53e2659f64ce6e2bf599ea6bcb4edd981c18",
    'types.MappingProxyType({"a": 1})': "e23f553da116f1f146c330a49f3707ef7ba912e6",
    "types.SimpleNamespace(a=1)": "ae80c413e55806a12d2c80d14f562cb20e442ca0",
    "Point(1, 2)": "a6799374e29746eff61911902e6aed809a2f0198",
    "Row(1, 2)": "5a947214b8a288efacb097e435334805898ecbd8",
    "Colour.RED": "b25bfa1ccde8427cddea4029c2f2d2f0bfbb669d",
    "Word.A": "fbb4852a018ed868b367cb029ee3139fd60fad37",
    "re.IGNORECASE | re.MULTILINE": "10ae1ee7674ccdc4a12dcaf180083ccf551e4282",
    'Text("a")': "84848e994e5ba9ca683d13e978de819665e15a67",
    'pathlib.Path("/a//b/../c")': "2693c4f8559d7d675a2964ca0bbe4faf52e1f73e",
    'pathlib.PurePosixPath("a")': "a21adca054062ca676693e853cacea88007058b1",
    'pathlib.PureWindowsPath("C:/a")': "79374496bb35af5ac80061c003a2d418a0250830",
    "dt.date(2024, 2, 29)": "0f9dd48066c580b135f4ff864ee64d7e8445dab4",
    "dt.datetime(2024, 2, 29, 1, 2, 3, 4)": "bf6742578a6b00a4b23cccc36178347c59aedcb8",
    "dt.datetime(2024, 10, 27, tzinfo=BERLIN, fold=1)": "1a3a3d4041cae4418cfc29b3260e75e1c14cbc66",
    "dt.datetime(2024, 2, 29, tzinfo=dt.timezone.utc)": "12100d3271c3a8102fcf405716b268d05735dac3",
    "dt.time(1, 2, tzinfo=BRASILIA)": "f8d8a45082697d6a95c9235611c8f3098b97405e",
    "dt.timedelta(days=-1, microseconds=5)": "3ad42c1e5cd8143d6d7f016df5f6abf3a7d81409",
    "BERLIN": "57993190d02052fc65fbc3667ceaa33eeff4efe9",
    'Decimal("1.50")': "1c91179eda28247ae3cdfbafac9fb6862e1e7094",
    "fractions.Fraction(1, 3)": "04e6359f5d60fb4261de87e879beffffacbafd22",
    "uuid.UUID(int=5)": "2694ae203405e403c88dda136a181a2d80385399",
    'ipaddress.ip_address("::ffff:1.2.3.4")': "b2eaee0df6650326ca2b38372fe2c5836b0bbb88",
    'ipaddress.ip_network("10.0.0.0/8")': "a3881235e92c9c2af056f3aab55e9ffb26e773aa",
    'ipaddress.ip_interface("fe80::1%eth0/64")': "dd334ac1fe55d33010e5ce18577d4b8f7f03c408",
    're.compile("a+", re.IGNORECASE)': "e21152360aba6d3118d82c4ba9bfcf2e9ec96073",
    "len": "e0e65a5fa68810752f5722b31811452a8a5144eb",
    "str.upper": "f59af8e746a4f8fcf29b33c5ea5bd6ce31ec012d",
    "dict.fromkeys": "ca2ec2c8d33efca41d3358a1efc1e3daeaea8348",
    'unit_in("g")(1)': "ef7829ad181f7486916416475f488df8f1547e02",
    "Queue([1], 3)": "6e8aab4bd4d2e3a15271e5af846d085c03e227eb",
    "math": "fadd0175794f5e5e43dc45f97be8d8ae7e49b3d1",
    'types.MethodType(functools.partial(int, "2"), Point(1, 2))': "d40ac536efc999aef5f6fb73e565a4a82edd9c9f",
    '"a".upper': "87807704103f90ae44be6eed01dc666e4e965750",
    "operator.itemgetter": "97c869cf086722aaceb03a95637a6b6f588a19f3",
    "Point(1, 2).__eq__": "6c1cf33f647738807e8ce9a528d8d5b489dc0d3f",
    "functools.partial(int, base=2)": "a794d8afb73e4ed6d7dbad3602db8d78afd28fc6",
    "list[int] | None": "7d751e60a79d3cdd8d01e42902a4c1d033b1ed1b",
    'typing.Optional[typing.Literal["a"]]': "e6db7b804c83c512316c76b282bcf84c7a2285b8",
}

GOLDEN_WITH_LIBRARIES: dict[str, str] = {
    "np.float64(1.5)": "c325597371a3cd18239f9e6d032722a3fb064644",
    'np.str_("a")': "9dc02f80385a9ba4d986c57952c42a34eef859fe",
    'np.datetime64("2024-02-29T01", "h")': "b46a4cfa620e493b703a94c11a029f53205d94bb",
    "np.arange(6).reshape(2, 3).T": "542863c5c0ef8108712a69f4274137afbff6d1fc",
    'np.array([1, math.nan], ">f4")': "74137b55083ad5959cbc111cae24e47c3d2da745",
    'np.array([(1, "a")], "i2,U3")': "6160b172a06b8112db110f7f457a0ef24e946e22",
    'np.array([1, "a", [2]], dtype=object)': "378085b7b7a3705eb73306a457530e21c06aa4ab",
    "np.zeros(0)": "7bf855d5dc612475ef3b4d68976e2d05ff516ff8",
    "np.ma.masked_array([1.0, 2], [True, False])": "34e822c81eb991b315e8d56b49ef3d94b954998e",
    'np.dtype("f4")': "0dc7478a9052a75da28d443f52c6e6b0cc95072b",
    "np.sin": "1acf4c4795ef2ede41ffae48965a288c1f024cb7",
    "Pair(1, 2)": "f7047aef8c23140a98c749d48b18d17b1701e560",
    'Model(name="a")': "314a9bed93c05cd00181e97842ee90fb726ff247",
}


PANDAS: dict[str, str] = {
    "pd.NA": "907893f6a05125d9cb9425ba33d658464d7b1f81",
    "pd.NaT": "3f55effc82dfc5de8e86ccf9169ab6dbddffa742",
    "pd.DataFrame([[1, 2.5]])": "46f2ec99fe9e8d088faa7b5e53ee719884b61338",
    'pd.Series([1.5, 2.5], name="a")': "1260e4e652ede2ef3fa3d7be45c264655ea10326",
    'pd.Series([3, 5], dtype="category")': "55282d7fea2f821106520b1413ebceb52750cfbd",
    'pd.array([1, None], dtype="Int64")': "4aa90b686fb3578423e1a8a813981b31c870755b",
    "pd.RangeIndex(1, 9, 2)": "ef5daeeedd3da194603b48b99fd6f1b09e9590ce",
    'pd.Index([3, 1], name="n")': "8bf77e97546cb1ca3f521050517e3d5282312f14",
    "pd.MultiIndex.from_tuples([(1, 2), (1, 3)])": "679496d8ca8237ca706e592d1a73d8b163c7142a",
    'pd.Timestamp("2024-02-29 01:00").as_unit("ns")': "6e35c4d1fd590addc6cc54e33780e9b8dee7d6eb",
    'pd.Timestamp("2024-02-29 01:00", tz="Europe/Berlin").as_unit("ns")': "717421b5c843b70d05c44896a387fe37db0c901f",
    'pd.Timedelta(days=1).as_unit("ns")': "601e855b4208c0eba232d74da9491ce96371bd72",
    'pd.Period("2024-02-29", "D")': "ac48530ab0eb010090b23f33685187e9f4db64b1",
    'pd.Interval(1, 2, closed="left")': "3de27b827d64f6c06cfaa848e3b6993061f7b1f0",
}


@pytest.fixture(scope="module")
def prelude() -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(PRELUDE, namespace)
    return namespace


@rows("expression", [*GOLDEN, *GOLDEN_WITH_LIBRARIES])
def test_keys_do_not_change_between_releases(expression: str, prelude: dict[str, Any]) -> None:
    expected = (GOLDEN | GOLDEN_WITH_LIBRARIES)[expression]
    assert digest(eval(expression, prelude)).hex() == expected


@rows("expression", PANDAS)
def test_keys_of_pandas_do_not_change_between_releases(expression: str) -> None:
    assert digest(eval(expression, {"pd": pd})).hex() == PANDAS[expression]


def digests_in_a_process(python: str, **environment: str) -> tuple[bool, dict[str, str]]:
    program = f"""{PRELUDE}
from opero.caching.keys import digest
plain, libraries = json.load(sys.stdin)
names = plain + (libraries if LIBRARIES else [])
print(json.dumps([LIBRARIES, {{name: digest(eval(name)).hex() for name in names}}]))
"""
    done = subprocess.run(
        [python, "-c", program],
        input=json.dumps([list(GOLDEN), list(GOLDEN_WITH_LIBRARIES)]),
        env={**os.environ, "PYTHONPATH": str(SOURCES), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    libraries, digests = json.loads(done.stdout)
    return libraries, digests


@pytest.mark.parametrize("seed", ["0", "1", "2"])
def test_keys_do_not_depend_on_the_hash_seed(seed: str) -> None:
    _, digests = digests_in_a_process(sys.executable, PYTHONHASHSEED=seed)
    assert digests == GOLDEN | GOLDEN_WITH_LIBRARIES


def interpreter(version: str) -> str | None:
    found = shutil.which(f"python{version}")
    installed = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for candidate in [*([found] if found else []), *map(str, installed)]:
        # A version manager's shim may be on the path without an interpreter behind it.
        probe = subprocess.run([candidate, "-c", ""], capture_output=True, check=False)
        if probe.returncode == 0:
            return candidate
    return None


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_keys_are_the_same_on_every_python(version: str) -> None:
    python = interpreter(version)
    if python is None:
        pytest.skip(f"no python{version} here")
    libraries, digests = digests_in_a_process(python)
    assert digests == (GOLDEN | GOLDEN_WITH_LIBRARIES if libraries else GOLDEN)


def test_keys_load_no_hash_and_no_array_library_before_they_are_needed() -> None:
    program = (
        "import sys; before = set(sys.modules);"
        "import opero.caching.keys as keys; keys.encode([1, 'a', {2.5}]);"
        "late = {'hashlib', 'numpy', 'pandas', 'pydantic'};"
        "print(late & set(sys.modules) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "set()\n"
