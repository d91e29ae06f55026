"""How completion is found: the poller, its predictions and its timer. Nothing here blocks, or knows slots."""
