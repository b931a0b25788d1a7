# this_file: src/opero/concurrency/__init__.py
"""Parallel maps: one driver, and small engines under it."""
