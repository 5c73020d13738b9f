"""Online: the preference model, groups, counts and shift detection, one micro-batch at a time."""
