"""What `hybridkv bench` is made of: conversations, clients that play them, and what is made of that."""
