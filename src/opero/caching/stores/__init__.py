# this_file: src/opero/caching/stores/__init__.py
"""Stores that outlive a process: bytes by key, on disk or on a server, and a user's own objects.

base       `ByteStore`, what a store has to do; which stores are open; entries of one function in one of
           them, or in a user's own object; pauses for a dead server
disk       `"disk"`: SQLite and files in a folder
redis      `"redis"`: a server
twat       `"twat:redis"`, `"twat:joblib"`: the engines of twat-cache
"""
