"""How completion is found: the hub, its predictions and its timer. Nothing here blocks, or knows slots."""
