"""Other people's requests and responses, a file each, and our own."""
