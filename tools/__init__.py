"""Scripts around the package. Each is run as a module from the root of the repository."""
