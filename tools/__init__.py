"""Scripts around the package, each run from the root of the repository as a module."""
