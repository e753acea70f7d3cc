"""Vectors of items and users for a retrieval service, and indexes over them, from a snapshot.

docs/vectors.md describes what is written. `spaces` says what a vector is, `item_batch` puts items before the
model without any history, `vector_files` is the folder, `indexes` and `recall` are FAISS's part.
"""
