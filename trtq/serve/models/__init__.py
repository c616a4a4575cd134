"""Models that compute the images of a request."""
