"""Reports: HTML pages, plots and formatted text."""
