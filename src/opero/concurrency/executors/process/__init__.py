# this_file: src/opero/concurrency/executors/process/__init__.py
"""The engine of worker processes.

pool        ProcessEngine: assign chunks to workers, collect results, replace dead workers
worker      what a worker process does
start       start methods and the fork server
protocol    messages between pool and worker, and the status page that they share
buffers     shared memory for large buffers
pickling    functions and values as bytes
job_spec    a job as bytes
remote_error  exceptions as bytes
"""
