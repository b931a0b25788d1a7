# this_file: src/opero/caching/codec/__init__.py
"""How results become bytes for disk and redis, and values again, with nothing executed on the way.

coder       `Coder`: picks the form, checks before anything is read
plain       plain data in MessagePack
  forms       of the types that MessagePack does not know
  arrays      of numpy
signed      everything else: pickles, opened only after their signature was checked
  secret      what they are signed with
signals     `Unencodable`, `Undecodable`
"""

from __future__ import annotations

from opero.caching.codec.coder import Codec, Coder
from opero.caching.codec.signals import Buffer, Undecodable, Unencodable

__all__ = ["Buffer", "Codec", "Coder", "Undecodable", "Unencodable"]
