"""What only SimPEDES can tell, because every pixel and phrase is known."""
