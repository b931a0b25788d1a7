# this_file: src/opero/concurrency/executors/__init__.py
"""One file for each engine. They own workers and no policy."""
