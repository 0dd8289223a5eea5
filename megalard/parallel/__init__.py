"""How a job is split over ranks: the mesh, collectives, tensor and context parallelism."""
