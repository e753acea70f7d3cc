"""`tandemrec vectors`: vectors of items and users for a retrieval service; docs/vectors.md says more."""
