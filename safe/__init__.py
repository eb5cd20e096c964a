"""What keeps files and people safe: whole files, bounded readers, locks, and marks of what is synthetic."""
