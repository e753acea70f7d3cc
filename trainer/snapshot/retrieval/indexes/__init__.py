"""FAISS indexes for the largest inner product. A new kind is a file here and a line in `table.py`."""
