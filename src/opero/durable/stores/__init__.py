# this_file: src/opero/durable/stores/__init__.py
"""Places where journals are kept, one file each."""
