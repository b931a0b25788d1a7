# this_file: src/opero/caching/stores/__init__.py
"""Stores that outlive a process: bytes by key, on disk or on a server, and a user's own objects.

base       `ByteStore`, what a store has to do; which stores are open; pauses for a dead server
entries    `CodedStore`: entries of one function, encoded, in such a store
disk       `"disk"`: SQLite and files in a folder
redis      `"redis"`: a server; `redis_connections` talks to it
user       a user's own object
twat       `"twat:redis"`, `"twat:joblib"`: the engines of twat-cache
"""
