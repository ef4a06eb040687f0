"""Who runs when: sequences, pages, continuous batching and micro-batching, all pure."""
