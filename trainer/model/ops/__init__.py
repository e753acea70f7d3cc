"""Operators of the models, one module each: a plain form, and faster ones by device."""
