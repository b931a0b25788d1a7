# this_file: src/opero/caching/__init__.py
"""Keep results and compute each of them only once at a time; knows nothing of calls and stages.

    keys            from the arguments of a call to a key
    function_cache  answering the calls of one function: entries, other callers' outcomes, leading
    entries         finding, serving and storing the entries of one function
    memory          the entry, the store in memory, weights
    copying         copies of results, so that no caller sees another one's changes
    single_flight   computing a key once at a time: leaders, waiters, handing over
    lease           the same across processes
    refresh         serving expired entries after a failure, refreshing entries early
    codec, stores   results as bytes that execute nothing, on disk or on a server; users' stores
    handles         `f.cache`, caches used by hand, and `clear_cache`

The stage that stands on it is `opero.core.cache`.
"""
