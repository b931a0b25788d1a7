# this_file: src/opero/concurrency/executors/process/__init__.py
"""The executor of worker processes.

worker_pool    start workers, send them chunks, collect their results, replace those that die
worker_handle  one worker as the pool sees it
start          start methods and the fork server
worker         what a worker does with its chunks
session        the worker's connection to the pool: messages, and the page that both share
"""
