"""The operators' bodies for CUDA tensors. Importing this package imports none of them."""
