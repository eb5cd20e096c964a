"""Pictures to look at, which the method does without."""
