"""WebShop (arXiv 2207.01206) as a native text environment."""
