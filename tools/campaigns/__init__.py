"""Campaigns that run the program on randomly generated inputs."""
