"""The spaces that vectors may lie in. A new one is a file here and a line in `table.py`."""
