"""One library function per verb of the command line."""
