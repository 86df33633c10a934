"""Weight files: reading foreign ones safely, writing our own."""
