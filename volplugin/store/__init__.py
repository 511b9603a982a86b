"""What is known: volumes and mounts, in LevelDB on disk and in memory for reads.

`store.Store` is all that the layers above use. `database` is the only module that
knows LevelDB, `records` the only one that knows what a record looks like on disk.
"""
