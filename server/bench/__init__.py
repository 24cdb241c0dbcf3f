"""`adapterd bench`: offered load against a running server, comparisons, memory; or, offline, the engine in this process."""
