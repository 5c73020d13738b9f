"""State: everything the stream has learnt, in one LMDB environment with the offsets that it includes."""
