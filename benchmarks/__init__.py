"""The same work here and in another library or as bare arithmetic, alternating in one process."""
