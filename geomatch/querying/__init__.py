"""What `query` is made of: what is asked for, the index that is asked, and the answers."""
