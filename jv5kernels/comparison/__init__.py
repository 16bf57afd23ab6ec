"""What our embeddings are held against: the fp32 reference, the peers, and texts to compare them on."""
