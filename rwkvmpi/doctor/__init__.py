"""`rwkvmpi doctor`: what is wrong with this machine, with the nodes of a job, or between them, and how to mend it.

diagnosis: what a check says, and all checks of one machine. node_*: what one node can find out about itself; all_ranks
and nodes_*: asking all nodes, and comparing them; fabric_*: RDMA and what MPI makes of it; *_checks: everything else.
"""
