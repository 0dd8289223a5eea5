"""From text to this rank's micro-batches.

In the order that the data takes: ``sources`` (files to documents), ``tokenizer`` (documents to
ids), ``token_store_writer`` and ``token_store`` (ids on disk, memory-mapped), ``blocks`` (the store
cut into sequences), ``sampler`` (which blocks a step reads), ``batch`` (blocks as tensors) and
``loader`` (the micro-batches of one data-parallel rank).
"""
