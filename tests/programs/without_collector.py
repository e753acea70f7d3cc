"""Imported first by the server that tests fork, see frozen.py, which ends it."""

import gc

gc.disable()
