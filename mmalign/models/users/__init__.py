"""Users of a personalised denoiser: their attention, embeddings, mixtures, and the files that keep them."""
