"""Live Transformers and Sentence Transformers models: what `patch` and FastEncoder need of them."""
