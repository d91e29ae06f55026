"""Batches of single items: the queue, which is pure, the batcher that drives it, and the batch that runs."""
