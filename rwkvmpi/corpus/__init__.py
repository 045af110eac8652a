"""Input: finding documents, reading them as bytes, tokenising ahead of the compute, and laying the tokens into chunks.

index.py finds the documents, readers.py opens them, tokenizers/ turn bytes into tokens, feeder.py does both in a child
process that runs ahead, stream.py lays the tokens into chunks. Nothing here imports torch.
"""
