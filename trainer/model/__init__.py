"""Two-stage models: search over the history, then a sequence model over what it kept."""
