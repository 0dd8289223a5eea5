"""From text to this rank's micro-batches, in the order the data walks.

``sources`` (files to documents) → ``tokenizer`` → ``token_file`` (a memory-mapped store) →
``blocks`` (the store cut into sequences) → ``sampler`` (which blocks a step reads) → ``batch``
(tensors) → ``loader`` (a step's micro-batches for one data-parallel rank).
"""
