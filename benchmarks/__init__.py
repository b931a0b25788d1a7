# this_file: benchmarks/__init__.py
"""opero measured side by side with its peers."""
