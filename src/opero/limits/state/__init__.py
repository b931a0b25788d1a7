# this_file: src/opero/limits/state/__init__.py
"""Where limits keep their state: in this process, or in a small file that several processes map."""
