"""Campaigns that try the program with inputs that nobody wrote by hand."""
