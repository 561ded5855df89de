"""What `serve` is made of: the page, the API, and what keeps strangers and hostile files out."""
