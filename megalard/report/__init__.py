"""One page about a run: collected from its files, drawn, and written as report.html."""
