"""The HTML and the plots that show the numbers."""
