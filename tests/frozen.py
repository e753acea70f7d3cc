"""Imported last by the server that processes are forked from: no collector of theirs walks its imports again."""

import gc

gc.collect()
gc.freeze()
