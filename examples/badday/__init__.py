# this_file: examples/badday/__init__.py
"""The parts of the example server, none of which does any I/O.

`script` says what each route answers, `ledger` counts what came in, `wire` is as much HTTP/1.1 as
the server needs, `chat` is the chat-completions shape. `examples/server.py` puts them on a port.
"""
