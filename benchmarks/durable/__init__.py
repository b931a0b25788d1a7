# this_file: benchmarks/durable/__init__.py
"""Durable workflows beside other engines, each in a process of its own."""
