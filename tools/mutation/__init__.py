"""Mutation tests: whether the tests fail when the code is wrong."""
