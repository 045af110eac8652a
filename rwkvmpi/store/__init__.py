"""What a run leaves on disk: immutable shards, commits, and results.h5.

Nothing is imported here: a command that only looks at a folder must not wait for h5py.
"""
