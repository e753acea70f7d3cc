"""`tandemrec online`: trains a stream window by window and publishes what it has learnt."""
