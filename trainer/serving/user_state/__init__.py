"""What follows from a user's history alone, made once and kept: a request that finds it saves the making.

    state.py      the state of one user: their history, to compare a request's with, and tensors by behavior
    cache.py      the states that are in memory, the latest used, up to so many bytes
    maker.py      states of a batch's requests: found, extended or made; and as the model takes them
    settings.py   the section [user_states] of a server's config
    store.py      where states lie that several processes share: what a store is; stores.py has all kinds
    codec.py      a state as bytes, and what is believed of bytes that come back
    second_level.py  the store behind the cache: its failures cost no request anything

A state is never trusted: the history that it was made of lies in it, and is compared with the request's. What
depends on the request (its window, positions, ages) is no part of it.
"""
