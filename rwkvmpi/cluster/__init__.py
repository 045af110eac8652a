"""What surrounds a rank: the launcher, MPI, cores, signals, logs, and the doctor who looks at all of them."""
