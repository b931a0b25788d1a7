# this_file: src/opero/core/cache/stores/__init__.py
"""Stores that outlive a process: bytes by key, on disk or on a server.

protocol    `ByteStore`: what a store has to be able to do
guest       twat-cache's engines, imported so that the host program does not notice
"""

from __future__ import annotations
