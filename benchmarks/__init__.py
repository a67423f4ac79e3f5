"""What `make bench` runs; each module prints a table, and can be run alone."""
