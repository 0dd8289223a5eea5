"""Context parallelism: the tokens of each block split over the cp axis."""
