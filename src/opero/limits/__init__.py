# this_file: src/opero/limits/__init__.py
"""Rate limits, concurrency limits and circuit breakers: what the guard stages of the pipeline stand on."""
