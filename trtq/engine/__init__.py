"""One way to run a graph, whatever runs it."""
