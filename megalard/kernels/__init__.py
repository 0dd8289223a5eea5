"""The Triton kernels, whose sources are in the repository's top-level ``kernels/``.

In a checkout ``megalard/kernels/relation_kl`` is a link to ``kernels/relation_kl``; a wheel has the
files themselves. Import kernels only as ``megalard.kernels.<name>``: a top-level package called
``kernels`` would shadow a package of that name that transformers imports.
"""
