"""RDMA verbs between neighbours: a message is one RDMA WRITE WITH IMMEDIATE into the neighbour's next slot."""
