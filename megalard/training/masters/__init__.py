"""The fp32 weights and gradients of everything that is trained, in full or divided over ranks."""
